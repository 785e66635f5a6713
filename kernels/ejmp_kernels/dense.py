"""A linear map and what comes after it: activation, filter, residual and scalings in the product's epilogue.

out = scale ScaledSiLU(x weight^T) factor + add_scale add. The native backend makes the product and a pass after it, and
where derivatives will be asked for they are one function to autograd, which keeps less for a second derivative
(csrc/bindings/products.cpp). Triton's makes product and pass there, whose derivatives need the product itself;
elsewhere it has one op, 2 m n k FLOP, that makes both at once where that is faster. Specification:
`specification.activate` of torch.nn.functional.linear.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd
from torch.utils.flop_counter import register_flop_formula

from ejmp_kernels.activation import SCALED_SILU, activate, swap_add
from ejmp_kernels.linear import linear
from ejmp_kernels.registry import NAMESPACES, Backend, ops_of, register_shape, when_loaded


def linear_activate(
    x: Tensor,
    weight: Tensor,
    factor: Tensor | None = None,
    add: Tensor | None = None,
    *,
    scale: float = 1.0,
    add_scale: float = 1.0,
    backend: Backend = "native",
) -> Tensor:
    """Return scale * ScaledSiLU(x weight^T) * factor + add_scale * add.

    Args:
        x: [rows, in].
        weight: [out, in], of the same type.
        factor: [rows, out] or None for one.
        add: [rows, out] or None for zero; the result has its type.
        scale: factor of the activation.
        add_scale: factor of `add`.
        backend: whose kernels to use.

    Returns:
        [rows, out].

    Raises:
        ValueError: if shapes, types or devices do not fit together.
    """
    dtype = x.dtype if add is None else add.dtype  # the atoms' residual stream stays in float32
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, factor, add))
    one_op = recorded if backend == "native" else not recorded
    if one_op and dtype == x.dtype:
        return ops_of(backend).linear_activate(x, weight, factor, add, scale * SCALED_SILU, add_scale)
    out = linear(x, weight, backend=backend).to(dtype)
    return activate(out, factor, add, scale=scale, add_scale=add_scale, in_place=True, backend=backend)


def linear_swap_add(
    x: Tensor,
    weight: Tensor,
    swap: Tensor,
    add: Tensor | None = None,
    *,
    scale: float = 1.0,
    backend: Backend = "native",
) -> Tensor:
    """Return `swap_add` of x weight^T: messages up-projected to edges and counter-edges, and added.

    On a CPU, where no derivatives are asked for, the product [E, 2 M] is never a whole in memory.

    Args:
        x: [E, in].
        weight: [2 M, in], the part for edges before that for counter-edges; of the same type.
        swap: [E] int64, the counter-edge of each edge; it undoes itself.
        add: [E, M] or None.
        scale: factor of the sum of both activated messages.
        backend: whose kernels to use.

    Returns:
        [E, M].

    Raises:
        ValueError: if shapes, types or devices do not fit together.
    """
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, add))
    if backend == "native" and x.device.type == "cpu" and not recorded and not torch.compiler.is_compiling():
        return ops_of(backend).linear_swap_add(x, weight, swap, add, scale * SCALED_SILU)
    return swap_add(linear(x, weight, backend=backend), swap, add, scale=scale, backend=backend)


def _flops(x: torch.Size, weight: torch.Size, *_: Any, out_shape: Any = None) -> int:
    return 2 * x[0] * x[1] * weight[0]


@when_loaded
def _register(namespace: str) -> None:
    if namespace == NAMESPACES["native"]:
        register_shape(f"{namespace}::linear_swap_add", lambda x, w, *_: x.new_empty(x.shape[0], w.shape[0] // 2))
        register_flop_formula([torch.ops.ejmp.linear_swap_add])(_flops)
    if namespace != NAMESPACES["triton"]:
        return
    ops = getattr(torch.ops, namespace)

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        x, weight, factor, add, ctx.alpha, ctx.beta = inputs
        ctx.has_add = add is not None
        ctx.save_for_backward(x, weight, *([] if factor is None else [factor]))

    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, weight, *factor = ctx.saved_tensors
        z = torch.nn.functional.linear(x, weight)
        to_z, to_factor = ops.activate_backward(grad.contiguous(), z, factor[0] if factor else None, ctx.alpha)
        to_x = to_z @ weight if ctx.needs_input_grad[0] else None
        to_weight = to_z.mT @ x if ctx.needs_input_grad[1] else None
        to_add = grad * ctx.beta if ctx.has_add and ctx.needs_input_grad[3] else None
        return to_x, to_weight, to_factor if factor else None, to_add, None, None

    name = f"{namespace}::linear_activate"
    register_shape(name, lambda x, weight, factor, add, alpha, beta: x.new_empty(x.shape[0], weight.shape[0]))
    register_autograd(name, backward, setup_context=setup)
    register_flop_formula([ops.linear_activate])(_flops)
