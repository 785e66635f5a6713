"""Sum edges into atoms, through a filter or not, in a fixed order and without atomics.

atom_sum: out[n, c] = sum of m[e, c] filters[e, c] over the edges e into n. Reads m and filters once, writes out once:
8 E M + 4 N M bytes in float32.
edge_sum: out[n, c] = sum of x[e, c] over the rows e of n: 4 E M + 4 N M bytes in float32.

Sums are in float32 also for bfloat16 inputs. Specification: `specification.atom_sum`, `specification.segment_sum`.
Source: GemNet-OC (arXiv 2204.02782), atom update.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd
from torch.utils.flop_counter import register_flop_formula

from ejmp_kernels.dense import Filter, made
from ejmp_kernels.registry import (
    LOW,
    NAMESPACES,
    Backend,
    by_atom,
    is_recorded,
    like,
    ops_of,
    register_bilinear,
    register_shape,
    when_loaded,
    wide,
)


def atom_sum(m: Tensor, filters: Tensor | Filter, ptr: Tensor, *, backend: Backend = "native") -> Tensor:
    """Sum edges times their filter into atoms.

    Args:
        m: [E, M], float32, float64 or bfloat16.
        filters: [E, M] of the same type, or what they are the product of; in 16 bits Triton makes them on the way,
            where no derivatives are asked for.
        ptr: [N + 1] int64, CSR pointers of the edges over targets.
        backend: whose kernels to use.

    Returns:
        [N, M], float64 if m is, or else float32.

    Raises:
        ValueError: if shapes, types or devices do not fit together.
    """
    if isinstance(filters, Filter) and backend == "triton" and m.dtype in LOW and not is_recorded(m, *filters):
        return ops_of(backend).atom_sum_filtered(m, *filters, ptr)
    return ops_of(backend).atom_sum(m, made(filters, backend), ptr)


def edge_sum(x: Tensor, ptr: Tensor, *, backend: Backend = "native") -> Tensor:
    """Sum the rows that belong to one atom, or to anything else that consecutive rows can belong to.

    Args:
        x: [E, M], float32, float64 or bfloat16.
        ptr: [N + 1] int64, CSR pointers of the rows.
        backend: whose kernels to use.

    Returns:
        [N, M], float64 if x is, or else float32.

    Raises:
        ValueError: if shapes, types or devices do not fit together.
    """
    return ops_of(backend).edge_sum(x, None, ptr)


@when_loaded
def _register(namespace: str) -> None:
    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        x, order, ptr = inputs
        ctx.num_edges, ctx.dtype, ctx.ordered = x.shape[0], x.dtype, order is not None
        ctx.save_for_backward(*([ptr] if order is None else [ptr, order]))

    def backward(ctx: Any, grad: Tensor) -> tuple:
        ptr, *order = ctx.saved_tensors
        rows = grad.to(ctx.dtype).index_select(0, by_atom(ptr, ctx.num_edges))
        if ctx.ordered:
            rows = like(rows)[0].index_copy(0, order[0], rows)
        return (rows, None, None)

    register_bilinear(f"{namespace}::atom_sum", lambda m, filters, ptr: wide(m, ptr.shape[0] - 1))
    if namespace == NAMESPACES["triton"]:
        register_shape(f"{namespace}::atom_sum_filtered", lambda m, basis, filters, ptr: wide(m, ptr.shape[0] - 1))
        register_flop_formula([torch.ops.ejmp_triton.atom_sum_filtered])(
            lambda m, basis, *_, out_shape=None: 2 * m[0] * m[1] * basis[1]
        )
    register_shape(f"{namespace}::edge_sum", lambda x, order, ptr: wide(x, ptr.shape[0] - 1))
    register_autograd(f"{namespace}::edge_sum", backward, setup_context=setup)
