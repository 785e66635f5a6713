"""Which implementation runs a model: plain torch, the compiled kernels, or Triton."""

import functools
import warnings
from typing import Literal, get_args

import torch

from ejmp_kernels import extension

Backend = Literal["auto", "reference", "native", "triton"]


def missing(backend: Backend, device: str = "cpu", dtype: torch.dtype = torch.float32) -> str | None:
    """Return why a backend cannot run linear maps of a dtype on a type of device, or None if it can."""
    if backend in ("auto", "reference"):
        return None
    if backend == "triton":
        return "the Triton kernels are not part of this version"
    reason = extension.unavailable(device)
    if reason is None and device == "cpu" and dtype == torch.float16:
        reason = "the compiled kernels have float32, float64 and bfloat16, not float16"
    return reason


def check(backend: Backend) -> Backend:
    """Return the backend if this installation has it.

    Raises:
        ValueError: if there is no such backend.
        RuntimeError: if it cannot be had here, with the reason.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend: expected one of {get_args(Backend)}, got {backend!r}")
    reason = missing(backend)
    if reason is not None:
        raise RuntimeError(f'backend="{backend}": {reason}')
    return backend


@functools.cache
def resolve(backend: Backend, device: str, dtype: torch.dtype) -> Literal["reference", "native"]:
    """Return what runs linear maps of a dtype on a type of device; "auto" is the fastest there is.

    Raises:
        RuntimeError: if an explicit backend cannot do it, with the reason.
    """
    if backend == "reference":
        return "reference"
    reason = missing("native" if backend == "auto" else backend, device, dtype)
    if reason is None:
        return "native"
    if backend != "auto":
        raise RuntimeError(f'backend="{backend}": {reason}')
    if device == "cpu":
        warnings.warn(f"ejmp: using plain torch, because {reason}", stacklevel=2)
    return "reference"
