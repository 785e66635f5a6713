"""What is made of parameters and held until they change: copies in 16 bits, scaled ones, layouts for 8-bit products.

A change is noticed by the parameter's version and place in memory. An optimizer that writes through another view of the
same memory, as DeepSpeed's do, changes neither; so what is held must be dropped between training and evaluation
(`forget`), which `JMP.train` and `JMP.eval` do.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ejmp_kernels.registry import is_recorded

Made = TypeVar("Made")

_held: MutableMapping[Tensor, dict[Hashable, tuple[Hashable, Any]]] = WeakTensorKeyDictionary()
"""By parameter and key: versions and places in memory of what something was made of, and what was made."""


def derived(parameter: Tensor, key: Hashable, make: Callable[[], Made], *others: Tensor) -> Made:
    """Return what `make` makes of a parameter, which is called again only when the parameter has changed.

    Args:
        parameter: what it is made of; what was made is dropped with it. Of tensors made in inference mode no change of
            their values is noticed, because they do not count them.
        key: tells what is made of one parameter apart.
        make: makes it; its result must not be part of a graph of derivatives.
        others: what it is made of too, whose changes are noticed in the same way.
    """
    state = _places((parameter, *others))
    by_key = _held.setdefault(parameter, {})
    found = by_key.get(key)
    if found is None or found[0] != state:
        found = by_key[key] = (state, make())
    return found[1]


def _places(sources: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((_version(x), x.data_ptr()) for x in sources)


_times_forgotten = 0
"""How often something was dropped, which also says that recorded copies may be out of date."""


def forget(parameters: Iterable[Tensor]) -> None:
    """Drop what is held of parameters, and have recorded copies made anew."""
    global _times_forgotten  # noqa: PLW0603
    _times_forgotten += 1
    for parameter in parameters:
        _held.pop(parameter, None)


class RecordedCopies:
    """What is made of weights and read by recorded work, as a CUDA graph, at fixed places in memory.

    It is made while the work warms up, in a `with` of `used()`, and brought up to date by `refresh()` before it is
    replayed; so a replay does not cast or scale the weights again.
    """

    def __init__(self) -> None:
        self._copies: dict[Hashable, tuple[Callable[[], Tensor], tuple[Tensor, ...], Tensor]] = {}
        self._states: dict[Hashable, Hashable] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Have `held` return these copies."""
        token = _recorded_copies.set(self)
        try:
            yield
        finally:
            _recorded_copies.reset(token)

    def of(self, make: Callable[..., Tensor], sources: tuple[Tensor, ...], options: tuple[Hashable, ...]) -> Tensor:
        """Return what is made, and make it if there is none."""
        key = (make, options, *(x.data_ptr() for x in sources))
        if key not in self._copies:
            sources = tuple(x.detach() for x in sources)

            def again() -> Tensor:
                with torch.inference_mode(mode=False):  # it is written to later
                    return make(*sources, *options)

            made = again()
            shared = any(made.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for x in sources)
            self._copies[key] = (again, sources, made.clone() if shared else made)
            self._states[key] = _state(sources)
        return self._copies[key][2]

    def refresh(self) -> None:
        """Bring all copies up to date."""
        for key, (again, sources, copy) in self._copies.items():
            state = _state(sources)
            if state != self._states[key]:
                copy.copy_(again())
                self._states[key] = state


def _state(sources: Sequence[Tensor]) -> Hashable:
    return (*map(_version, sources), _times_forgotten)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version  # noqa: SLF001 - there is no public name


_recorded_copies: ContextVar[RecordedCopies | None] = ContextVar("recorded copies", default=None)


def held(make: Callable[..., Tensor], sources: tuple[nn.Parameter | Tensor, ...], *options: Hashable) -> Tensor:
    """Return what is made of weights, which is held unless derivatives are recorded, until one of them changes.

    So a model in 16 bits needs half as much memory again for its weights, and saves to cast each of them in each pass;
    one in 32 bits holds those that are scaled or joined, less than a tenth.
    Where gradients go to a weight, and in `torch.compile`, it is made anew; so it is in the capture of a CUDA graph,
    but for one that has `RecordedCopies`.

    Args:
        make: function of the sources and the options alone, the same object in each pass.
        sources: parameters, or buffers after the first.
        options: what else it takes.
    """
    recorded = is_recorded(*sources)
    compiling = torch.compiler.is_compiling()
    copies = None if recorded or compiling else _recorded_copies.get()
    if copies is not None:
        return copies.of(make, sources, options)
    traced = compiling or (sources[0].is_cuda and torch.cuda.is_current_stream_capturing())
    if recorded and not traced:
        forget(sources)  # somebody trains it
    if recorded or traced:
        return make(*sources, *options)

    def anew() -> Tensor:
        with torch.inference_mode(mode=False):  # it may be used later where derivatives are recorded
            return make(*(x.detach() for x in sources), *options)

    return derived(sources[0], (make, options), anew, *sources[1:])


def columns(weight: Tensor, dtype: torch.dtype, first: int = 0) -> Tensor:
    """Return a weight's columns from `first` on in a type, [out, in] to [out, in - first]."""
    return (weight[:, first:] if first else weight).to(dtype)
