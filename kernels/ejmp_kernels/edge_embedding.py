"""Gather-add of the edge embedding: out[e] = x[e] + source_rows[source[e]] + target_rows[target[e]].

A linear layer of [h_source, h_target, m] is three: two on atoms, N rows instead of E, and one on edges; this adds them.
Reads x, writes out: 8 E M bytes in float32. Its gradients are the sums of edges into atoms by `sums`: because main
edges are closed under swapping, the edges from an atom are the counter-edges of those into it. Specification:
`specification.gather_add`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd

from ejmp_kernels.registry import Backend, ops_of, register_shape, when_loaded


def gather_add(
    x: Tensor | None,
    source_rows: Tensor,
    target_rows: Tensor,
    source: Tensor,
    swap: Tensor,
    ptr: Tensor,
    *,
    backend: Backend = "native",
) -> Tensor:
    """Add to each edge a row of its source and one of its target.

    Args:
        x: [E, M] or None for zeros; float32, float64 or bfloat16.
        source_rows: [N, M], float32 if x is bfloat16, so that the sum is rounded once.
        target_rows: [N, M], of the same type.
        source: [E] int64.
        swap: [E] int64, the counter-edge of each edge.
        ptr: [N + 1] int64, CSR pointers of the edges over targets.
        backend: whose kernels to use.

    Returns:
        [E, M], like x.

    Raises:
        ValueError: if shapes, types or devices do not fit together, or an index is out of range.
    """
    return ops_of(backend).gather_add(x, source_rows, target_rows, source, swap, ptr)


@when_loaded
def _register(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.has_x = inputs[0] is not None
        ctx.save_for_backward(*inputs[4:])

    def backward(ctx: Any, grad: Tensor) -> tuple:
        swap, ptr = ctx.saved_tensors
        to_source, to_target = ops.edge_sum(grad, swap, ptr), ops.edge_sum(grad, None, ptr)
        return (grad if ctx.has_x else None, to_source, to_target, None, None, None)

    def fake(x: Tensor | None, source_rows: Tensor, target_rows: Tensor, source: Tensor, *_: Tensor) -> Tensor:
        return (source_rows if x is None else x).new_empty(source.shape[0], source_rows.shape[1])

    register_shape(f"{namespace}::gather_add", fake)
    register_autograd(f"{namespace}::gather_add", backward, setup_context=setup)
