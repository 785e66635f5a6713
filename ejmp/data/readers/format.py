"""A dataset format: how a source divides into parts, and how a part is read.

A source is a dataset in its original form: a file or a folder.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ejmp.data.readers.options import ReadOptions, Survey
from ejmp.graph.structure import Structure

SLICE = 1000
"""Most structures in a part that is a slice of something larger."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a source that is read in one go: a file, a group of an HDF5 file, a slice of an array."""

    name: str
    """Name that is unique in the source, by which `Format.read` finds the part again in another process."""
    count: int
    """Number of structures it yields."""
    split: str | None = None
    """Split it belongs to; None if the source does not say."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One dataset format, as two functions.

    The structures of a source are numbered through its parts in order; split rules choose among these numbers.
    """

    parts: Callable[[Path], Sequence[Part]]
    """Function that lists the parts of a source, always in the same order."""
    read: Callable[[Path, Part], Iterator[Structure]]
    """Function that yields the structures of a part in order, in eV and A."""
    configure: Callable[[ReadOptions, Survey], "Format"] | None = None
    """Function that returns the format as options want it, reporting what it finds; None: the labels are fixed."""


def slices(prefix: str, total: int, size: int = SLICE) -> list[Part]:
    """Divide a sequence of structures into parts called `prefix:start-stop`."""
    starts = range(0, total, max(1, min(size, SLICE)))
    return [
        Part(name=f"{prefix}:{start}-{min(start + starts.step, total)}", count=min(starts.step, total - start))
        for start in starts
    ]


def parse_slice(part: Part) -> tuple[str, int, int]:
    """Return prefix, start and stop of a part that `slices` made."""
    prefix, _, span = part.name.rpartition(":")
    start, _, stop = span.partition("-")
    return prefix, int(start), int(stop)
