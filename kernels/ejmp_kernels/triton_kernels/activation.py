"""The passes between matrix products: see `ejmp_kernels.activation`, and `ejmp_kernels.unfused` for the formulas.

activate = alpha silu(x) factor + beta add is a flat pass over blocks of elements: 4 bytes per element and array in
float32. swap_add = alpha (silu(x[e, 0]) + silu(x[swap[e], 1])) + add[e] is one over tiles of edges and channels; it
reads x [E, 2 M] once and writes [E, M]. Scalars are annotated as float64: Triton would pass them in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ejmp_kernels.triton_kernels import launch


@triton.jit
def _read(ptr, place, ok, ACC: tl.constexpr):
    return tl.load(ptr + place, ok, 0.0).to(ACC)


@triton.jit
def _silu(x):
    """Return x sigmoid(x) and its first two derivatives."""
    s = 1.0 / (1.0 + tl.exp(-x))
    return x * s, s * (1.0 + x * (1.0 - s)), s * (1.0 - s) * (2.0 + x * (1.0 - 2.0 * s))


@triton.jit
def _activate_kernel(
    x_ptr, factor, add, out, size, alpha: tl.float64, beta: tl.float64,
    HAS_FACTOR: tl.constexpr, HAS_ADD: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    ok = i < size - start
    value, _slope, _curvature = _silu(_read(x_ptr + start, i, ok, ACC))
    value = value * tl.full((1,), alpha, ACC)
    if HAS_FACTOR:
        value = value * _read(factor + start, i, ok, ACC)
    if HAS_ADD:
        value = value + tl.full((1,), beta, ACC) * _read(add + start, i, ok, ACC)
    tl.store(out + start + i, value, ok)


@triton.jit
def _activate_backward_kernel(
    grad, x_ptr, factor, to_x, to_factor, size, alpha: tl.float64,
    HAS_FACTOR: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    ok = i < size - start
    value, slope, _curvature = _silu(_read(x_ptr + start, i, ok, ACC))
    g = tl.full((1,), alpha, ACC) * _read(grad + start, i, ok, ACC)
    of_x = g * slope
    if HAS_FACTOR:
        of_x = of_x * _read(factor + start, i, ok, ACC)
        tl.store(to_factor + start + i, g * value, ok)
    tl.store(to_x + start + i, of_x, ok)


@triton.jit
def _activate_double_kernel(
    u_x, u_factor, grad, x_ptr, factor, to_grad, to_x, to_factor, size, alpha: tl.float64,
    HAS_FACTOR: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    ok = i < size - start
    value, slope, curvature = _silu(_read(x_ptr + start, i, ok, ACC))
    u = tl.full((1,), alpha, ACC) * _read(u_x + start, i, ok, ACC)
    g = _read(grad + start, i, ok, ACC)
    of_grad, of_x = u * slope, u * curvature
    if HAS_FACTOR:
        f = _read(factor + start, i, ok, ACC)
        v = tl.full((1,), alpha, ACC) * _read(u_factor + start, i, ok, ACC)
        tl.store(to_factor + start + i, g * of_grad, ok)
        of_grad, of_x = of_grad * f + v * value, of_x * f + v * slope
    tl.store(to_grad + start + i, of_grad, ok)
    tl.store(to_x + start + i, g * of_x, ok)


@triton.jit
def _tile(swap, E, M, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return places in [E, M] of a program's edges and of their counter-edges, those in [E, 2 M], and which exist."""
    e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    counter = tl.load(swap + e, e < E, 0)
    ok = (e < E)[:, None] & (c < M)[None, :]
    one, other = e[:, None] * M + c[None, :], counter[:, None] * M + c[None, :]
    return one, other, one + e[:, None] * M, other + counter[:, None] * M, ok


@triton.jit
def _swap_add_kernel(
    x_ptr, swap, add, out, E, M, alpha: tl.float64,
    HAS_ADD: tl.constexpr, ACC: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    one, _other, wide, wide_other, ok = _tile(swap, E, M, BLOCK_E, BLOCK_C)
    to_edge, _slope, _curvature = _silu(_read(x_ptr, wide, ok, ACC))
    to_counter, _slope, _curvature = _silu(_read(x_ptr + M, wide_other, ok, ACC))
    value = tl.full((1, 1), alpha, ACC) * (to_edge + to_counter)
    if HAS_ADD:
        value = value + _read(add, one, ok, ACC)
    tl.store(out + one, value, ok)


@triton.jit
def _swap_add_backward_kernel(
    grad, x_ptr, swap, to_x, E, M, alpha: tl.float64, ACC: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr
):
    one, other, wide, _wide_other, ok = _tile(swap, E, M, BLOCK_E, BLOCK_C)
    _value, slope, _curvature = _silu(_read(x_ptr, wide, ok, ACC))
    tl.store(to_x + wide, tl.full((1, 1), alpha, ACC) * _read(grad, one, ok, ACC) * slope, ok)
    _value, slope, _curvature = _silu(_read(x_ptr + M, wide, ok, ACC))
    tl.store(to_x + M + wide, tl.full((1, 1), alpha, ACC) * _read(grad, other, ok, ACC) * slope, ok)


@triton.jit
def _swap_add_double_kernel(
    u, grad, x_ptr, swap, to_grad, to_x, E, M, alpha: tl.float64,
    ACC: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    one, other, wide, wide_other, ok = _tile(swap, E, M, BLOCK_E, BLOCK_C)
    scale = tl.full((1, 1), alpha, ACC)
    u_edge, u_counter = scale * _read(u, wide, ok, ACC), scale * _read(u + M, wide, ok, ACC)
    _value, slope, curvature = _silu(_read(x_ptr, wide, ok, ACC))
    of_grad = u_edge * slope
    tl.store(to_x + wide, _read(grad, one, ok, ACC) * u_edge * curvature, ok)
    _value, _slope, curvature = _silu(_read(x_ptr + M, wide, ok, ACC))
    tl.store(to_x + M + wide, _read(grad, other, ok, ACC) * u_counter * curvature, ok)
    _value, slope, _curvature = _silu(_read(x_ptr + M, wide_other, ok, ACC))
    tl.store(to_grad + one, of_grad + scale * _read(u + M, wide_other, ok, ACC) * slope, ok)


def _run(
    kernel: triton.JITFunction, *arguments: Tensor | float | None, size: int, like: Tensor, **options: bool
) -> None:
    """Launch a flat pass; None stands for a tensor that is not read, and the size comes after the tensors."""
    settings = launch.config("activate", like)
    tensors = [like if x is None else x for x in arguments if not isinstance(x, float)]
    scalars = [x for x in arguments if isinstance(x, float)]
    if size:
        with launch.on_device(like):
            grid = (triton.cdiv(size, settings["BLOCK"]),)
            kernel[grid](*tensors, size, *scalars, ACC=launch.accumulator(like), **options, **settings)


def _check_like(op: str, x: Tensor, **others: Tensor | None) -> None:
    same = {name: (t, (x.dtype,), tuple(x.shape)) for name, t in others.items() if t is not None}
    launch.check_arguments(op, x.device, x=(x, launch.REAL, tuple(x.shape)), **same)


def _activate_into(
    x: Tensor, factor: Tensor | None, add: Tensor | None, alpha: float, beta: float, out: Tensor
) -> Tensor:
    factor, add = launch.packed((factor, add))
    options = {"HAS_FACTOR": factor is not None, "HAS_ADD": add is not None}
    _run(_activate_kernel, x, factor, add, out, float(alpha), float(beta), size=x.numel(), like=x, **options)
    return out


@launch.define("activate(Tensor x, Tensor? factor, Tensor? add, float alpha, float beta) -> Tensor")
def activate(x: Tensor, factor: Tensor | None, add: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Return alpha silu(x) factor + beta add."""
    _check_like("activate", x, factor=factor, add=add)
    x = x.contiguous()
    return _activate_into(x, factor, add, alpha, beta, x.new_empty(x.shape))


@launch.define("activate_(Tensor(a!) x, Tensor? factor, Tensor? add, float alpha, float beta) -> Tensor(a!)")
def activate_(x: Tensor, factor: Tensor | None, add: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Overwrite x with `activate`."""
    _check_like("activate_", x, factor=factor, add=add)
    if not x.is_contiguous():
        raise ValueError(f"activate_: x must be contiguous, got strides {x.stride()}")
    for name, other in (("factor", factor), ("add", add)):
        apart = x.numel() * x.itemsize  # what is not contiguous is copied before
        if other is not None and other.is_contiguous() and 0 < abs(other.data_ptr() - x.data_ptr()) < apart:
            raise ValueError(f"activate_: {name} must not share a part of the memory of x, which is overwritten")
    return _activate_into(x, factor, add, alpha, beta, x)


@launch.define("activate_backward(Tensor grad, Tensor x, Tensor? factor, float alpha) -> (Tensor, Tensor)")
def activate_backward(grad: Tensor, x: Tensor, factor: Tensor | None, alpha: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and factor; the second is empty without a factor."""
    _check_like("activate_backward", x, grad=grad, factor=factor)
    to_x, to_factor = x.new_empty(x.shape), x.new_empty(0 if factor is None else x.shape)
    arguments = [*launch.packed((grad, x, factor)), to_x, to_factor, float(alpha)]
    _run(_activate_backward_kernel, *arguments, size=x.numel(), like=x, HAS_FACTOR=factor is not None)
    return to_x, to_factor


@launch.define(
    "activate_double(Tensor u_x, Tensor? u_factor, Tensor grad, Tensor x, Tensor? factor, float alpha) -> "
    "(Tensor, Tensor, Tensor)"
)
def activate_double(
    u_x: Tensor, u_factor: Tensor | None, grad: Tensor, x: Tensor, factor: Tensor | None, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of grad, x and factor of the sum of u_x to_x and u_factor to_factor of the backward."""
    if (factor is None) != (u_factor is None):
        raise ValueError("activate_double: u_factor must be given where factor is")
    _check_like("activate_double", x, u_x=u_x, u_factor=u_factor, grad=grad, factor=factor)
    to_factor = x.new_empty(0 if factor is None else x.shape)
    results = (x.new_empty(x.shape), x.new_empty(x.shape), to_factor)
    arguments = [*launch.packed((u_x, u_factor, grad, x, factor)), *results, float(alpha)]
    _run(_activate_double_kernel, *arguments, size=x.numel(), like=x, HAS_FACTOR=factor is not None)
    return results


def _check_swap(op: str, x: Tensor, swap: Tensor, wide: dict[str, Tensor], narrow: dict[str, Tensor | None]) -> None:
    if x.ndim != 2 or x.shape[1] % 2:
        raise ValueError(f"{op}: x must have shape [E, 2 M], got {list(x.shape)}")
    _check_like(op, x, **wide)
    half = (x.shape[0], x.shape[1] // 2)
    others = {name: (t, (x.dtype,), half) for name, t in narrow.items() if t is not None}
    launch.check_arguments(op, x.device, swap=(swap, (torch.int64,), (x.shape[0],)), **others)
    launch.check_swap(op, swap)


def _run_swap(kernel: triton.JITFunction, *tensors: Tensor, x: Tensor, alpha: float, **options: bool) -> None:
    num_edges, width = x.shape[0], x.shape[1] // 2
    settings = launch.config("swap_add", x)
    grid = (triton.cdiv(num_edges, settings["BLOCK_E"]), triton.cdiv(width, settings["BLOCK_C"]))
    if x.numel():
        with launch.on_device(x):
            kernel[grid](*tensors, num_edges, width, float(alpha), ACC=launch.accumulator(x), **options, **settings)


@launch.define("swap_add(Tensor x, Tensor swap, Tensor? add, float alpha) -> Tensor")
def swap_add(x: Tensor, swap: Tensor, add: Tensor | None, alpha: float) -> Tensor:
    """Return alpha (silu(x[e, 0]) + silu(x[swap[e], 1])) + add[e]."""
    _check_swap("swap_add", x, swap, {}, {"add": add})
    x, swap, has_add = x.contiguous(), swap.contiguous(), add is not None
    out = x.new_empty(x.shape[0], x.shape[1] // 2)
    _run_swap(_swap_add_kernel, x, swap, x if add is None else add.contiguous(), out, x=x, alpha=alpha, HAS_ADD=has_add)
    return out


@launch.define("swap_add_backward(Tensor grad, Tensor x, Tensor swap, float alpha) -> Tensor")
def swap_add_backward(grad: Tensor, x: Tensor, swap: Tensor, alpha: float) -> Tensor:
    """Return the gradient of x."""
    _check_swap("swap_add_backward", x, swap, {}, {"grad": grad})
    to_x = x.new_empty(x.shape)
    _run_swap(_swap_add_backward_kernel, *(t.contiguous() for t in (grad, x, swap)), to_x, x=x, alpha=alpha)
    return to_x


@launch.define("swap_add_double(Tensor u, Tensor grad, Tensor x, Tensor swap, float alpha) -> (Tensor, Tensor)")
def swap_add_double(u: Tensor, grad: Tensor, x: Tensor, swap: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of grad and x of the sum of u to_x of the backward."""
    _check_swap("swap_add_double", x, swap, {"u": u}, {"grad": grad})
    to_grad, to_x = x.new_empty(grad.shape), x.new_empty(x.shape)
    _run_swap(_swap_add_double_kernel, *(t.contiguous() for t in (u, grad, x, swap)), to_grad, to_x, x=x, alpha=alpha)
    return to_grad, to_x
