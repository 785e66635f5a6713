"""Names for the parts of a forward pass, so that a measurement can tell where time and work go.

The executors mark their parts with `region`. It costs nothing that could be measured unless somebody observes, and a
compiler that traces the model does not see it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch


class Observer(Protocol):
    """What is told of every passage from one part of the model to another."""

    def enter(self, name: str) -> None:
        """Note that a region begins, inside those that have begun and not ended."""
        ...

    def leave(self) -> None:
        """Note that the region that began last ends."""
        ...


_observers: list[Observer] = []


def region(name: str) -> AbstractContextManager[None]:
    """Return the context of a part of the model."""
    if torch.compiler.is_compiling() or not _observers:
        return nullcontext()
    return _observed(_observers[-1], name)


@contextmanager
def _observed(observer: Observer, name: str) -> Iterator[None]:
    observer.enter(name)
    try:
        yield
    finally:
        observer.leave()


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Tell an observer of the regions of every forward pass inside this context."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
