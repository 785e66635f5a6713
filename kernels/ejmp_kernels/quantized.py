"""Linear maps in 8-bit integers, for inference on CPUs whose VNNI instructions multiply these fastest.

The rows of the left factor are scaled by their largest values as they come, the rows of the weight once and for all;
integers are multiplied and added exactly, in 32 bits: out[r, o] = s[r] t[o] sum_i q[r, i] p[o, i] with q = round(x / s)
and s[r] = max |x[r]| / 127, and t and p likewise of the weight. This is symmetric quantisation by row and channel, as
in LLM.int8() (arXiv 2208.07339). The product is oneDNN's, in torch; what comes before and after it is one pass each
(csrc/cpu/quantized.h). No op here has a derivative. Specification: `specification.quantized`.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ejmp_kernels.activation import SCALED_SILU
from ejmp_kernels.derived import derived
from ejmp_kernels.registry import NAMESPACES, ops_of, register_shape, when_loaded

ZERO = 128
"""The byte that stands for zero in the left factor, whose bytes are unsigned."""


@dataclasses.dataclass(frozen=True)
class QuantizedRows:
    """Rows of numbers in 8 bits."""

    values: Tensor
    """[rows, columns] uint8; `ZERO` is zero."""
    scales: Tensor
    """[rows] float32: what one step of the values is worth; NaN for a row that is not finite."""


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight in 8 bits, laid out as oneDNN wants it."""

    packed: Tensor
    scales: Tensor
    """[out] float32."""
    zeros: Tensor
    """[out] int64: nothing is added to the integers."""


def why_unavailable() -> str | None:
    """Return why 8-bit products cannot be had, or are slow, on this processor, or None if they are fast."""
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    if not torch.cpu._is_vnni_supported():  # noqa: SLF001 - there is no public name
        return "this processor has no AVX-512 VNNI instructions"
    return None


def quantize_rows(x: Tensor) -> QuantizedRows:
    """Return a matrix of float32 or bfloat16 in 8 bits, row by row.

    Raises:
        ValueError: for another type, or another number of axes.
    """
    return QuantizedRows(*ops_of("native").quantize_rows(x))


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight [out, in] as integers from -127 to 127, int8, and what one step is worth in each row, [out]."""
    scales = (weight.abs().amax(dim=1) / 127).float()
    steps = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (weight / steps[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def straight_through(x: Tensor) -> Tensor:
    """Return a matrix with each row rounded to what `quantize_rows` keeps of it; its derivative is that of x itself.

    Training with this is training for 8 bits (straight-through estimator, arXiv 1308.3432).
    """
    with torch.no_grad():
        step = x.abs().amax(dim=1, keepdim=True).float() / 127
        rounded = (x / torch.where(step > 0, step, 1.0)).round() * step
    return x + (rounded - x.detach()).to(x.dtype)


def packed(weight: Tensor, first: int = 0) -> QuantizedWeight:
    """Return a parameter's columns from `first` on, [out, in - first], in 8 bits; made again only when it has changed.

    Args:
        weight: [out, in], float32; the parameter itself, not a part of it.
        first: number of columns to leave out.
    """

    def make() -> QuantizedWeight:
        values, scales = quantize_weight(weight.detach()[:, first:])
        layout = torch.ops.onednn.qlinear_prepack(values, None)
        return QuantizedWeight(layout, scales, torch.zeros(len(scales), dtype=torch.int64))

    return derived(weight, first, make)


def unscaled_linear(x: QuantizedRows, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return the product [rows, out] in float32 or bfloat16, but for the rows' scales: row r is to be times scales[r].

    2 rows in out operations, counted by torch's counter.
    """
    if not len(x.values):
        return x.scales.new_empty(0, len(weight.scales), dtype=dtype)
    return torch.ops.onednn.qlinear_pointwise(
        x.values, 1.0, ZERO, weight.packed, weight.scales, weight.zeros, None, 1.0, 0, dtype, "none", [], ""
    )


def linear(x: QuantizedRows, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return the product [rows, out] in float32 or bfloat16."""
    return ops_of("native").scale_rows_(unscaled_linear(x, weight, dtype), x.scales)


def linear_activate(
    x: QuantizedRows,
    weight: QuantizedWeight,
    factor: Tensor | None = None,
    add: Tensor | None = None,
    *,
    scale: float = 1.0,
    add_scale: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return scale * ScaledSiLU(x weight^T) * factor + add_scale * add, [rows, out].

    Args:
        x: [rows, in].
        weight: [out, in].
        factor: [rows, out] or None for one.
        add: [rows, out] or None for zero.
        scale: factor of the activation.
        add_scale: factor of `add`.
        dtype: float32 or bfloat16, the type of the result, of `factor` and of `add`.

    Raises:
        ValueError: if shapes or types do not fit together.
    """
    z = unscaled_linear(x, weight, dtype)
    found = ops_of("native").activate_rows(z, x.scales, factor, add, scale * SCALED_SILU, add_scale, True, False)
    return found[0]


def linear_activate_rows(
    x: QuantizedRows, weight: QuantizedWeight, factor: Tensor | None = None, *, dtype: torch.dtype = torch.bfloat16
) -> QuantizedRows:
    """Return ScaledSiLU(x weight^T) * factor in 8 bits: what is only multiplied again is never written otherwise.

    Arguments and errors are as for `linear_activate`.
    """
    z = unscaled_linear(x, weight, dtype)
    found = ops_of("native").activate_rows(z, x.scales, factor, None, SCALED_SILU, 0.0, False, True)
    return QuantizedRows(*found[1:])


@when_loaded
def _register(namespace: str) -> None:
    if namespace != NAMESPACES["native"]:
        return

    def rows_like(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(x.shape[:1], dtype=torch.float32)

    def activated(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
        keep, quantize = others[-2:]
        return (x.new_empty(x.shape if keep else (0,)), *rows_like(x if quantize else x.new_empty(0)))

    def flops(x: torch.Size, _scale: Any, _zero: Any, weight: torch.Size, *_: Any, out_shape: Any = None) -> int:
        return 2 * x[0] * x[1] * out_shape[1]

    register_shape("ejmp::quantize_rows", rows_like)
    register_shape("ejmp::activate_rows", activated)
    register_shape("ejmp::scale_rows_", lambda x, scale: x)
    register_flop_formula([torch.ops.onednn.qlinear_pointwise])(flops)
