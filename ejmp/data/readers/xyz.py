"""The frames of an xyz file: each is a line with the number of atoms, a comment, and a line for each atom."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ejmp.data.readers.files import SourceError
from ejmp.data.readers.format import SLICE, Part, parse_slice
from ejmp.limits import check_limit, current_limits, open_regular

AVERAGE = 256
"""How many lines of atoms have as many bytes as the longest line may have."""
BLOCK = 1 << 17
"""Least number of bytes that are read at once."""


def iter_frames(stream: IO[bytes], file: Path, first: int = 0) -> Iterator[str]:
    """Yield the text of each frame: the number of atoms, the comment and the atoms.

    Args:
        stream: where to read, the first byte of a frame next.
        file: what to call it in errors.
        first: number of the first frame.

    Raises:
        SourceError: if a frame has no number of atoms, ends early or is not text.
        LimitError: if it has too many atoms, or a line that is too long.
    """
    for k, (_, frame) in enumerate(_iter_bytes(stream, file, first), first):
        try:
            yield frame.decode()
        except UnicodeDecodeError as error:
            raise SourceError(file, f"frame {k}", "it is not text") from error


def _iter_bytes(stream: IO[bytes], file: Path, first: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield the place of each frame behind the stream's first byte, and its bytes; otherwise as `iter_frames`."""
    k, limits, lines = first, current_limits(), _Lines(stream, file)
    most = limits.line_bytes
    while (line := lines.take(1, most, k)) and (text := line.strip()):
        if not (text.isdigit() and len(text) < 20 and int(text)):
            raise SourceError(file, f"frame {k}", f"expected 1 to {limits.atoms} atoms, got {text[:50]!r}")
        count, place = int(text), lines.place - len(line)
        check_limit(file, "atoms", count, f"atoms in frame {k}")
        rest = lines.take(count + 1, most + count * (most // AVERAGE), k)
        if rest is None or not rest[rest.rfind(b"\n", 0, -1) + 1 :].strip():
            raise SourceError(file, f"frame {k}", "it ends early")
        yield place, line + rest
        k += 1
    if line is not None and lines.any_left():
        raise SourceError(file, f"frame {k}", "expected a number of atoms, got an empty line")


class _Lines:
    """Takes lines from a stream, which is read in blocks."""

    def __init__(self, stream: IO[bytes], file: Path) -> None:
        self.place = 0
        """Number of bytes that were taken."""
        self._stream, self._file = stream, file
        self._most = current_limits().line_bytes
        self._data, self._begin = b"", 0
        self._ends, self._next, self._longest = np.zeros(1, np.int64), 1, 0

    def take(self, count: int, most: int, frame: int) -> bytes | None:
        """Return the next `count` lines, the last of which may lack its end; None if there are fewer.

        Raises:
            LimitError: naming the frame, if they have more than `most` bytes or one is too long.
        """
        while self._next + count > len(self._ends):
            if len(self._data) - self._begin > most:
                self._refuse(max(self._most, AVERAGE * most // count), frame)
            if not self._read():
                return None
        ends = self._ends[self._next - 1 : self._next + count]
        begin, self._begin = self._begin, int(ends[-1])
        if self._longest > self._most and (longest := int(np.diff(ends).max())) > self._most:
            self._refuse(longest, frame)
        if self._begin - begin > most:
            self._refuse(AVERAGE * (self._begin - begin) // count, frame)
        self._next += count
        self.place += self._begin - begin
        return self._data[begin : self._begin]

    def _refuse(self, size: int, frame: int) -> None:
        check_limit(self._file, "line_bytes", max(size, self._most + 1), f"bytes or more in a line of frame {frame}")

    def _read(self) -> bool:
        """Read a block, at least as long as what is left of the last one; return whether there was one."""
        left = self._data[self._begin :]
        block = self._stream.read(max(BLOCK, len(left)))
        if not block and (not left or left.endswith(b"\n")):
            return False
        self._data = left + (block or b"\n")
        self._begin, self._next = 0, 1
        ends = np.flatnonzero(np.frombuffer(self._data, np.uint8) == ord("\n")) + 1
        self._ends = np.concatenate([[0], ends])
        self._longest = int(np.diff(self._ends).max(initial=0))
        return True

    def any_left(self) -> bool:
        """Return whether there is more than white space in what follows."""
        return bool(self._data[self._begin :].strip() or self._stream.read(BLOCK).strip())


def xyz_parts(file: Path) -> list[Part]:
    """Divide an xyz file into parts `<file>@<byte>:<start>-<stop>`, whose frames are found without a search.

    Raises:
        SourceError: if a frame has no number of atoms, or ends early.
    """
    offsets, count = [], 0
    with open_regular(file) as lines:
        for at, _ in _iter_bytes(lines, file):
            if count % SLICE == 0:
                offsets.append(at)
            count += 1
    check_limit(file, "frames", count, "frames")
    if not count:
        raise SourceError(file, "", "no frames")
    stops = [min(start + SLICE, count) for start in range(0, count, SLICE)]
    return [
        Part(name=f"{file.name}@{at}:{k * SLICE}-{stop}", count=stop - k * SLICE)
        for k, (at, stop) in enumerate(zip(offsets, stops, strict=True))
    ]


def split_part(part: Part) -> tuple[str, int, int, int]:
    """Return file name, first byte, start and stop of a part that `xyz_parts` made."""
    prefix, start, stop = parse_slice(part)
    name, _, at = prefix.rpartition("@")
    return name, int(at), start, stop


def read_frames(file: Path, part: Part) -> Iterator[tuple[int, str]]:
    """Yield number and text of each frame in a part."""
    _, at, start, stop = split_part(part)
    with open_regular(file) as lines:
        lines.seek(at)
        frames = iter_frames(lines, file, start)
        for k in range(start, stop):
            frame = next(frames, None)
            if frame is None:
                raise SourceError(file, f"frame {k}", "not there")
            yield k, frame
