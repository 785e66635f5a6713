"""Load the compiled extension (csrc) if it was built, and say why not otherwise."""

import functools
from pathlib import Path

import torch


@functools.cache
def unavailable(device: str = "cpu") -> str | None:
    """Load the extension once and return None, or return the reason why it cannot be used on a type of device."""
    library = Path(__file__).with_name("_C.so")
    if not library.exists():
        return f"{library.name} was not built (no C++ compiler at install time, or installed with build isolation)"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load with torch {torch.__version__}: {error}"
    if device == "cpu":
        return None
    if device != "cuda":
        return f"there are compiled kernels for cpu and cuda, not for {device}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("ejmp::triplet", "CUDA"):  # noqa: SLF001 - the only way to ask
        return f"{library.name} was built without CUDA (no nvcc at install time, or a torch without CUDA)"
    return None
