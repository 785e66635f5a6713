"""Quadruplet aggregation in factorised form: seven sums per pair of edges instead of 49 per quadruplet, and no list.

For quadruplets d->b->a<-c of an output edge e = c->a, a middle edge q = b->a and an input edge d->b, with d != a, b != c,
d != c as images, p = V_e x V_q / |.| and n = V_d x V_q / |.|:

value[q, d, c] = x[d, c] sum_k filter[q, k, c] Y_k(V_q . V_d)
out[e, a, c] = sum_lk weight[e, a, S l + k] sum_q Y_l(V_e . V_q) sum_d Y_k(p . n) value[q, d, c]

The cosine of the dihedral angle is p . n, so the sum over d is a small matrix product per pair (e, q), and l enters once
per pair. Where p or n is shorter than eps (three atoms on a line) it is divided by eps and passes no gradient.

Reads x, filter, weight and the vectors and writes out once: 4 (E C + Q S C + E A S^2 + E A C) bytes in float32. Work:
2 T S C + 2 P S^2 C + 2 E A S^2 C FLOP for P pairs (e, q) and T triples (e, q, d). The backward also keeps the gradients
of the values, one row per pair (q, d), until they are summed by atom b. Specification: `reference.quadruplet`. Source of
the sum: GemNet-OC (arXiv 2204.02782); the dihedral as a product of normals: vector identity.
"""

from torch import Tensor

from ejmp_kernels.angles import collinear_eps
from ejmp_kernels.edges import Edges
from ejmp_kernels.library import load, register_nonlinear


def quadruplet(  # noqa: PLR0913 - three features, two edge sets, one tolerance
    x: Tensor, filters: Tensor, weight: Tensor, main: Edges, middle: Edges, *, eps: float | None = None
) -> Tensor:
    """Sum input edges over quadruplets and contract with the output edge's basis.

    Args:
        x: [E, C], float32 or float64.
        filters: [Q, S, C], of the middle edges: how the angle between input and middle edge scales each channel.
        weight: [E, A, S * S].
        main: the edges that send and receive.
        middle: the Q edges between them, over the same atoms.
        eps: |sin(angle)| under which three atoms are on a line; default: `collinear_eps`.

    Returns:
        [E, A * C], basis-major.

    Raises:
        ValueError: if shapes, types or devices do not fit together, or an index is out of range.
    """
    eps = collinear_eps(x.dtype) if eps is None else eps
    ids = (main.ptr, main.source, main.image, middle.ptr, middle.source, middle.image)
    return _OPS.quadruplet(x, filters, weight, main.vector, middle.vector, *ids, eps)


def _fake(x: Tensor, _filters: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(weight.shape[0], weight.shape[1] * x.shape[1])


def _flops(  # noqa: PLR0913 - the op's own signature
    x: Tensor,
    filters: Tensor,
    weight: Tensor,
    _v: Tensor,
    _v_middle: Tensor,
    ptr: Tensor,
    _source: Tensor,
    _image: Tensor,
    middle_ptr: Tensor,
    middle_source: Tensor,
    *_: object,
) -> int:
    degree = ptr.diff()
    inputs = degree[middle_source]
    outputs = degree.repeat_interleave(middle_ptr.diff())
    spherical, channels = filters.shape[1], x.shape[1]
    sums = int((inputs * outputs).sum()) + spherical * int(outputs.sum()) + int(inputs.sum())
    return 2 * spherical * channels * (sums + weight.shape[0] * weight.shape[1] * spherical)


_OPS = load()
register_nonlinear("quadruplet", 5, _fake, _flops)
