"""The table of op cases, for tests and benchmarks: how to make the inputs of every op, and what its result is.

A case is made from a graph, sizes of the arrays and a type of features; see `CASES`. Tests make small ones
(`tests/support/small_cases.py`), benchmarks those of a model (`bench_kernels.py`, `gpu_ops.py`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ejmp.graph.graph import AtomGraph
from ejmp_kernels import specification
from ejmp_kernels.activation import activate, swap_add
from ejmp_kernels.edge_embedding import gather_add
from ejmp_kernels.edges import Edges
from ejmp_kernels.linear import linear
from ejmp_kernels.pair import pair
from ejmp_kernels.quadruplet import quadruplet
from ejmp_kernels.radial import radial
from ejmp_kernels.sums import atom_sum
from ejmp_kernels.triplet import triplet

MODULES = {
    "edge_to_edge": ("triplet",),
    "atom_to_edge": ("triplet",),
    "edge_to_atom": ("triplet",),
    "quadruplet": ("quadruplet",),
    "pair": ("pair",),
    "radial": ("radial",),
    "pair_from_distances": ("pair", "radial"),
    "atom_sum": ("sums",),
    "gather_add": ("edge_embedding",),
    "gather_add_atoms": ("edge_embedding",),
    "activate": ("activation",),
    "activate_factor": ("activation",),
    "activate_residual": ("activation",),
    "activate_all": ("activation",),
    "swap_add": ("activation",),
    "swap_add_to": ("activation",),
    "linear": ("linear",),
}
"""Modules of ejmp_kernels that hold the op of each of `CASES`."""
TRIPLETS = {
    "edge_to_edge": ("main", "main", False),
    "atom_to_edge": ("main", "atom_edges", False),
    "edge_to_atom": ("atom_edges", "main", True),
}
"""Edges that receive, edges that send, and whether the former are summed into atoms, by the op's name."""
LOW = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the graph does not fix: sizes of the arrays by op, and two numbers.

    Letters: C channels, A embedding of a basis, S spherical and R radial functions, M edge channels, J projections.
    """

    triplet: tuple[int, int, int]
    """C, A, S."""
    quadruplet: tuple[int, int, int]
    """C, A, S."""
    pair: tuple[int, int]
    """C, R."""
    radial: tuple[int, int]
    """R, J."""
    atom_sum: int
    """M."""
    gather_add: int
    """M."""
    swap_add: int
    """M."""
    activate: tuple[int | None, int]
    """Rows (None: as many as there are main edges) and columns."""
    linear: tuple[int | None, int, int]
    """Rows (None: as many as there are main edges), columns in and out."""
    cutoff: float
    """Where the radial basis ends, in A."""
    spread: float = 1.0
    """Standard deviation of the inputs of an activation."""


def model_sizes(config: Any) -> Sizes:
    """Return the sizes in a model of an `ejmp.JMPConfig`."""
    width = config.emb_size_edge
    return Sizes(
        triplet=(config.emb_size_trip_in, config.emb_size_cbf, config.num_spherical),
        quadruplet=(config.emb_size_quad_in, config.emb_size_sbf, config.num_spherical),
        pair=(config.emb_size_pair_in, config.emb_size_rbf),
        radial=(config.num_radial, config.emb_size_rbf),
        atom_sum=width,
        gather_add=width,
        swap_add=width,
        activate=(None, width),
        linear=(None, width, width),
        cutoff=config.rbf_cutoff,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One op with its inputs and its specification."""

    inputs: list[Tensor]
    """Arguments that have gradients."""
    call: Callable[..., Tensor]
    """The op as a function of the inputs and of `backend`."""
    spec: Callable[..., Tensor]
    """Its plain-torch specification as a function of the inputs."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """Random numbers for features of one type, and for what is beside them, on one device."""

    dtype: torch.dtype
    device: torch.device

    def features(self, *shape: int, seed: int = 0) -> Tensor:
        return randn(*shape, dtype=self.dtype, device=self.device, seed=seed)

    def wide(self, *shape: int, seed: int = 0) -> Tensor:
        """Draw in the type of sums, geometry and bases: float32 where features are in less."""
        dtype = torch.float32 if self.dtype in LOW else self.dtype
        return randn(*shape, dtype=dtype, device=self.device, seed=seed)


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Draw normal numbers that depend on shape and seed only: those of every type are the same but for rounding."""
    generator = torch.Generator(device).manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator, device=device).to(dtype)


Make = Callable[[AtomGraph, Sizes, torch.dtype], Case]


def _along(edges: Any, vector: Tensor) -> Edges:
    """Return the edges with other vectors, through which gradients go."""
    return dataclasses.replace(edges, vector=vector)


def _triplet(graph: AtomGraph, sizes: Sizes, dtype: torch.dtype, *, name: str) -> Case:
    out, into, to_atoms = TRIPLETS[name]
    a, b, draw = getattr(graph, out), getattr(graph, into), Draw(dtype, graph.device)
    channels, basis, spherical = sizes.triplet

    def of(function: Callable) -> Callable:
        return lambda x, w, v_out, v_in, **options: function(
            x, w, _along(a, v_out), _along(b, v_in), to_atoms=to_atoms, **options
        )

    x, weight = draw.features(b.num_edges, channels), draw.wide(a.num_edges, basis, spherical)
    return Case(inputs=[x, weight, a.vector, b.vector], call=of(triplet), spec=of(specification.triplet))


def _quadruplet(graph: AtomGraph, sizes: Sizes, dtype: torch.dtype) -> Case:
    main, middle, draw = graph.main, graph.quad_edges, Draw(dtype, graph.device)
    channels, basis, spherical = sizes.quadruplet

    def of(function: Callable) -> Callable:
        return lambda x, filters, w, v, v_middle, **options: function(
            x, filters, w, _along(main, v), _along(middle, v_middle), **options
        )

    x, filters = draw.features(main.num_edges, channels), draw.wide(middle.num_edges, spherical, channels)
    inputs = [x, filters, draw.wide(main.num_edges, basis, spherical**2), main.vector, middle.vector]
    return Case(inputs=inputs, call=of(quadruplet), spec=of(specification.quadruplet))


def _pair(graph: AtomGraph, sizes: Sizes, dtype: torch.dtype) -> Case:
    edges, (channels, num_radial), draw = graph.atom_pairs, sizes.pair, Draw(dtype, graph.device)
    atoms = torch.arange(graph.num_atoms, device=graph.device)
    table = specification.neighbor_table(atoms, edges.ptr, edges.max_degree)
    return Case(
        inputs=[draw.features(graph.num_atoms, channels), draw.wide(edges.num_edges, num_radial)],
        call=lambda h, r, **options: pair(h, r, edges.ptr, edges.source, **options),
        spec=lambda h, r: specification.pair_sum(h, r, edges.source, table),
    )


def _radial(graph: AtomGraph, sizes: Sizes, dtype: torch.dtype) -> Case:
    """Project the radial basis of pairs; for other distances replace the first input."""
    num_radial, projections = sizes.radial
    distance = graph.atom_pairs.distance
    offset = torch.linspace(0, 1, num_radial).to(distance)  # centres rounded to float32, as upstream's
    temps = torch.full_like(offset, 0.5 * (num_radial - 1) ** 2)
    options = (sizes.cutoff, 5)
    return Case(
        inputs=[distance, Draw(dtype, graph.device).features(num_radial, projections)],
        call=lambda d, w, **backend: radial(d, offset, temps, w, *options, **backend),
        spec=lambda d, w: specification.gaussian_basis(d, offset, temps, *options) @ w,
    )


def _pair_from_distances(graph: AtomGraph, sizes: Sizes, dtype: torch.dtype) -> Case:
    """Sum over pairs with the radial basis on the fly: two ops after each other."""
    sums, basis = _pair(graph, sizes, dtype), _radial(graph, sizes, dtype)
    return Case(
        inputs=[sums.inputs[0], *basis.inputs],
        call=lambda h, d, w, **options: sums.call(h, basis.call(d, w, **options), **options),
        spec=lambda h, d, w: sums.spec(h, basis.spec(d, w)),
    )


def _atom_sum(graph: AtomGraph, sizes: Sizes, dtype: torch.dtype) -> Case:
    edges, draw = graph.main, Draw(dtype, graph.device)
    shape = (edges.num_edges, sizes.atom_sum)
    return Case(
        inputs=[draw.features(*shape), draw.features(*shape, seed=1)],
        call=lambda m, f, **options: atom_sum(m, f, edges.ptr, **options),
        spec=lambda m, f: specification.atom_sum(m, f, edges.target, graph.num_atoms),
    )


def _gather_add(graph: AtomGraph, sizes: Sizes, dtype: torch.dtype, *, has_x: bool) -> Case:
    edges, width, draw = graph.main, sizes.gather_add, Draw(dtype, graph.device)
    rows = [draw.wide(graph.num_atoms, width, seed=seed) for seed in (1, 2)]

    def call(*inputs: Tensor, **options: Any) -> Tensor:
        *x, a, b = inputs
        return gather_add(x[0] if x else None, a, b, edges.source, edges.swap, edges.ptr, **options)

    def spec(*inputs: Tensor) -> Tensor:
        *x, a, b = inputs
        return specification.gather_add(x[0] if x else None, a, b, edges.source, edges.target)

    return Case(inputs=[draw.features(edges.num_edges, width), *rows] if has_x else rows, call=call, spec=spec)


def _activate(graph: AtomGraph, sizes: Sizes, dtype: torch.dtype, *, terms: tuple[str, ...]) -> Case:
    rows, columns = sizes.activate
    shape = (graph.main.num_edges if rows is None else rows, columns)
    draw = Draw(dtype, graph.device)

    def of(function: Callable) -> Callable:
        return lambda x, *rest, **options: function(
            x, **dict(zip(terms, rest, strict=True)), scale=0.7, add_scale=0.3, **options
        )

    inputs = [sizes.spread * draw.features(*shape, seed=seed) for seed in range(1 + len(terms))]
    return Case(inputs=inputs, call=of(activate), spec=of(specification.activate))


def _swap_add(graph: AtomGraph, sizes: Sizes, dtype: torch.dtype, *, has_add: bool) -> Case:
    edges, width, draw = graph.main, sizes.swap_add, Draw(dtype, graph.device)

    def of(function: Callable) -> Callable:
        return lambda x, *add, **options: function(x, edges.swap, *add, scale=0.7, **options)

    inputs = [draw.features(edges.num_edges, 2 * width), draw.features(edges.num_edges, width)]
    return Case(inputs=inputs[: 1 + has_add], call=of(swap_add), spec=of(specification.swap_add))


def _linear(graph: AtomGraph, sizes: Sizes, dtype: torch.dtype) -> Case:
    rows, fan_in, fan_out = sizes.linear
    draw = Draw(dtype, graph.device)
    x = draw.features(graph.main.num_edges if rows is None else rows, fan_in)
    return Case(inputs=[x, draw.features(fan_out, fan_in)], call=linear, spec=torch.nn.functional.linear)


CASES: dict[str, Make] = {
    **{name: functools.partial(_triplet, name=name) for name in TRIPLETS},
    "quadruplet": _quadruplet,
    "pair": _pair,
    "radial": _radial,
    "pair_from_distances": _pair_from_distances,
    "atom_sum": _atom_sum,
    "gather_add": functools.partial(_gather_add, has_x=True),
    "gather_add_atoms": functools.partial(_gather_add, has_x=False),
    "activate": functools.partial(_activate, terms=()),
    "activate_factor": functools.partial(_activate, terms=("factor",)),
    "activate_residual": functools.partial(_activate, terms=("add",)),
    "activate_all": functools.partial(_activate, terms=("factor", "add")),
    "swap_add": functools.partial(_swap_add, has_add=False),
    "swap_add_to": functools.partial(_swap_add, has_add=True),
    "linear": _linear,
}
"""Functions that make the case of an op from a graph, sizes and the type of features, by name."""


class LinearOpError(ValueError):
    """Raised where a second derivative is asked for of an op that has none."""


def _randn_like(x: Tensor) -> Tensor:
    return randn(*x.shape, dtype=x.dtype, device=x.device)


def forward(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    """Return a call without gradients, and nothing to keep."""

    def call() -> list[Tensor]:
        with torch.no_grad():
            return [function(*inputs)]

    return call


def backward(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    """Return a call of the gradients alone."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    grad = _randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def second(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    """Return a call of the gradients' gradients alone.

    Raises:
        LinearOpError: if the op is linear and has none.
    """
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    grad = _randn_like(out).requires_grad_()
    first = torch.autograd.grad(out, inputs, grad, create_graph=True)
    along = [_randn_like(g) for g in first]
    connected = [(g, u) for g, u in zip(first, along, strict=True) if g.requires_grad]
    if not connected:
        raise LinearOpError("the op is linear: there is no second derivative")
    gs, us = zip(*connected, strict=True)
    return lambda: torch.autograd.grad(gs, [grad, *inputs], us, retain_graph=True, allow_unused=True)


ORDERS = {"forward": forward, "backward": backward, "second": second}
"""What is timed of an op: the op, its gradients, and their gradients."""
