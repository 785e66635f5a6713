"""Radial basis functions projected on the fly: out[e, j] = sum_k b_k(distance[e]) weight[k, j].

b_k(d) = u(x) exp(-temps[k] (x - offset[k])^2) with x = d / cutoff and the polynomial envelope u (DimeNet, arXiv
2003.03123), as `specification.gaussian_basis`. The [E, R] basis is never stored, and Gaussians that are zero to
rounding are never summed: about 20 of 128 remain. All projections of one graph that share distances go through one
call, their weights side by side. Writes 4 E J bytes in float32; 2 E R J FLOP as a dense product counts them.

`order` differentiates b by the distance up to twice, which makes the op and its transpose closed under derivatives.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd
from torch.utils.flop_counter import register_flop_formula

from ejmp_kernels.registry import Backend, ops_of, register_shape, when_loaded


def radial(
    distance: Tensor,
    offset: Tensor,
    temps: Tensor,
    weight: Tensor,
    cutoff: float,
    exponent: int,
    *,
    backend: Backend = "native",
) -> Tensor:
    """Evaluate and project the radial basis.

    Args:
        distance: [E], A; float32 or float64, as all others.
        offset: [R], centres in units of the cutoff.
        temps: [R], inverse squared widths.
        weight: [R, J].
        cutoff: where the basis ends, in A.
        exponent: degree of the envelope at the origin, at least 2.
        backend: whose kernels to use.

    Returns:
        [E, J].

    Raises:
        ValueError: if shapes, types or devices do not fit together.
    """
    return ops_of(backend).radial(distance, offset, temps, weight, cutoff, exponent, 0)


@when_loaded
def _register(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:]

    def slope(ctx: Any, weight: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient by distance, [E], where out = b weight and grad is the gradient of out."""
        distance, offset, temps, _ = ctx.saved_tensors
        cutoff, exponent, order = ctx.options
        return (ops.radial(distance, offset, temps, weight, cutoff, exponent, order + 1) * grad).sum(1)

    def backward(ctx: Any, grad: Tensor) -> tuple:
        distance, offset, temps, weight = ctx.saved_tensors
        to_distance = slope(ctx, weight, grad) if ctx.needs_input_grad[0] else None
        to_weight = ops.radial_transposed(distance, offset, temps, grad, *ctx.options)
        return (to_distance, None, None, to_weight, None, None, None)

    def transposed_backward(ctx: Any, grad: Tensor) -> tuple:
        distance, offset, temps, x = ctx.saved_tensors
        to_distance = slope(ctx, grad, x) if ctx.needs_input_grad[0] else None
        return (to_distance, None, None, ops.radial(distance, offset, temps, grad, *ctx.options), None, None, None)

    register_shape(
        f"{namespace}::radial", lambda d, offset, temps, weight, *_: weight.new_empty(d.shape[0], weight.shape[1])
    )
    register_shape(
        f"{namespace}::radial_transposed", lambda d, offset, temps, x, *_: x.new_empty(offset.shape[0], x.shape[1])
    )
    register_autograd(f"{namespace}::radial", backward, setup_context=setup)
    register_autograd(f"{namespace}::radial_transposed", transposed_backward, setup_context=setup)
    register_flop_formula([ops.radial, ops.radial_transposed])(
        lambda d, offset, temps, x, *_, out_shape=None: 2 * d[0] * offset[0] * x[1]
    )
