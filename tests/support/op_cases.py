"""One case per op, for the tests of both backends: inputs, the function under test, its plain-torch specification."""

import dataclasses
import functools

import torch

import ejmp
from ejmp_kernels import availability, specification
from ejmp_kernels.activation import activate, swap_add
from ejmp_kernels.atom_sum import atom_sum
from ejmp_kernels.edge_embedding import gather_add
from ejmp_kernels.linear import linear
from ejmp_kernels.pair import pair
from ejmp_kernels.quadruplet import quadruplet
from ejmp_kernels.radial import radial
from ejmp_kernels.triplet import triplet

DEVICE = {"native": "cpu", "triton": "cpu" if availability.interpreted() else "cuda"}
LOW = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a case is made of: the type of features, and a small graph for finite differences or one without edges."""

    backend: str
    dtype: torch.dtype
    graph: str = "full"  # or "small", "tiny", "lone"

    @property
    def tiny(self):
        return self.graph in {"tiny", "lone"}

    @property
    def slow(self):
        """Whether Triton's interpreter runs it: a full quadruplet would take a minute."""
        return self.backend == "triton" and availability.interpreted()

    @property
    def real(self):
        return torch.float32 if self.dtype in LOW else self.dtype

    @property
    def device(self):
        return DEVICE[self.backend]

    def randn(self, *shape, dtype=None, seed=0):
        return randn(*shape, dtype=dtype or self.dtype, seed=seed).to(self.device)

    def make_graph(self):
        """A crystal of three atoms (several images of each neighbour), a lone atom, and a bent molecule."""
        crystal = ejmp.Structure(
            numbers=[12, 8, 8],
            positions=[[0.1, 0.2, 0], [1.7, 1.5, 1.6], [0.3, 1.9, 2.2]],
            cell=[[3.1, 0, 0], [0.4, 3.3, 0], [-0.2, 0.5, 3.6]],
            pbc=True,
            tags=[1, 2, 0],
        )
        bent = ejmp.Structure(
            numbers=[6, 8, 1, 7, 1],
            positions=[[0, 0, 0], [1.2, 0.1, 0.2], [-0.6, 0.9, 0.3], [-0.5, -0.8, 1.0], [0.3, 0.4, -1.1]],
        )
        four = ejmp.Structure(numbers=bent.numbers[:4], positions=bent.positions[:4])
        lone = ejmp.Structure(numbers=[2], positions=[[0.0, 0, 0]])
        one = dataclasses.replace(crystal, numbers=[12], positions=[[0.1, 0.2, 0]], tags=[1])
        many = 18 if self.backend == "triton" else 12  # more than a tile of the interpreter's
        structures, most = {
            "full": ([crystal, lone, bent], many),
            "small": ([one, lone, four], [many, many, 4]),
            "tiny": ([four], 4) if self.slow else ([bent, lone], 30),
            "lone": ([lone], many),
        }[self.graph]
        return ejmp.build_graph(structures, 5.0 if self.tiny else 6.0, most, dtype=self.real, device=self.device)


@dataclasses.dataclass
class Case:
    """One op: what differentiates, the function under test, its specification."""

    inputs: list
    function: object
    spec: object


def randn(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def with_vector(edges, vector):
    return dataclasses.replace(edges, vector=vector)


def make_triplet(out, into, to_atoms, at):
    graph = at.make_graph()
    out, into = getattr(graph, out), getattr(graph, into)
    C, A, S = (2, 2, 3) if at.tiny else (20, 6, 7)
    weight = at.randn(out.num_edges, A, S, dtype=at.real)
    inputs = [at.randn(into.num_edges, C), weight, out.vector, into.vector]

    def call(function):
        return lambda x, w, v_out, v_in: function(
            x, w, with_vector(out, v_out), with_vector(into, v_in), to_atoms=to_atoms
        )

    return Case(inputs, call(functools.partial(triplet, backend=at.backend)), call(specification.triplet))


def make_quadruplet(at):
    at = dataclasses.replace(at, graph="small") if at.slow and at.graph == "full" else at
    graph = at.make_graph()
    main, middle = graph.main, graph.quad_edges
    C, A, S = (2, 1, 3) if at.tiny else (20, 14, 7)
    inputs = [
        at.randn(main.num_edges, C),
        at.randn(middle.num_edges, S, C, dtype=at.real),
        at.randn(main.num_edges, A, S * S, dtype=at.real),
        main.vector,
        middle.vector,
    ]

    def call(function):
        return lambda x, f, w, v, v_mid: function(x, f, w, with_vector(main, v), with_vector(middle, v_mid))

    return Case(inputs, call(functools.partial(quadruplet, backend=at.backend)), call(specification.quadruplet))


def make_pair(at):
    edges = at.make_graph().atom_pairs
    atoms, (C, R) = len(edges.ptr) - 1, (3, 2) if at.tiny else (12, 10)
    return Case(
        [at.randn(atoms, C), at.randn(edges.num_edges, R, dtype=at.real)],
        lambda h, r: pair(h, r, edges.ptr, edges.source, backend=at.backend),
        lambda h, r: specification.pair(h, r, edges.ptr, edges.source),
    )


def make_radial(at):
    # upstream's float32 centres; a distance beyond the cutoff, and none on it (b has a third derivative's jump there)
    distance = [0.9, 1.7, 3.05, 4.4, 5.99, 6.5, 2.2, 11.0]
    distance += torch.linspace(1, 5.9, 28).tolist() if at.backend == "triton" and not at.tiny else []
    distance = torch.tensor([] if at.graph == "lone" else distance, dtype=at.real, device=at.device)
    R = 8 if at.tiny else 128 if at.backend == "native" else 113
    offset, temps = torch.linspace(0, 1, R).to(distance), torch.full((R,), 0.5 * (R - 1) ** 2).to(distance)
    return Case(
        [distance, at.randn(R, 3 if at.tiny else 37)],
        lambda d, w: radial(d, offset, temps, w, 6.0, 5, backend=at.backend),
        lambda d, w: specification.gaussian_basis(d, offset, temps, 6.0, 5) @ w,
    )


def make_atom_sum(at):
    edges = at.make_graph().main
    shape = (edges.num_edges, 3 if at.tiny else 150)
    return Case(
        [at.randn(*shape), at.randn(*shape, seed=1)],
        lambda m, f: atom_sum(m, f, edges.ptr, backend=at.backend),
        lambda m, f: specification.atom_sum(m, f, edges.target, len(edges.ptr) - 1),
    )


def make_gather_add(has_x, at):
    edges = at.make_graph().main
    atoms, M = len(edges.ptr) - 1, 3 if at.tiny else 37
    rows = [at.randn(atoms, M, dtype=at.real, seed=i) for i in (1, 2)]

    def call(function):
        return lambda *inputs: function(inputs[0] if has_x else None, *inputs[-2:])

    def op(x, a, b):
        return gather_add(x, a, b, edges.source, edges.swap, edges.ptr, backend=at.backend)

    inputs = [at.randn(edges.num_edges, M), *rows] if has_x else rows
    return Case(inputs, call(op), call(lambda x, a, b: specification.gather_add(x, a, b, edges.source, edges.target)))


def make_activate(terms, at):
    shape = {"full": (7, 301), "tiny": (2, 3), "lone": (0, 3)}[at.graph]
    inputs = [4 * at.randn(*shape, seed=i) for i in range(1 + len(terms))]

    def call(function):
        return lambda x, *rest: function(x, **dict(zip(terms, rest, strict=True)), scale=0.7, add_scale=0.3)

    return Case(
        inputs, call(functools.partial(activate, in_place=True, backend=at.backend)), call(specification.activate)
    )


def make_swap_add(add, at):
    edges = at.make_graph().main
    M = 3 if at.tiny else 21
    inputs = [at.randn(edges.num_edges, 2 * M), at.randn(edges.num_edges, M)][: 1 + add]

    def call(function):
        return lambda x, *rest: function(x, edges.swap, *rest, scale=0.7)

    return Case(inputs, call(functools.partial(swap_add, backend=at.backend)), call(specification.swap_add))


def make_linear(at):
    rows, fan_in, fan_out = (2, 3, 4) if at.tiny else (17, 33, 65)
    inputs = [at.randn(rows, fan_in), at.randn(fan_out, fan_in)]
    return Case(inputs, functools.partial(linear, backend=at.backend), torch.nn.functional.linear)


CASES = {
    "edge_to_edge": functools.partial(make_triplet, "main", "main", False),
    "atom_to_edge": functools.partial(make_triplet, "main", "atom_edges", False),
    "edge_to_atom": functools.partial(make_triplet, "atom_edges", "main", True),
    "quadruplet": make_quadruplet,
    "pair": make_pair,
    "radial": make_radial,
    "atom_sum": make_atom_sum,
    "gather_add": functools.partial(make_gather_add, True),
    "gather_add_atoms": functools.partial(make_gather_add, False),
    "activate": functools.partial(make_activate, ()),
    "activate_factor": functools.partial(make_activate, ("factor",)),
    "activate_residual": functools.partial(make_activate, ("add",)),
    "activate_all": functools.partial(make_activate, ("factor", "add")),
    "swap_add": functools.partial(make_swap_add, 0),
    "swap_add_to": functools.partial(make_swap_add, 1),
    "linear": make_linear,
}
"""The op that a backend may lack yet."""


def derivatives(function, inputs):
    """Value, gradients of a random projection, and gradients of a random projection of those and of their squares."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    grad = randn(*value.shape, dtype=value.dtype, seed=7).to(value.device).requires_grad_()
    first = torch.autograd.grad(value, inputs, grad, create_graph=True)
    loss = sum((g * randn(*g.shape, dtype=g.dtype, seed=8).to(g.device)).sum() + 0.1 * (g**2).sum() for g in first)
    second = torch.autograd.grad(loss, [grad, *inputs], allow_unused=True)
    zero = [torch.zeros_like(x) if g is None else g for g, x in zip(second, [grad, *inputs], strict=True)]
    return [value.detach()], [g.detach() for g in first], zero
