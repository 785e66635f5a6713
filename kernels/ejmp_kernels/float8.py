"""Linear maps in 8-bit floating point, for inference on GPUs whose tensor cores multiply it twice as fast as 16 bits.

out[r, o] = s[r] t[o] sum_i q[r, i] p[o, i] with q = x / s rounded to e4m3 (arXiv 2209.05433), s[r] = max |x[r]| / 448,
and t and p likewise of the weight; sums are in float32. The product is `torch._scaled_mm`, scaled by rows and columns.
On the CPU torch only emulates it, which is what tests compare. No op here has a derivative.
"""

import torch
from torch import Tensor

from ejmp_kernels.derived import derived
from ejmp_kernels.quantized import QuantizedRows

TYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(TYPE).max
CAPABILITY = (8, 9)
"""Ada and newer."""
MULTIPLE = 16
"""What the widths of a weight must be multiples of."""


def why_unavailable(device: torch.device) -> str | None:
    """Return why a device does not multiply 8-bit floating point fast, or None if it does."""
    if device.type != "cuda":
        return f"the model is on {device}"
    found = torch.cuda.get_device_capability(device)
    return None if found >= CAPABILITY else f"{device} has compute capability {found[0]}.{found[1]}"


def quantize_rows(x: Tensor) -> QuantizedRows:
    """Return a matrix [rows, columns] in 8 bits, row by row; a row that is not finite has NaN as scale."""
    x = x.float()
    scales = x.abs().amax(dim=1, keepdim=True) / LARGEST if x.shape[1] else x.new_zeros(len(x), 1)
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    steps = torch.where(scales == 0, 1.0, scales)
    return QuantizedRows((x / steps).to(TYPE), scales[:, 0])


def fits(weight: Tensor, first: int = 0) -> bool:
    """Return whether a weight [out, in], without its first columns, has widths that 8-bit products have."""
    return not (weight.shape[0] % MULTIPLE or (weight.shape[1] - first) % MULTIPLE)


def packed(weight: Tensor, first: int = 0) -> QuantizedRows:
    """Return a parameter's columns from `first` on, [out, in - first], in 8 bits; made again only when it has changed.

    Args:
        weight: [out, in]; the parameter itself, not a part of it.
        first: number of columns to leave out.

    Raises:
        ValueError: if a width is no multiple of 16.
    """
    if not fits(weight, first):
        raise ValueError(f"packed: weight must be [16 n, 16 m] in 8 bits, got {list(weight.shape)} without {first}")

    def make() -> QuantizedRows:
        with torch.inference_mode(mode=False):
            return quantize_rows(weight.detach()[:, first:].contiguous())

    return derived(weight, ("float8", first), make)


def linear(x: QuantizedRows, weight: QuantizedRows, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the product [rows, out] of x [rows, in] and weight [out, in]; 2 rows in out FLOP, which torch counts."""
    if not len(x.values):
        return x.scales.new_empty(0, len(weight.values), dtype=dtype)
    return torch.ops.aten._scaled_mm(  # noqa: SLF001 - there is no public name
        x.values, weight.values.mT, scale_a=x.scales[:, None], scale_b=weight.scales[None], out_dtype=dtype
    )
