"""Radial basis and a product, without storing the basis: out[e, j] = sum_k b_k(distance[e]) weight[k, j].

b_k(d) = u(x) exp(-temps[k] (x - offset[k])^2), x = d / cutoff, or its first or second derivative by d (`order`); u is
the polynomial envelope. A program forms [BLOCK_E, BLOCK_R] of the basis in registers and multiplies. The transposed op
sums over edges: SPLIT programs per block each take every SPLIT-th tile of edges, and torch adds their sums
[SPLIT, R, J] in a fixed order. Reads distance [E] and weight, writes 4 E J bytes in float32. See `ejmp_kernels.radial`.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ejmp_kernels.triton_kernels import launch

MOST_EXPONENT = 64
"""Largest exponent of the envelope; each is a kernel of its own."""


@triton.jit
def _basis(
    distance, offset, temps, edge, k, E, R, inverse_cutoff,
    EXPONENT: tl.constexpr, ORDER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return a tile [edges, functions] of the basis; what is outside is finite."""
    inverse = tl.full((1, 1), inverse_cutoff, ACC)
    x = tl.load(distance + edge, edge < E, 0.0)[:, None] * inverse
    t = tl.load(temps + k, k < R, 0.0)[None, :]
    y = x - tl.load(offset + k, k < R, 0.0)[None, :]
    a: tl.constexpr = -(EXPONENT + 1) * (EXPONENT + 2) / 2
    b: tl.constexpr = EXPONENT * (EXPONENT + 2)
    c: tl.constexpr = -EXPONENT * (EXPONENT + 1) / 2
    power = x * 0.0 + 1.0
    for _ in tl.static_range(EXPONENT - 2):
        power = power * x
    u = tl.where(x < 1.0, 1.0 + power * x * x * (a + x * (b + x * c)), 0.0)
    slope = -2.0 * t * y
    value = u
    if ORDER > 0:
        p: tl.constexpr = EXPONENT
        u1 = tl.where(x < 1.0, power * x * (p * a + x * ((p + 1) * b + x * ((p + 2) * c))), 0.0)
        value = (u1 + u * slope) * inverse
        if ORDER > 1:
            u2 = power * ((p - 1) * p * a + x * (p * (p + 1) * b + x * ((p + 1) * (p + 2) * c)))
            u2 = tl.where(x < 1.0, u2, 0.0)
            value = (u2 + 2.0 * u1 * slope + u * (slope * slope - 2.0 * t)) * inverse * inverse
    return value * tl.exp(-t * y * y)


@triton.jit
def _radial_kernel(
    distance, offset, temps, weight, out, E, R, J, inverse_cutoff: tl.float64,
    EXPONENT: tl.constexpr, ORDER: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    sums = tl.zeros((BLOCK_E, BLOCK_J), ACC)
    for start in range(0, R, BLOCK_R):
        k = start + tl.arange(0, BLOCK_R)
        basis = _basis(distance, offset, temps, e, k, E, R, inverse_cutoff, EXPONENT, ORDER, ACC)
        w = tl.load(weight + k[:, None] * J + j[None, :], (k < R)[:, None] & (j < J)[None, :], 0.0).to(ACC)
        sums = tl.dot(basis, w, sums, input_precision=DOT, out_dtype=ACC)
    tl.store(out + e[:, None] * J + j[None, :], sums, (e < E)[:, None] & (j < J)[None, :])


@triton.jit
def _transposed_kernel(
    distance, offset, temps, x_ptr, partial, E, R, J, inverse_cutoff: tl.float64,
    EXPONENT: tl.constexpr, ORDER: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.program_id(2) * BLOCK_J + tl.arange(0, BLOCK_J)
    sums = tl.zeros((BLOCK_R, BLOCK_J), ACC)
    for start in range(part * BLOCK_E, E, SPLIT * BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        basis = _basis(distance, offset, temps, e, k, E, R, inverse_cutoff, EXPONENT, ORDER, ACC)
        x = tl.load(x_ptr + e[:, None] * J + j[None, :], (e < E)[:, None] & (j < J)[None, :], 0.0).to(ACC)
        sums = tl.dot(tl.trans(basis), x, sums, input_precision=DOT, out_dtype=ACC)
    tl.store(partial + (part * R + k[:, None]) * J + j[None, :], sums, (k < R)[:, None] & (j < J)[None, :])


def _check_basis(op: str, rows_of: str, *arguments: Tensor, cutoff: float, exponent: int, order: int) -> None:
    distance, offset, temps, x = arguments
    launch.check_rows(op, rows_of, x, 2)
    real, num_edges, num_radial = (launch.sums_dtype(x),), distance.numel(), offset.numel()
    rows = num_radial if rows_of == "weight" else num_edges
    launch.check_arguments(
        op,
        x.device,
        **{rows_of: (x, launch.REAL, (rows, x.shape[1]))},
        distance=(distance, real, (num_edges,)),
        offset=(offset, real, (num_radial,)),
        temps=(temps, real, (num_radial,)),
    )
    if order not in (0, 1, 2):
        raise ValueError(f"{op}: order must be 0, 1 or 2, got {order}")
    if not 2 <= exponent <= MOST_EXPONENT:
        raise ValueError(f"{op}: exponent must be in 2..{MOST_EXPONENT}, got {exponent}")
    if not 0 < cutoff < math.inf:
        raise ValueError(f"{op}: cutoff must be positive, got {cutoff}")


def _options(op: str, x: Tensor, num_radial: int) -> dict:
    """Return settings of a launch; blocks are not larger than the arrays."""
    options = launch.config(op, x) | {"ACC": launch.accumulator(x), "DOT": launch.dot_precision(x)}
    options["BLOCK_R"] = min(options["BLOCK_R"], launch.power_of_2(num_radial, 16))
    options["BLOCK_J"] = min(options["BLOCK_J"], launch.power_of_2(x.shape[1], 16))
    return options


_OPTIONS = "float cutoff, int exponent, int order) -> Tensor"


@launch.define(f"radial(Tensor distance, Tensor offset, Tensor temps, Tensor weight, {_OPTIONS}")
def radial(
    distance: Tensor, offset: Tensor, temps: Tensor, weight: Tensor, cutoff: float, exponent: int, order: int
) -> Tensor:
    """Return basis weight, [E, J], in the type of weight."""
    tensors = (distance, offset, temps, weight)
    _check_basis("radial", "weight", *tensors, cutoff=cutoff, exponent=exponent, order=order)
    (num_radial, width), num_edges = weight.shape, distance.shape[0]
    out = weight.new_empty(num_edges, width)
    options = _options("radial", weight, num_radial)
    arguments = [*(t.contiguous() for t in tensors), out, num_edges, num_radial, width, 1 / cutoff, exponent, order]
    if out.numel():
        with launch.on_device(out):
            grid = (triton.cdiv(num_edges, options["BLOCK_E"]), triton.cdiv(width, options["BLOCK_J"]))
            _radial_kernel[grid](*arguments, **options)
    return out


@launch.define(f"radial_transposed(Tensor distance, Tensor offset, Tensor temps, Tensor x, {_OPTIONS}")
def radial_transposed(
    distance: Tensor, offset: Tensor, temps: Tensor, x: Tensor, cutoff: float, exponent: int, order: int
) -> Tensor:
    """Return basis^T x, [R, J], in the type of x."""
    tensors = (distance, offset, temps, x)
    _check_basis("radial_transposed", "x", *tensors, cutoff=cutoff, exponent=exponent, order=order)
    (num_edges, width), num_radial = x.shape, offset.shape[0]
    options = _options("radial_transposed", x, num_radial)
    partial = x.new_empty(options["SPLIT"], num_radial, width, dtype=launch.sums_dtype(x))
    arguments = [*(t.contiguous() for t in tensors), partial, num_edges, num_radial, width, 1 / cutoff, exponent, order]
    if partial.numel():
        with launch.on_device(partial):
            blocks = triton.cdiv(num_radial, options["BLOCK_R"]), triton.cdiv(width, options["BLOCK_J"])
            _transposed_kernel[(options["SPLIT"], *blocks)](*arguments, **options)
    return partial.sum(0).to(x.dtype)
