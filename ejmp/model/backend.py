"""Which implementation runs a model: plain torch, the compiled kernels, or Triton."""

import functools
import warnings
from typing import Literal, get_args

import torch

from ejmp_kernels import registry

Kernels = Literal["reference", "native", "triton"]
Backend = Literal["auto", "reference", "native", "triton"]


def why_unavailable(backend: Backend, device: str | None = None, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why a backend cannot run linear maps of a dtype on a type of device, or None if it can."""
    if backend in ("auto", "reference"):
        return None
    reason = registry.why_unavailable(backend, device)
    if reason is None and backend == "native" and device == "cpu" and dtype == torch.float16:
        reason = "the compiled kernels have float32, float64 and bfloat16, not float16"
    return reason


def check_backend(backend: Backend) -> Backend:
    """Return the backend, or raise if this installation does not have it.

    Raises:
        ValueError: if there is no such backend.
        RuntimeError: if it cannot be had here, with the reason.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend: expected one of {get_args(Backend)}, got {backend!r}")
    reason = why_unavailable(backend)
    if reason is not None:
        raise RuntimeError(f'backend="{backend}": {reason}')
    return backend


def candidates(backend: Backend, device: str) -> tuple[Kernels, ...]:
    """Return what may run on a type of device, the fastest first; for "auto" there is always the reference."""
    if backend != "auto":
        return (backend,)
    return ("triton", "native", "reference") if device == "cuda" else ("native", "reference")


@functools.cache
def resolve(backend: Backend, device: str, dtype: torch.dtype) -> Kernels:
    """Return what runs linear maps of a dtype on a type of device; "auto" is the fastest there is. Its ops are loaded.

    Raises:
        RuntimeError: if an explicit backend cannot do it, with the reason.
    """
    reasons = []
    for candidate in candidates(backend, device):
        reason = why_unavailable(candidate, device, dtype)
        if reason is None:
            if candidate != "reference":
                registry.load_backend(candidate)
            if candidate == "reference" and device == "cpu" and reasons:
                warnings.warn(f"ejmp: using plain torch, because {reasons[-1]}", stacklevel=2)
            return candidate
        reasons.append(reason)
    raise RuntimeError(f'backend="{backend}": {reasons[-1]}')
