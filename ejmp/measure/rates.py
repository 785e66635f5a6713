"""What the machine can do: which precisions it has, and how fast it multiplies matrices and copies memory."""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import get_args

import torch
from torch import Tensor

from ejmp.measure.timing import repeated_seconds
from ejmp.model.config import Precision
from ejmp.model.precision import EIGHT_BITS, LOW_PRECISION, check_precision, products
from ejmp_kernels import float8, gemm, quantized


def precisions_of(device: torch.device) -> list[Precision]:
    """Return the precisions worth measuring on a device: all it has, but not the CPU's slow fp16."""
    found: list[Precision] = []
    for precision in get_args(Precision):
        try:
            check_precision(precision, device)
        except ValueError:
            continue
        if precision != "fp16" or device.type == "cuda":
            found.append(precision)
    return found


def gemm_rates(
    rows: int,
    precisions: Sequence[Precision],
    device: torch.device,
    repeats: int | None = None,
    *,
    sizes: tuple[int, int] = (1024, 1024),
) -> dict[str, float]:
    """Measure the machine's matrix products with every provider at hand, in GFLOP/s.

    torch's float32 product goes to MKL, which is slow on AMD CPUs; the oneDNN in the same torch is often twice as fast.

    Args:
        rows: number of rows of the left factor.
        precisions: precisions to measure, one product each.
        device: where to multiply.
        repeats: number of products whose median counts; by default 3, on CUDA 20.
        sizes: shape of the weight, (out, in); the model's edge layers have (1024, 1024).

    Returns:
        The rates by "PRECISION PROVIDER".
    """
    rates = {}
    width_out, width_in = sizes
    for precision in precisions:
        dtype = LOW_PRECISION.get(precision, torch.float32)
        if precision in EIGHT_BITS:
            provider = "onednn" if precision == "int8" else "torch"
            seconds = repeated_seconds(_eight_bits(precision, rows, sizes, device), device, repeats or 3)
            rates[f"{precision} {provider}"] = 2e-9 * rows * width_out * width_in / statistics.median(seconds)
            continue
        x = torch.randn(rows, width_in, device=device, dtype=dtype)
        w = torch.randn(width_out, width_in, device=device, dtype=dtype)
        providers: dict[str, Callable[..., Tensor]] = {"torch": torch.nn.functional.linear}
        if device.type == "cpu" and precision == "fp32" and torch.backends.mkldnn.is_available():
            providers["onednn"] = lambda x, w: gemm.PROVIDERS["onednn"](x, w.mT)
        for provider, product in providers.items():
            with products(precision):
                call = functools.partial(product, x, w)
                seconds = repeated_seconds(call, device, repeats or (20 if device.type == "cuda" else 3))
            rates[f"{precision} {provider}"] = 2e-9 * rows * width_out * width_in / statistics.median(seconds)
    return rates


def _eight_bits(precision: Precision, rows: int, sizes: tuple[int, int], device: torch.device) -> Callable[[], Tensor]:
    """Return a function that multiplies in 8 bits."""
    weight = torch.randn(sizes, device=device)
    if precision == "fp8":
        floats = float8.quantize_rows(torch.randn(rows, sizes[1], device=device))
        return functools.partial(float8.linear, floats, float8.packed(weight))
    integers = quantized.QuantizedRows(torch.randint(256, (rows, sizes[1]), dtype=torch.uint8), torch.ones(rows))
    return functools.partial(quantized.unscaled_linear, integers, quantized.packed(weight), torch.bfloat16)


def copy_rate(device: torch.device, size: int = 1 << 28, repeats: int = 5) -> float:
    """Measure how fast memory is copied, in GB/s read and written together."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = min(repeated_seconds(lambda: target.copy_(source), device, repeats))
    return 2e-9 * size / seconds
