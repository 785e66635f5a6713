"""What a dataset format is: how a source divides into parts, and how a part is read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ejmp.graph.structure import Structure


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a source that is read in one go: a file, a group of an HDF5 file, a slice of an array."""

    name: str
    """Unique in the source; what `Format.read` needs to find it again in another process."""
    count: int
    """How many structures it yields."""
    split: str | None = None
    """The split it belongs to, where the source says so."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One dataset format.

    The structures of a source are numbered through its parts in order; that number is what split rules are about.
    """

    parts: Callable[[Path], Sequence[Part]]
    """List a source's parts, always in the same order."""
    read: Callable[[Path, Part], Iterator[Structure]]
    """Yield a part's structures in order, in eV and A."""
