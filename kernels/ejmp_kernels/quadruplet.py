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

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ejmp_kernels.edges import Edges
from ejmp_kernels.linear import linear
from ejmp_kernels.registry import (
    NAMESPACES,
    Backend,
    is_recorded,
    ops_of,
    register_nonlinear,
    register_shape,
    when_loaded,
)
from ejmp_kernels.specification import collinear_eps


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
        weight: [E, A, S * S]; with Triton it may be in the 16-bit type of x, but then has no derivatives.
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
    """Return linear(quadruplet(...), mix); on the CPU without gradients the [E, A * C] sums are never in memory.

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
    if is_recorded(x, filters, weight, main.vector, middle.vector, mix) or not x.is_cpu or backend != "native":
        return linear(quadruplet(x, filters, weight, main, middle, backend=backend), mix, backend=backend)
    ids = (main.ptr, main.source, main.image, middle.ptr, middle.source, middle.image)
    options = (collinear_eps(x.dtype), main.max_degree)
    return ops_of("native").quadruplet_mixed(x, filters, weight, main.vector, middle.vector, *ids, *options, mix)


def _fake(x: Tensor, _filters: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(weight.shape[0], weight.shape[1] * x.shape[1])


def _flops(x: Tensor, filters: Tensor, weight: Tensor, *rest: Any) -> tuple[int, int]:
    _v, _v_middle, ptr, _source, _image, middle_ptr, middle_source, *_ = rest
    degree = ptr.diff()
    inputs = degree[middle_source]
    outputs = degree.repeat_interleave(middle_ptr.diff())
    spherical, channels = filters.shape[1], x.shape[1]
    sums = int((inputs * outputs).sum()) + spherical * int(outputs.sum()) + int(inputs.sum())
    one = 2 * spherical * channels
    return one * sums, one * weight.shape[0] * weight.shape[1] * spherical


def _fake_mixed(x: Tensor, _filters: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(weight.shape[0], rest[-1].shape[0])


def _flops_mixed(*arguments: Any, out_val: Tensor) -> int:
    mix = arguments[-1]
    return sum(_flops(*arguments[:-1])) + 2 * out_val.shape[0] * mix.numel()


@when_loaded
def _register(namespace: str) -> None:
    register_nonlinear(f"{namespace}::quadruplet", 5, _fake, _flops)
    if namespace == NAMESPACES["native"]:
        register_shape(f"{namespace}::quadruplet_mixed", _fake_mixed)
        register_flop_formula([torch.ops.ejmp.quadruplet_mixed], get_raw=True)(_flops_mixed)
