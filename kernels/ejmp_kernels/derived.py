"""What is made of a parameter and held until it changes: copies in 16 bits, layouts for 8-bit products.

A change is noticed by the parameter's version and place in memory. An optimizer that writes through another view of the
same memory, as DeepSpeed's do, changes neither; so what is held must be dropped between training and evaluation
(`forget`), which `JMP.train` and `JMP.eval` do.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")

_held: MutableMapping[Tensor, tuple[tuple[int, int], dict[Hashable, Any]]] = WeakTensorKeyDictionary()
"""By parameter: its version and place in memory, and by key what was made of it."""


def derived(parameter: Tensor, key: Hashable, make: Callable[[], Made]) -> Made:
    """Return what `make` makes of a parameter, which is called again only when the parameter has changed.

    Args:
        parameter: what it is made of; what was made is dropped with it. Of tensors made in inference mode no change of
            their values is noticed, because they do not count them.
        key: tells what is made of one parameter apart.
        make: makes it; its result must not be part of a graph of derivatives.
    """
    state = (_version(parameter), parameter.data_ptr())
    held = _held.get(parameter)
    if held is None or held[0] != state:
        held = _held[parameter] = (state, {})
    if key not in held[1]:
        held[1][key] = make()
    return held[1][key]


_times_forgotten = 0
"""How often something was dropped, which also says that recorded copies may be out of date."""


def forget(parameters: Iterable[Tensor]) -> None:
    """Drop what is held of parameters, and have recorded copies made anew."""
    global _times_forgotten  # noqa: PLW0603
    _times_forgotten += 1
    for parameter in parameters:
        _held.pop(parameter, None)


class RecordedCopies:
    """Copies of weights in a low type that recorded work, as a CUDA graph, reads at fixed places in memory.

    They are made while the work warms up, in a `with` of `used()`, and brought up to date by `refresh()` before it is
    replayed; so a replay does not cast the weights again.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._states: dict[tuple, tuple[int, int]] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Have `lowered` return these copies."""
        token = _recorded_copies.set(self)
        try:
            yield
        finally:
            _recorded_copies.reset(token)

    def of(self, parameter: Tensor, dtype: torch.dtype, first: int) -> Tensor:
        """Return the copy of a weight's columns from `first` on, and make it if there is none."""
        key = (parameter.data_ptr(), dtype, first)
        if key not in self._copies:
            with torch.inference_mode(mode=False):  # it is written to later
                columns = parameter.detach()[:, first:]
                self._copies[key] = (columns, columns.to(dtype))
            self._states[key] = _state(columns)
        return self._copies[key][1]

    def refresh(self) -> None:
        """Bring all copies up to date."""
        for key, (columns, copy) in self._copies.items():
            state = _state(columns)
            if state != self._states[key]:
                copy.copy_(columns)
                self._states[key] = state


def _state(columns: Tensor) -> tuple[int, int]:
    return _version(columns), _times_forgotten


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version  # noqa: SLF001 - there is no public name


_recorded_copies: ContextVar[RecordedCopies | None] = ContextVar("recorded copies", default=None)


def lowered(parameter: Tensor, dtype: torch.dtype, first: int = 0) -> Tensor:
    """Return a weight's columns from `first` on in a low type, as a copy that is held unless derivatives are recorded.

    A model in 16 bits thus needs half as much memory again for its weights, and saves to cast each of them in each
    pass. Where gradients go to the weight, and in `torch.compile`, it is cast anew; so it is in the capture of a CUDA
    graph, but for one that has `RecordedCopies`.

    Args:
        parameter: [out, in].
        dtype: float16 or bfloat16.
        first: number of columns to leave out.

    Returns:
        [out, in - first].
    """
    recorded = torch.is_grad_enabled() and parameter.requires_grad
    compiling = torch.compiler.is_compiling()
    copies = None if recorded or compiling else _recorded_copies.get()
    if copies is not None:
        return copies.of(parameter, dtype, first)
    traced = compiling or (parameter.is_cuda and torch.cuda.is_current_stream_capturing())
    if recorded and not traced:
        forget([parameter])  # somebody trains it
    if recorded or traced:
        return parameter[:, first:].to(dtype)

    def make() -> Tensor:
        with torch.inference_mode(mode=False):  # it may be used later where derivatives are recorded
            return parameter.detach()[:, first:].to(dtype)

    return derived(parameter, (dtype, first), make)
