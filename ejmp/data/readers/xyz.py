"""The frames of an xyz file: each is a line with the number of atoms, a comment, and a line for each atom."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ejmp.data.readers.files import SourceError
from ejmp.data.readers.format import SLICE, Part, parse_slice
from ejmp.data.readers.validation import MAX_ATOMS


def iter_frames(lines: IO[bytes], file: Path, first: int = 0) -> Iterator[list[str]]:
    """Yield the lines of each frame, with the number of atoms and the comment.

    Raises:
        SourceError: if a frame has no number of atoms, ends early or is not text.
    """
    k = first
    while (line := lines.readline()).strip():
        text = line.strip()
        if not (text.isdigit() and len(text) < 10 and 1 <= int(text) <= MAX_ATOMS):
            raise SourceError(file, f"frame {k}", f"expected 1 to {MAX_ATOMS} atoms, got {text[:50]!r}")
        frame = [line, *(lines.readline() for _ in range(int(text) + 1))]
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
    with file.open("rb") as lines:
        frames = iter_frames(lines, file)
        while True:
            at = lines.tell()
            if next(frames, None) is None:
                break
            if count % SLICE == 0:
                offsets.append(at)
            count += 1
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
    with file.open("rb") as lines:
        lines.seek(at)
        frames = iter_frames(lines, file, start)
        for k in range(start, stop):
            lines_of_frame = next(frames, None)
            if lines_of_frame is None:
                raise SourceError(file, f"frame {k}", "not there")
            yield k, lines_of_frame
