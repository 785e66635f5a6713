"""The passes between the matrix products of dense layers, each of which reads and writes memory once.

activate(x, factor, add) = scale ScaledSiLU(x) factor + add_scale add, which is an activation, a radial filter, a
residual and a scaling at once; swap_add(x) adds, for each edge, the activated message to the edge and the one to its
counter-edge. ScaledSiLU(x) = silu(x) / 0.6 (GemNet, arXiv 2106.08903). Each array is read or written once: 4 bytes per
element in float32, 2 in bfloat16, which is computed with in float32. Specification: `specification.activate`,
`specification.swap_add`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd

from ejmp_kernels.registry import (
    Backend,
    is_recorded,
    like,
    ops_of,
    refuse_third_derivative,
    register_shape,
    when_loaded,
    zeros_for,
)

SCALED_SILU = 1 / 0.6


def activate(
    x: Tensor,
    factor: Tensor | None = None,
    add: Tensor | None = None,
    *,
    scale: float = 1.0,
    add_scale: float = 1.0,
    in_place: bool = False,
    backend: Backend = "native",
) -> Tensor:
    """Return scale * ScaledSiLU(x) * factor + add_scale * add.

    Args:
        x: any shape; float32, float64 or bfloat16.
        factor: like x, or None for one.
        add: like x, or None for zero.
        scale: factor of the activation.
        add_scale: factor of `add`.
        in_place: overwrite x if no gradient needs it; for the result of a product that nothing else refers to.
        backend: whose kernels to use.

    Raises:
        ValueError: if shapes, types or devices do not fit together.
    """
    in_place = in_place and not is_recorded(x, factor, add) and x.is_contiguous() and not torch.compiler.is_compiling()
    space = ops_of(backend)
    op = space.activate_ if in_place else space.activate
    return op(x, factor, add, scale * SCALED_SILU, add_scale)


def swap_add(
    x: Tensor, swap: Tensor, add: Tensor | None = None, *, scale: float = 1.0, backend: Backend = "native"
) -> Tensor:
    """Return scale * (ScaledSiLU(x[e, 0]) + ScaledSiLU(x[counter-edge of e, 1])) + add[e].

    Args:
        x: [E, 2 M], the messages to edges beside those to counter-edges; float32, float64 or bfloat16.
        swap: [E] int64, the counter-edge of each edge; it undoes itself.
        add: [E, M] or None.
        scale: factor of the sum.
        backend: whose kernels to use.

    Returns:
        [E, M].

    Raises:
        ValueError: if shapes, types or devices do not fit together, or an index is out of range.
    """
    return ops_of(backend).swap_add(x, swap, add, scale * SCALED_SILU)


@when_loaded
def _register_activate(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        x, factor, add, ctx.alpha, ctx.beta = inputs
        ctx.has_add = add is not None
        ctx.save_for_backward(x, *([] if factor is None else [factor]))

    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, *factor = ctx.saved_tensors
        to_x, to_factor = ops.activate_backward(grad.contiguous(), x, factor[0] if factor else None, ctx.alpha)
        to_add = grad * ctx.beta if ctx.has_add and ctx.needs_input_grad[2] else None
        return (to_x, to_factor if factor else None, to_add, None, None)

    def setup_backward(ctx: Any, inputs: tuple, output: Any) -> None:
        grad, x, factor, ctx.alpha = inputs
        ctx.save_for_backward(grad, x, *([] if factor is None else [factor]))

    def double(ctx: Any, u_x: Tensor | None, u_factor: Tensor | None) -> tuple:
        grad, x, *factor = ctx.saved_tensors
        u_x, *u_factors = zeros_for((u_x, u_factor)[: 1 + len(factor)], (x, *factor))
        u_factor, filters = (u_factors[0], factor[0]) if factor else (None, None)
        to_grad, to_x, to_factor = ops.activate_double(u_x, u_factor, grad, x, filters, ctx.alpha)
        return (to_grad, to_x, to_factor if factor else None, None)

    def or_nothing(x: Tensor, factor: Tensor | None) -> Tensor:
        return x.new_empty(0 if factor is None else x.shape)

    register_shape(f"{namespace}::activate", lambda x, factor, add, alpha, beta: torch.empty_like(x))
    register_shape(f"{namespace}::activate_", lambda x, factor, add, alpha, beta: x)
    register_shape(f"{namespace}::activate_backward", lambda grad, x, factor, alpha: (*like(x), or_nothing(x, factor)))
    register_shape(
        f"{namespace}::activate_double", lambda u, v, grad, x, factor, alpha: (*like(x, x), or_nothing(x, factor))
    )
    register_autograd(f"{namespace}::activate", backward, setup_context=setup)
    register_autograd(f"{namespace}::activate_backward", double, setup_context=setup_backward)
    refuse_third_derivative(f"{namespace}::activate_double")


@when_loaded
def _register_swap_add(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        x, swap, add, ctx.alpha = inputs
        ctx.has_add = add is not None
        ctx.save_for_backward(x, swap)

    def backward(ctx: Any, grad: Tensor) -> tuple:
        return (ops.swap_add_backward(grad, *ctx.saved_tensors, ctx.alpha), None, grad if ctx.has_add else None, None)

    def setup_backward(ctx: Any, inputs: tuple, output: Any) -> None:
        *tensors, ctx.alpha = inputs
        ctx.save_for_backward(*tensors)

    def double(ctx: Any, u: Tensor) -> tuple:
        return (*ops.swap_add_double(u, *ctx.saved_tensors, ctx.alpha), None, None)

    register_shape(f"{namespace}::swap_add", lambda x, swap, add, alpha: x.new_empty(x.shape[0], x.shape[1] // 2))
    register_shape(f"{namespace}::swap_add_backward", lambda grad, x, swap, alpha: like(x)[0])
    register_shape(f"{namespace}::swap_add_double", lambda u, grad, x, swap, alpha: like(grad, x))
    register_autograd(f"{namespace}::swap_add", backward, setup_context=setup)
    register_autograd(f"{namespace}::swap_add_backward", double, setup_context=setup_backward)
    refuse_third_derivative(f"{namespace}::swap_add_double")
