"""Triplet aggregation that lists no triplet: attention without a softmax, with seven polynomials as scores.

out[e, a, c] = sum_l weight[e, a, l] sum_k Y_l(v_out[e] . v_in[k]) x[k, c]

over the edges k into the target atom of edge e, except the same image of the same neighbour. It serves edge to edge,
atom to edge and, with `to_atoms`, edge to atom, where the edges e into each atom are summed too.

Reads x, weight, v_out, v_in and writes out once: 4 (E_in (C + 3) + E_out (A S + 3) + E_out A C) bytes in float32. Work:
2 P S C + 2 E_out A S C FLOP for P pairs (e, k). Specification: `specification.triplet`. Source of the sum: GemNet-OC
(arXiv 2204.02782), equations 7 to 9; of the form without a list: the polynomials depend on e and k through one dot
product.
"""

from typing import Any

from torch import Tensor

from ejmp_kernels.edges import Edges
from ejmp_kernels.registry import Backend, ops_of, register_nonlinear, when_loaded


def triplet(
    x: Tensor, weight: Tensor, out: Edges, into: Edges, *, to_atoms: bool = False, backend: Backend = "native"
) -> Tensor:
    """Sum input edges over triplets and contract with the output edge's basis.

    Args:
        x: [E_in, C], float32 or float64.
        weight: [E_out, A, S] of the same type, as all vectors.
        out: the edges that receive.
        into: the edges that send, over the same atoms.
        to_atoms: sum over the receiving edges of each atom.
        backend: whose kernels to use.

    Returns:
        [E_out, A * C], or [N, A * C] with to_atoms; basis-major.

    Raises:
        ValueError: if shapes, types or devices do not fit together, or an index is out of range.
    """
    return ops_of(backend).triplet(
        x, weight, out.vector, into.vector, out.ptr, out.source, out.image, into.ptr, into.source, into.image, to_atoms
    )


def _fake(x: Tensor, weight: Tensor, v_out: Tensor, _v_in: Tensor, out_ptr: Tensor, *rest: Any) -> Tensor:
    *_ids, to_atoms = rest
    rows = out_ptr.shape[0] - 1 if to_atoms else v_out.shape[0]
    return x.new_empty(rows, weight.shape[1] * x.shape[1])


def _flops(x: Tensor, weight: Tensor, *rest: Any) -> tuple[int, int]:
    _v_out, _v_in, out_ptr, _out_source, _out_image, in_ptr, *_ = rest
    pairs = int((out_ptr.diff() * in_ptr.diff()).sum())
    one = 2 * x.shape[1] * weight.shape[2]
    return one * pairs, one * weight.shape[0] * weight.shape[1]


when_loaded(lambda namespace: register_nonlinear(f"{namespace}::triplet", 4, _fake, _flops))
