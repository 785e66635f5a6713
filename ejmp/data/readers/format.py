"""What a dataset format is: how a source divides into parts, and how a part is read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ejmp.graph.structure import Structure

SLICE = 1000
"""Most structures in a part that is a slice of something larger."""


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


def slices(prefix: str, total: int, size: int = SLICE) -> list[Part]:
    """Return the parts `prefix:start-stop` of a sequence of structures."""
    starts = range(0, total, max(1, min(size, SLICE)))
    return [
        Part(name=f"{prefix}:{start}-{min(start + starts.step, total)}", count=min(starts.step, total - start))
        for start in starts
    ]


def parse_slice(part: Part) -> tuple[str, int, int]:
    """Return what `slices` made a part's name of: prefix, start, stop."""
    prefix, _, span = part.name.rpartition(":")
    start, _, stop = span.partition("-")
    return prefix, int(start), int(stop)
