"""What every op needs beside its kernels: definition in torch, checks of arguments, settings of a launch."""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.library import Library

from ejmp_kernels.registry import LOW, check_storage

LIBRARY = Library("ejmp_triton", "DEF")
REAL = (torch.float32, torch.float64, *LOW)
MOST_SPHERICAL = 16
"""The largest number of spherical functions."""
MOST_BASIS = 128
"""The largest number of columns of a basis of which filters are made, whose product is one step."""
MOST_COLUMNS = 1 << 20
"""The largest size of an axis that does not count rows."""
MOST_IMAGE = 1 << 60
"""The largest packed cell offset."""
OVERRIDES: dict[str, dict[str, Any]] = {}
"""Settings by kernel that take precedence over those of the table; for `overriding`."""


@contextmanager
def overriding(kernel: str, settings: dict[str, Any]) -> Iterator[None]:
    """Have settings of a kernel take precedence over those of the table for a while, to measure them."""
    OVERRIDES[kernel] = settings
    try:
        yield
    finally:
        del OVERRIDES[kernel]


def define(schema: str) -> Callable[[Callable], Callable]:
    """Define an op by its schema, e.g. "f(Tensor x) -> Tensor", and the decorated function as its implementation."""

    def decorate(function: Callable) -> Callable:
        LIBRARY.define(schema)
        name, arguments = re.fullmatch(r"(\w+)\((.*)\) -> .*", schema).groups()
        words = [text.split() for text in arguments.split(", ")]
        needed = [
            (i, argument) for i, (kind, argument, *_) in enumerate(words) if re.fullmatch(r"Tensor(\(.*\))?", kind)
        ]

        @functools.wraps(function)
        def checked(*given: Any) -> Any:
            for i, argument in needed:
                if given[i] is None:  # which torch lets through
                    raise ValueError(f"{name}: {argument} must be a tensor, got none")
            return function(*given)

        for device in ("CUDA", "CPU"):  # the latter for Triton's interpreter
            LIBRARY.impl(name, checked, device)
        return function

    return decorate


def on_device(x: Tensor) -> AbstractContextManager:
    """Return a context that launches on a tensor's device; entering one takes longer than to ask whether it must."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def packed(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Return tensors, of which those that are not contiguous are copied."""
    return [x if x is None or x.is_contiguous() else x.contiguous() for x in tensors]


def check_arguments(
    op: str, device: torch.device, **expected: tuple[Tensor, tuple[torch.dtype, ...], tuple[int, ...]]
) -> None:
    """Check arguments of an op. Values of indices are for `check_ptr` and `check_ids`.

    Args:
        op: name of the op.
        device: where all arguments must be.
        expected: (tensor, allowed types, shape) by name of the argument.

    Raises:
        ValueError: naming the op, the argument, what was expected and what came.
    """
    for name, (x, dtypes, shape) in expected.items():
        if x.dtype not in dtypes:
            wanted = " or ".join(str(t).removeprefix("torch.") for t in dtypes)
            raise ValueError(f"{op}: {name} must be {wanted}, got {str(x.dtype).removeprefix('torch.')}")
        if tuple(x.shape) != tuple(shape):
            raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(x.shape)}")
        if x.device != device:
            raise ValueError(f"{op}: {name} must be on {device}, got {x.device}")
        if max(x.shape[1:], default=0) > MOST_COLUMNS:
            raise ValueError(f"{op}: {name} must have at most {MOST_COLUMNS} columns, got shape {list(x.shape)}")
        check_storage(op, name, x)


def check_rows(op: str, name: str, x: Tensor, axes: int) -> int:
    """Return how many rows an argument has.

    Raises:
        ValueError: if it has another number of axes.
    """
    if x.ndim != axes:
        raise ValueError(f"{op}: {name} must have {axes} axes, got shape {list(x.shape)}")
    return x.shape[0]


def check_ptr(op: str, name: str, ptr: Tensor, num_edges: int) -> None:
    """Check, in the interpreter, that CSR pointers rise from zero to the number of edges.

    On a GPU no values are looked at, as that would wait for it.

    Raises:
        ValueError: if they do not.
    """
    if not ptr.is_cuda and (ptr[0] != 0 or ptr[-1] != num_edges or (ptr.diff() < 0).any()):
        raise ValueError(f"{op}: {name} must rise from 0 to {num_edges}")


def check_ids(op: str, name: str, ids: Tensor, limit: int) -> None:
    """Check, in the interpreter, that indices are in 0..limit - 1.

    Raises:
        ValueError: if one is not.
    """
    if not ids.is_cuda and ids.numel() and not (ids.min() >= 0 and ids.max() < limit):
        raise ValueError(f"{op}: {name} must be in 0..{limit - 1}, got {ids.min()} to {ids.max()}")


def check_image(op: str, name: str, image: Tensor) -> None:
    """Check, in the interpreter, that packed cell offsets are so small that their sums do not overflow.

    Raises:
        ValueError: if one is not.
    """
    if not image.is_cuda and image.numel() and not (image.min() >= -MOST_IMAGE and image.max() <= MOST_IMAGE):
        raise ValueError(f"{op}: {name} must be in {-MOST_IMAGE}..{MOST_IMAGE}, got {image.min()} to {image.max()}")


def check_swap(op: str, swap: Tensor) -> None:
    """Check, in the interpreter, that the counter-edges of counter-edges are the edges themselves.

    Raises:
        ValueError: if they are not.
    """
    check_ids(op, "swap", swap, len(swap))
    if not swap.is_cuda and not torch.equal(swap[swap], torch.arange(len(swap))):
        raise ValueError(f"{op}: swap must undo itself: swap[swap[e]] = e")


def check_directions(op: str, names: Sequence[str], along: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Check the directions of a second backward, which are like the inputs.

    Raises:
        ValueError: if one is not.
    """
    for name, u, x in zip(names, along, inputs, strict=True):
        check_arguments(op, x.device, **{f"u_{name}": (u, (x.dtype,), tuple(x.shape))})


def sums_dtype(x: Tensor) -> torch.dtype:
    """Return the type of sums and geometry beside features x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def accumulator(x: Tensor) -> tl.dtype:
    """Return Triton's type of the sums beside features x."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def dot_precision(x: Tensor) -> str:
    """Return how matrix products of float32 numbers run beside features x.

    Three TF32 products keep float32's digits; where features have 8 or 11 bits, one is enough.
    """
    if x.dtype == torch.float64:
        return "ieee"
    return "tf32" if x.dtype in LOW else "tf32x3"


def power_of_2(n: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least n and `least`."""
    return max(least, 1 << (max(n, 1) - 1).bit_length())


def config(kernel: str, x: Tensor) -> dict[str, Any]:
    """Return block sizes, num_warps and num_stages of a kernel for the device of x, from the committed table."""
    table = _table(architecture(x.device), str(x.dtype).removeprefix("torch."))
    return table[kernel] | OVERRIDES.get(kernel, {})


@functools.cache
def _table(architecture: str, dtype: str) -> dict[str, dict[str, Any]]:
    """Read configs.json: settings of "default", overridden by those of an architecture, of a type, of both."""
    tables = json.loads(Path(__file__).with_name("configs.json").read_text())
    merged: dict[str, dict[str, Any]] = {}
    for key in ("default", dtype, architecture, f"{architecture} {dtype}"):
        for kernel, settings in tables.get(key, {}).items():
            merged[kernel] = merged.get(kernel, {}) | settings
    return merged


@functools.cache
def architecture(device: torch.device) -> str:
    """Return the section of configs.json that a device's settings are in."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def processors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; in the interpreter a few, so that programs take several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def by_source(source: Tensor, num_atoms: int) -> tuple[Tensor, Tensor]:
    """Return CSR pointers [N + 1] over sources and the edges [E] in that order; equal ones keep theirs."""
    ascending, order = torch.sort(source, stable=True)
    return torch.searchsorted(ascending, torch.arange(num_atoms + 1, device=source.device)), order
