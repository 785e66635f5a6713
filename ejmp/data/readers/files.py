"""The files of a source: finding and loading them, and errors that name the one that is damaged or changes."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from ejmp.limits import RefusedFileError, check_limit, check_regular

T = TypeVar("T")
Versions = dict[Path, tuple[int, int, int]]
"""Size, time of the last change in ns, and number of each file of a source."""


class SourceError(ValueError):
    """Raised for a source that is damaged or not of its format; the message names the file and the place in it."""

    def __init__(self, path: Path, where: str, problem: str) -> None:
        super().__init__(f"{path}: {where}: {problem}" if where else f"{path}: {problem}")


@contextmanager
def reading(path: Path, where: str = "") -> Iterator[None]:
    """Turn every error that a library raises for a damaged source into one that names the source.

    Raises:
        SourceError: in place of any error but a missing file, a missing permission or a missing package.
    """
    try:
        yield
    except (SourceError, FileNotFoundError, PermissionError, ImportError):
        raise
    except RefusedFileError as error:
        raise SourceError(error.path, where if error.path == path else "", error.problem) from error
    except Exception as error:
        # What h5py, ase, zipfile and json raise on damaged input is not documented, so everything is caught.
        problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise SourceError(path, where, problem.strip()[:500]) from error


def import_optional(name: str, extra: str = "data") -> Any:
    """Import a package that is not needed by the rest of ejmp.

    Args:
        name: name of the module.
        extra: extra of ejmp that brings it.

    Raises:
        ImportError: naming the extra.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{name.partition('.')[0]} is missing: pip install ejmp[{extra}] brings it") from error


def cached_by_file(load: Callable[[Path], T]) -> Callable[[Path], T]:
    """Let a function that loads a whole file keep its last two results, so that reading by parts loads a file once."""

    @lru_cache(maxsize=2)
    def version(path: Path, _size: int, _modified: int) -> T:
        return load(path)

    def cached(path: Path) -> T:
        status = check_regular(path)
        check_limit(path, "read_bytes", status.st_size, "bytes")
        return version(path, status.st_size, status.st_mtime_ns)

    return cached


def versions(source: Path) -> Versions:
    """Return the state of a source, by which it is told whether its files change while they are read.

    Of a folder these are the files in it, and those of LMDB folders in it; of a name that is no file there is none.
    """
    if not source.is_dir():
        return {source: _version(source)} if source.exists() else {}
    files = [Path(entry.path) for entry in os.scandir(source) if entry.is_file()]
    return {file: _version(file) for file in (*files, *source.glob("*.lmdb/data.mdb"))}


def unchanged(before: Versions, items: Iterable[T]) -> Iterator[T]:
    """Yield what is read of a source, and at the end check that no file of it has changed since then.

    Raises:
        SourceError: naming the first file that has changed or is gone; also in place of an error that reading meets.
    """
    try:
        yield from items
    except (SourceError, OSError):
        _check_unchanged(before)
        raise
    _check_unchanged(before)


def _check_unchanged(before: Versions) -> None:
    for file, version in before.items():
        try:
            now = _version(file)
        except FileNotFoundError as error:
            raise SourceError(file, "", "changed while it was read: it is gone") from error
        if now != version:
            sizes = f"{version[0]:,} bytes at first, then {now[0]:,}"
            raise SourceError(file, "", f"changed while it was read: {sizes}; read it when it is complete")


def _version(file: Path) -> tuple[int, int, int]:
    state = file.stat()
    return state.st_size, state.st_mtime_ns, state.st_ino


def list_files(path: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Return the path itself if it is a file, or else the files in it that match a pattern, in order of name.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        SourceError: if the folder holds no such file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not path.is_dir():
        check_regular(path)
        return [path]
    found = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
    if not found:
        raise SourceError(path, "", f"expected {' or '.join(patterns) + ' in it' if patterns else 'a file'}")
    return found


def file_in(path: Path, name: str) -> Path:
    """Return the file of that name in a source that is a folder, or the source itself."""
    return path / name if path.is_dir() else path
