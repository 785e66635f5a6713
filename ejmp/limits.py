"""How much of a file is believed: limits on what is read, unpacked and allocated, and regular files alone.

A size in a header costs nothing to write and memory to believe. So sizes are compared with these limits, and with the
bytes that are there, before anything is allocated. All limits are fields of `Limits`; `limiting` changes them for what
is done in a `with` block, as `--limit NAME=VALUE` does on the command line.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO

FLOOR = 64 << 20
"""Bytes that any file may unpack to, however small it is."""
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that a file may ask for.

    Raises:
        ValueError: naming a limit that is not a positive integer.
    """

    atoms: int = 100_000
    """Atoms of one structure."""
    frames: int = 100_000_000
    """Structures of one file."""
    parameters: int = 10_000_000_000
    """Parameters of a model."""
    tensors: int = 100_000
    """Weights of a model, each a matrix or a vector."""
    read_bytes: int = 4 << 30
    """Bytes of a file that has to be in memory as a whole: JSON, CIF, POSCAR, npz, a list of molecules. Files that are
    read piece by piece (xyz, HDF5, LMDB, databases, trajectories, checkpoints) may be of any size."""
    unpacked_bytes: int = 8 << 30
    """Bytes that such a file may have after decompression."""
    unpacked_ratio: int = 100
    """Bytes that any compressed file, or chunk of one, may unpack to for each byte that it has; 64 MiB are allowed in
    any case."""
    record_bytes: int = 256 << 20
    """Bytes of one record of an LMDB file, and of one header of a tar file."""
    line_bytes: int = 1 << 20
    """Bytes of one line of an xyz file. The lines of a structure's atoms may have 1/256 of it each, on average."""
    cif_line_bytes: int = 16 << 10
    """Bytes of one line of a CIF, whose standard allows 2,048 characters."""
    config_bytes: int = 1 << 20
    """Bytes of a file of settings: `--config`, a model's config.json and tasks.json."""
    manifest_bytes: int = 64 << 20
    """Bytes of the dataset.json of a record store."""

    def __post_init__(self) -> None:
        """Check the values."""
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{field.name}: expected a positive integer, got {value!r}")


class RefusedFileError(ValueError):
    """Raised for a file that is not read; the message names it."""

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path, self.problem = Path(path), problem


class LimitError(RefusedFileError):
    """Raised for a file that asks for more than a limit allows; the message says which limit and how to raise it."""


_LIMITS: ContextVar[Limits] = ContextVar("ejmp limits", default=Limits())  # noqa: B039 - it is frozen


def current_limits() -> Limits:
    """Return the limits that hold here."""
    return _LIMITS.get()


@contextmanager
def limiting(**changes: int) -> Iterator[Limits]:
    """Read files in the `with` block with other limits; the arguments are fields of `Limits`.

    Raises:
        ValueError: for an unknown name, or a value that is not a positive integer.
    """
    known = {field.name for field in fields(Limits)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise ValueError(f"limit: expected one of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    token = _LIMITS.set(Limits(**{**vars(current_limits()), **changes}))
    try:
        yield current_limits()
    finally:
        _LIMITS.reset(token)


def parse_limits(texts: Iterable[str]) -> dict[str, int]:
    """Return limits by name from texts NAME=VALUE, as `--limit` takes them; a value may be 5e9.

    Raises:
        ValueError: for a text of another form.
    """
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name] = int(value) if value.isdecimal() else int(float(value))
        except (ValueError, OverflowError) as error:
            raise ValueError(f"--limit: expected NAME=VALUE with a number, got {text!r}") from error
    return found


def check_limit(path: str | os.PathLike[str], name: str, found: int, what: str) -> None:
    """Refuse a file that asks for more than a limit.

    Args:
        path: the file.
        name: a field of `Limits`.
        found: what the file asks for.
        what: what it asks for in words, which follow the number.

    Raises:
        LimitError: if it is more.
    """
    most = getattr(current_limits(), name)
    if found > most:
        raise LimitError(path, _over(name, found, most, f"{found:,} {what}"))


def check_unpacked(path: str | os.PathLike[str], unpacked: int, packed: int, what: str = "") -> None:
    """Refuse contents that are far larger than the bytes they are stored in.

    Args:
        path: the file.
        unpacked: bytes of the contents, as far as they are known.
        packed: bytes that they are stored in.
        what: which part of the file this is; empty: all of it.

    Raises:
        LimitError: if they are more than FLOOR and more than `unpacked_ratio` allows.
    """
    most = current_limits().unpacked_ratio
    if unpacked > max(FLOOR, most * packed):
        ratio = -(-unpacked // max(packed, 1))
        text = f"{packed:,} bytes unpack to {unpacked:,} or more"
        raise LimitError(path, f"{what}: " * bool(what) + _over("unpacked_ratio", ratio, most, text))


def _over(name: str, found: int, most: int, text: str) -> str:
    raised = f"--limit {name}={found} (of ejmp data convert and verify) or ejmp.limits.limiting({name}={found})"
    return f"{text}: the limit {name} is {most:,}; if you trust the file, raise it: {raised}"


def check_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """Return the state of a file without opening it, which could wait forever.

    Raises:
        RefusedFileError: if it is a folder, a FIFO, a device or a socket.
        FileNotFoundError: if there is nothing at the path.
    """
    return _regular(path, os.stat(path))  # noqa: PTH116 - a str or a Path


def _regular(path: str | os.PathLike[str], state: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(state.st_mode):
        kind = next((name for test, name in _KINDS if test(state.st_mode)), "something else")
        raise RefusedFileError(path, f"expected a regular file, got {kind}")
    return state


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file for reading.

    Raises:
        RefusedFileError: if it is anything else, without waiting for it.
    """
    check_regular(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # it may have been replaced by a FIFO
    try:
        _regular(path, os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_whole(path: str | os.PathLike[str], limit: str = "read_bytes") -> bytes:
    """Return the contents of a regular file.

    Args:
        path: the file.
        limit: the limit of its size, a field of `Limits`.

    Raises:
        LimitError: if it is larger.
        RefusedFileError: if it is not a regular file, or its size changes while it is read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        check_limit(path, limit, size, "bytes")
        contents = file.read(size + 1)
    if len(contents) != size:
        raise RefusedFileError(path, f"changed while it was read: {size} bytes at first, then {len(contents)}")
    return contents
