"""Quadruplet aggregation in factorised form: seven sums per pair of edges instead of 49 per quadruplet, and no list.

For quadruplets d->b->a<-c of an output edge e = c->a, a middle edge q = b->a and an input edge d->b, with d != a, b !=
c, d != c as images, p = V_e x V_q / |.| and n = V_d x V_q / |.|:

value[q, d, c] = x[d, c] sum_k filter[q, k, c] Y_k(V_q . V_d)
out[e, a, c] = sum_lk weight[e, a, S l + k] sum_q Y_l(V_e . V_q) sum_d Y_k(p . n) value[q, d, c]

The cosine of the dihedral angle is p . n, so the sum over d is a small matrix product per pair (e, q), and l enters
once per pair. Where p or n is shorter than eps (three atoms on a line) it is divided by eps and passes no gradient.

Reads x, filter, weight and the vectors and writes out once: 4 (E C + Q S C + E A S^2 + E A C) bytes in float32. Work: 2
T S C + 2 P S^2 C + 2 E A S^2 C FLOP for P pairs (e, q) and T triples (e, q, d). The backward also keeps the gradients
of the values, one row per pair (q, d), until they are summed by atom b; on a GPU the forward keeps the values too.
Specification: `specification.quadruplet`. Source of the sum: GemNet-OC (arXiv 2204.02782); the dihedral as a product of
normals: vector identity.
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ejmp_kernels.edges import Edges
from ejmp_kernels.linear import linear
from ejmp_kernels.registry import NAMESPACES, Backend, ops_of, register_nonlinear, register_shape, when_loaded
from ejmp_kernels.specification import collinear_eps

PIECE_BYTES = 1 << 24
"""Size of the piece of sums that `quadruplet_linear` makes at a time, in bytes: malloc reuses such a piece, and it fits
into a large cache."""


def quadruplet(
    x: Tensor,
    filters: Tensor,
    weight: Tensor,
    main: Edges,
    middle: Edges,
    *,
    eps: float | None = None,
    backend: Backend = "native",
) -> Tensor:
    """Sum input edges over quadruplets and contract with the output edge's basis.

    Args:
        x: [E, C], float32 or float64.
        filters: [Q, S, C], of the middle edges: how the angle between input and middle edge scales each channel.
        weight: [E, A, S * S].
        main: the edges that send and receive.
        middle: the Q edges between them, over the same atoms.
        eps: |sin(angle)| under which three atoms are on a line; default: `collinear_eps`.
        backend: whose kernels to use.

    Returns:
        [E, A * C], basis-major.

    Raises:
        ValueError: if shapes, types or devices do not fit together, or an index is out of range.
    """
    eps = collinear_eps(x.dtype) if eps is None else eps
    ids = (main.ptr, main.source, main.image, middle.ptr, middle.source, middle.image)
    return ops_of(backend).quadruplet(x, filters, weight, main.vector, middle.vector, *ids, eps, main.max_degree)


def quadruplet_linear(
    x: Tensor,
    filters: Tensor,
    weight: Tensor,
    main: Edges,
    middle: Edges,
    mix: Tensor,
    *,
    backend: Backend = "native",
) -> Tensor:
    """Return linear(quadruplet(...), mix); on the CPU without gradients never hold all [E, A * C] sums.

    Args:
        x: [E, C], as for `quadruplet`, like the next four.
        filters: [Q, S, C].
        weight: [E, A, S * S].
        main: the edges that send and receive.
        middle: the Q edges between them.
        mix: [out, A * C].
        backend: whose kernels to use.

    Returns:
        [E, out].

    Raises:
        ValueError: if shapes, types or devices do not fit together, or an index is out of range.
    """
    inputs = (x, filters, weight, main.vector, middle.vector)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, mix))
    if recorded or not x.is_cpu or backend != "native" or torch.compiler.is_compiling():
        return linear(quadruplet(x, filters, weight, main, middle, backend=backend), mix, backend=backend)
    arguments = (*inputs, main.ptr, main.source, main.image, middle.ptr, middle.source, middle.image)
    rows = max(1, PIECE_BYTES // (weight.shape[1] * x.shape[1] * x.element_size()))
    ends = torch.arange(rows, main.num_edges + rows, rows, device=main.ptr.device).clamp(max=main.num_edges)
    stops = sorted({0, len(main.ptr) - 1, *(torch.searchsorted(main.ptr, ends, right=True) - 1).tolist()})
    out = x.new_empty(main.num_edges, mix.shape[0])
    for first, last in itertools.pairwise(stops):
        summed = ops_of("native").quadruplet_part(*arguments, collinear_eps(x.dtype), main.max_degree, first, last)
        start = int(main.ptr[first])
        out[start : start + len(summed)] = linear(summed, mix, backend=backend)
    return out


def _fake(x: Tensor, _filters: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(weight.shape[0], weight.shape[1] * x.shape[1])


def _flops(x: Tensor, filters: Tensor, weight: Tensor, *rest: Any, degree: Tensor | None = None) -> tuple[int, int]:
    _v, _v_middle, ptr, _source, _image, middle_ptr, middle_source, *_ = rest
    inputs = (ptr.diff() if degree is None else degree)[middle_source]
    outputs = ptr.diff().repeat_interleave(middle_ptr.diff())
    spherical, channels = filters.shape[1], x.shape[1]
    sums = int((inputs * outputs).sum()) + spherical * int(outputs.sum()) + int(inputs.sum())
    one = 2 * spherical * channels
    return one * sums, one * weight.shape[0] * weight.shape[1] * spherical


def _fake_part(x: Tensor, _filters: Tensor, weight: Tensor, *_: object) -> Tensor:
    rows = torch.library.get_ctx().new_dynamic_size()  # how many edges the atoms have is in ptr
    return x.new_empty(rows, weight.shape[1] * x.shape[1])


def _flops_part(*arguments: Any, out_val: Tensor) -> int:
    *tensors, _eps, _max_degree, first, last = arguments
    x, filters, weight, *vectors, ptr, source, image, middle_ptr, middle_source, middle_image = tensors
    inside = slice(first, last + 1)
    some = middle_ptr[inside]
    edges = (ptr[inside], source, image, some - some[0], middle_source[some[0] : some[-1]], middle_image)
    return sum(_flops(x, filters, weight[: len(out_val)], *vectors, *edges, degree=ptr.diff()))


@when_loaded
def _register(namespace: str) -> None:
    register_nonlinear(f"{namespace}::quadruplet", 5, _fake, _flops)
    if namespace == NAMESPACES["native"]:
        register_shape(f"{namespace}::quadruplet_part", _fake_part)
        register_flop_formula([torch.ops.ejmp.quadruplet_part], get_raw=True)(_flops_part)
