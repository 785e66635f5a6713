"""The frames of an xyz file: each is a line with the number of atoms, a comment, and a line for each atom."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ejmp.data.readers.files import SourceError
from ejmp.data.readers.format import SLICE, Part, parse_slice
from ejmp.limits import check_limit, current_limits, open_regular

AVERAGE = 256
"""How many lines of atoms have as many bytes as the longest line may have."""


def iter_frames(lines: IO[bytes], file: Path, first: int = 0) -> Iterator[list[str]]:
    """Yield the lines of each frame, with the number of atoms and the comment.

    Raises:
        SourceError: if a frame has no number of atoms, ends early or is not text.
        LimitError: if it has too many atoms, or a line that is too long.
    """
    k, limits = first, current_limits()
    most, readline = limits.line_bytes, lines.readline
    while (line := readline(most)).strip():
        text = line.strip()
        if not (text.isdigit() and len(text) < 20 and int(text)):
            raise SourceError(file, f"frame {k}", f"expected 1 to {limits.atoms} atoms, got {text[:50]!r}")
        count = int(text)
        check_limit(file, "atoms", count, f"atoms in frame {k}")
        frame, left = [line], most + count * (most // AVERAGE)
        for _ in range(count + 1):
            row = readline(most)
            left -= len(row)
            if left < 0 or len(row) == most:
                at_least = AVERAGE * len(b"".join(frame)) // count if left < 0 else most + 1
                check_limit(file, "line_bytes", max(at_least, most + 1), f"bytes or more in a line of frame {k}")
            frame.append(row)
        if not frame[-1].strip():
            raise SourceError(file, f"frame {k}", "it ends early")
        try:
            yield [part.decode() for part in frame]
        except UnicodeDecodeError as error:
            raise SourceError(file, f"frame {k}", "it is not text") from error
        k += 1
    if lines.read(1 << 16).strip():
        raise SourceError(file, f"frame {k}", "expected a number of atoms, got an empty line")


def xyz_parts(file: Path) -> list[Part]:
    """Divide an xyz file into parts `<file>@<byte>:<start>-<stop>`, whose frames are found without a search.

    Raises:
        SourceError: if a frame has no number of atoms, or ends early.
    """
    offsets, count = [], 0
    with open_regular(file) as lines:
        frames = iter_frames(lines, file)
        while True:
            at = lines.tell()
            if next(frames, None) is None:
                break
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


def read_frames(file: Path, part: Part) -> Iterator[tuple[int, list[str]]]:
    """Yield number and lines of each frame in a part."""
    _, at, start, stop = split_part(part)
    with open_regular(file) as lines:
        lines.seek(at)
        frames = iter_frames(lines, file, start)
        for k in range(start, stop):
            lines_of_frame = next(frames, None)
            if lines_of_frame is None:
                raise SourceError(file, f"frame {k}", "not there")
            yield k, lines_of_frame
