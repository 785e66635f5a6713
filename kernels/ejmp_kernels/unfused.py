"""The ops that have no CUDA kernel, in plain torch for GPUs: passes between products, and radial bases.

Each computes in float32 (float64 for float64) and rounds once. The formulas are those of csrc/cpu/dense.h and
csrc/cpu/radial.h; the tests compare both on the CPU.
"""

import functools

import torch
from torch import Tensor
from torch.library import Library

Terms = tuple[Tensor, Tensor, Tensor]


def real(x: Tensor) -> Tensor:
    """Return x in the type of sums: float64 as it is, or else float32."""
    return x if x.dtype == torch.float64 else x.float()


def silu(x: Tensor) -> Terms:
    """Return x sigmoid(x) and its first two derivatives."""
    x = real(x)
    s = torch.sigmoid(x)
    slope = s * (1 + x * (1 - s))
    return x * s, slope, s * (1 - s) * (2 + x * (1 - 2 * s))


def activate(x: Tensor, factor: Tensor | None, add: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Return alpha silu(x) factor + beta add."""
    out = alpha * silu(x)[0]
    out = out if factor is None else out * factor
    return (out if add is None else out + beta * add).to(x.dtype)


def activate_(x: Tensor, factor: Tensor | None, add: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Overwrite x with `activate`."""
    return x.copy_(activate(x, factor, add, alpha, beta))


def activate_backward(grad: Tensor, x: Tensor, factor: Tensor | None, alpha: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and factor; the second is empty without a factor."""
    value, slope, _ = silu(x)
    grad = alpha * real(grad)
    if factor is None:
        return (grad * slope).to(x.dtype), x.new_empty(0)
    return (grad * slope * factor).to(x.dtype), (grad * value).to(x.dtype)


def activate_double(
    u_x: Tensor, u_factor: Tensor | None, grad: Tensor, x: Tensor, factor: Tensor | None, alpha: float
) -> Terms:
    """Return the gradients of grad, x and factor of the sum of u_x to_x and u_factor to_factor of the backward."""
    value, slope, curvature = silu(x)
    u_x, g = alpha * real(u_x), real(grad)
    if factor is None or u_factor is None:
        return (u_x * slope).to(x.dtype), (g * u_x * curvature).to(x.dtype), x.new_empty(0)
    u_factor = alpha * real(u_factor)
    to_grad = u_x * slope * factor + u_factor * value
    to_x = g * (u_x * curvature * factor + u_factor * slope)
    return to_grad.to(x.dtype), to_x.to(x.dtype), (g * u_x * slope).to(x.dtype)


def swapped_sum(x: Tensor, swap: Tensor) -> Tensor:
    """Return x[e, 0] + x[swap[e], 1], [E, 2 M] -> [E, M]."""
    to_edge, to_counter = x.chunk(2, dim=1)
    return to_edge + to_counter.index_select(0, swap)


def both(grad: Tensor, swap: Tensor) -> Tensor:
    """Return [grad[e], grad[swap[e]]], the transpose of `swapped_sum`, [E, M] -> [E, 2 M]."""
    return torch.cat([grad, grad.index_select(0, swap)], dim=1)


def swap_add(x: Tensor, swap: Tensor, add: Tensor | None, alpha: float) -> Tensor:
    """Return alpha (silu(x[e, 0]) + silu(x[swap[e], 1])) + add[e]."""
    out = alpha * swapped_sum(silu(x)[0], swap)
    return (out if add is None else out + add).to(x.dtype)


def swap_add_backward(grad: Tensor, x: Tensor, swap: Tensor, alpha: float) -> Tensor:
    """Return the gradient of x."""
    return (alpha * both(real(grad), swap) * silu(x)[1]).to(x.dtype)


def swap_add_double(u: Tensor, grad: Tensor, x: Tensor, swap: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of grad and x of the sum of u to_x of the backward."""
    _, slope, curvature = silu(x)
    u = alpha * real(u)
    return swapped_sum(u * slope, swap).to(x.dtype), (both(real(grad), swap) * u * curvature).to(x.dtype)


def gather_add(
    x: Tensor | None, source_rows: Tensor, target_rows: Tensor, source: Tensor, _swap: Tensor, ptr: Tensor
) -> Tensor:
    """Return x[e] + source_rows[source[e]] + target_rows[target of e]."""
    target = torch.repeat_interleave(ptr.diff(), output_size=len(source))
    out = source_rows.index_select(0, source) + target_rows.index_select(0, target)
    return out if x is None else (out + x).to(x.dtype)


def basis(distance: Tensor, offset: Tensor, temps: Tensor, cutoff: float, exponent: int, order: int) -> Tensor:
    """Return the order-th derivative of u(x) exp(-t (x - o)^2) by d = x cutoff, [E, R]; see `radial`."""
    x, p = (distance / cutoff)[:, None], exponent
    a, b, c = -(p + 1) * (p + 2) / 2, p * (p + 2), -p * (p + 1) / 2
    envelopes = (
        1 + x**p * (a + x * (b + x * c)),
        x ** (p - 1) * (p * a + x * ((p + 1) * b + x * (p + 2) * c)),
        x ** (p - 2) * ((p - 1) * p * a + x * (p * (p + 1) * b + x * (p + 1) * (p + 2) * c)),
    )
    u = [torch.where(x < 1, y, 0.0) for y in envelopes]
    y = x - offset
    gauss = torch.exp(-temps * y**2)
    slope = -2 * temps * y
    if order == 0:
        return u[0] * gauss
    if order == 1:
        return (u[1] + u[0] * slope) * gauss / cutoff
    return (u[2] + 2 * u[1] * slope + u[0] * (slope**2 - 2 * temps)) * gauss / cutoff**2


def radial(
    distance: Tensor, offset: Tensor, temps: Tensor, weight: Tensor, cutoff: float, exponent: int, order: int
) -> Tensor:
    """Return basis weight, [E, J]."""
    return basis(distance, offset, temps, cutoff, exponent, order) @ weight


def radial_transposed(
    distance: Tensor, offset: Tensor, temps: Tensor, x: Tensor, cutoff: float, exponent: int, order: int
) -> Tensor:
    """Return basis^T x, [R, J]."""
    return basis(distance, offset, temps, cutoff, exponent, order).mT @ x


OPS = (
    activate, activate_, activate_backward, activate_double, swap_add, swap_add_backward, swap_add_double, gather_add,
    radial, radial_transposed,
)  # fmt: skip
"""Every function of this file that is an op."""


@functools.cache
def register() -> Library:
    """Register the functions of OPS as the CUDA kernels of the ops, once; they last as long as the returned library."""
    library = Library("ejmp", "IMPL")
    for op in OPS:
        library.impl(op.__name__, op, "CUDA")
    return library
