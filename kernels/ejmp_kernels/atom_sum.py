"""Sum edges into atoms through a filter: out[n, c] = sum of m[e, c] filters[e, c] over edges e into n.

Reads m and filters once, writes out once, in a fixed order and without atomics: 8 E M + 4 N M bytes in float32. Sums
are in float32 also for bfloat16 inputs. Specification: `specification.atom_sum`. Source: GemNet-OC (arXiv 2204.02782), atom
update.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from ejmp_kernels.registry import Backend, for_each_backend, like, ops, wide, zeros_for


def atom_sum(m: Tensor, filters: Tensor, ptr: Tensor, *, backend: Backend = "native") -> Tensor:
    """Sum edges times their filter into atoms.

    Args:
        m: [E, M], float32, float64 or bfloat16.
        filters: [E, M] of the same type.
        ptr: [N + 1] int64, CSR pointers of the edges over targets.
        backend: whose kernels.

    Returns:
        [N, M], float64 if m is, or else float32.

    Raises:
        ValueError: if shapes, types or devices do not fit together.
    """
    return ops(backend).atom_sum(m, filters, ptr)


@for_each_backend
def _register(namespace: str) -> None:
    own = getattr(torch.ops, namespace)

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple:
        return (*own.atom_sum_backward(grad, *ctx.saved_tensors), None)

    def double(ctx: Any, u_m: Tensor | None, u_filters: Tensor | None) -> tuple:
        """The op is linear in both inputs, so its gradient's gradient is made of both ops."""
        grad, m, filters, ptr = ctx.saved_tensors
        u_m, u_filters = zeros_for((u_m, u_filters), (m, filters))
        to_grad = own.atom_sum(u_m, filters, ptr) + own.atom_sum(m, u_filters, ptr)
        return (to_grad, *own.atom_sum_backward(grad, u_m, u_filters, ptr), None)

    register_fake(f"{namespace}::atom_sum")(lambda m, filters, ptr: wide(m, ptr.shape[0] - 1))
    register_fake(f"{namespace}::atom_sum_backward")(lambda grad, m, filters, ptr: like(m, filters))
    register_autograd(f"{namespace}::atom_sum", backward, setup_context=setup)
    register_autograd(f"{namespace}::atom_sum_backward", double, setup_context=setup)
