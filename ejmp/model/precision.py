"""The precisions of the linear maps: which there are on a device, and what each means."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import get_args

import torch

from ejmp.model.config import Precision
from ejmp_kernels import availability, float8, quantized

EIGHT_BITS = ("int8", "fp8")
"""Precisions that multiply the dense layers in 8 bits, without derivatives."""
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16} | dict.fromkeys(EIGHT_BITS, torch.bfloat16)
"""The 16-bit type of each precision that has one; of those in 8 bits, of what is not in 8 bits."""


def check_name(precision: Precision) -> Precision:
    """Return the precision if there is one of that name.

    Raises:
        ValueError: if there is not.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision: expected one of {get_args(Precision)}, got {precision!r}")
    return precision


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raise ValueError if a device does not have a precision.

    Raises:
        ValueError: tf32 needs an NVIDIA GPU of compute capability 8.0 or newer, bf16 such a GPU or a CPU, int8 a CPU
            with VNNI, and fp8 an NVIDIA GPU of compute capability 8.9 or newer.
    """
    if precision == "fp8":
        reason = float8.why_unavailable(device)
        if reason is not None:
            raise ValueError(f'precision="fp8" needs CUDA and compute capability 8.9: {reason}')
        return
    if precision == "int8":
        reason = f"the model is on {device}" if device.type != "cpu" else quantized.why_unavailable()
        reason = reason or availability.why_unavailable()
        if reason is not None:
            raise ValueError(f'precision="int8" needs a CPU with AVX-512 VNNI: {reason}')
        return
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if not capable and (precision == "tf32" or (precision == "bf16" and device.type == "cuda")):
        raise ValueError(f'precision="{precision}" needs CUDA and compute capability 8.0, the model is on {device}')


@contextmanager
def tf32_products() -> Iterator[None]:
    """Use TF32 in float32 matrix products on CUDA for a while."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def products(precision: Precision) -> AbstractContextManager[None]:
    """Return the context in which float32 matrix products have a precision.

    No compiler can look into a change of that setting, so the compiled model makes it around what is traced.
    """
    return tf32_products() if precision == "tf32" and not torch.compiler.is_compiling() else nullcontext()
