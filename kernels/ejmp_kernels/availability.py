"""Whether the compiled extension (csrc) and Triton can be used here, or else why not."""

import functools
import importlib.util
import os
from pathlib import Path

import torch


@functools.cache
def why_unavailable(device: str = "cpu") -> str | None:
    """Load the extension once and return None, or return the reason why it cannot be used on a type of device."""
    extension = Path(__file__).with_name("_C.so")
    if not extension.exists():
        return f"{extension.name} was not built (no C++ compiler at install time, or installed with build isolation)"
    try:
        torch.ops.load_library(str(extension))
    except OSError as error:
        return f"{extension.name} does not load with torch {torch.__version__}: {error}"
    if device == "cpu":
        return None
    if device != "cuda":
        return f"there are compiled kernels for cpu and cuda, not for {device}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("ejmp::triplet", "CUDA"):  # noqa: SLF001 - the only way to ask
        return f"{extension.name} was built without CUDA (no nvcc at install time, or a torch without CUDA)"
    return None


@functools.cache
def why_triton_unavailable(device: str | None = None) -> str | None:
    """Return why Triton's kernels cannot be used, at all or on a type of device, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device is None or interpreted():
        return None
    if device == "cpu":
        return "Triton runs on the CPU in its interpreter only (TRITON_INTERPRET=1 before it is imported; very slow)"
    if device != "cuda" or not torch.cuda.is_available():
        return f"there are Triton kernels for CUDA devices, not for {device}"
    major, minor = torch.cuda.get_device_capability()
    return (
        None if major >= 8 else f"Triton needs compute capability 8.0 for tensor cores, the device has {major}.{minor}"
    )


def interpreted() -> bool:
    """Return whether Triton runs its kernels in Python, on any device, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
