"""The files of a source: finding and loading them, and errors that name the one that is damaged."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


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
        status = path.stat()
        return version(path, status.st_size, status.st_mtime_ns)

    return cached


def list_files(path: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Return the path itself if it is a file, or else the files in it that match a pattern, in order of name.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        SourceError: if the folder holds no such file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_file():
        return [path]
    found = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
    if not found:
        raise SourceError(path, "", f"expected {' or '.join(patterns) + ' in it' if patterns else 'a file'}")
    return found


def file_in(path: Path, name: str) -> Path:
    """Return the file of that name in a source that is a folder, or the source itself."""
    return path / name if path.is_dir() else path
