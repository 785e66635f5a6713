"""What every reader needs: errors that name the file, slices of large sources, and the checks of what was read."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ejmp.data.readers.format import Part
from ejmp.graph.structure import MAX_ATOMIC_NUMBER, MAX_COORDINATE, TAGS, Structure

SLICE = 1000
"""Most structures in a part that is a slice of something larger."""
MAX_ATOMS = 100_000
"""Most atoms of one structure; a source that claims more is taken for a damaged one."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a dataset calls its arrays of frames, and what its units are in eV and A."""

    numbers: str
    positions: str
    energy: str
    forces: str
    length: float = 1.0
    per_energy: float = 1.0
    per_force: float = 1.0
    targets: Mapping[str, float] = field(default_factory=dict)
    """By what the source calls them, the unit in eV."""


class SourceError(ValueError):
    """A source is damaged, or not what it was said to be."""

    def __init__(self, path: Path, where: str, problem: str) -> None:
        super().__init__(f"{path}: {where}: {problem}" if where else f"{path}: {problem}")


@contextmanager
def reading(path: Path, where: str = "") -> Iterator[None]:
    """Turn whatever a damaged source makes a library raise into an error that names the source.

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


def optional(name: str) -> Any:
    """Return a package that ejmp works without.

    Raises:
        ImportError: naming the extra that brings it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{name.partition('.')[0]} is missing: pip install ejmp[data] brings it") from error


def once(load: Callable[[Path], T]) -> Callable[[Path], T]:
    """Keep the last two files that were loaded whole, so that reading them part by part loads them once."""

    @lru_cache(maxsize=2)
    def version(path: Path, _size: int, _modified: int) -> T:
        return load(path)

    def cached(path: Path) -> T:
        status = path.stat()
        return version(path, status.st_size, status.st_mtime_ns)

    return cached


def list_files(path: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Return the path itself if it is a file, else the files in it that match a pattern, in order of name.

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


def check(structure: Structure, path: Path, where: str) -> Structure:
    """Return a structure as float64 and int64 arrays, once everything about it is possible.

    Raises:
        SourceError: naming the file, the place in it and the field.
    """
    try:
        return _checked(structure)
    except (ValueError, TypeError, OverflowError) as error:
        raise SourceError(path, where, str(error)) from error


def _checked(structure: Structure) -> Structure:
    numbers = _integers("atomic numbers", structure.numbers)
    n = len(numbers)
    if numbers.ndim != 1 or not 1 <= n <= MAX_ATOMS:
        raise ValueError(f"atomic numbers: expected [n] with n in 1..{MAX_ATOMS}, got {list(numbers.shape)}")
    if numbers.min() < 1 or numbers.max() > MAX_ATOMIC_NUMBER:
        raise ValueError(f"atomic numbers: expected 1..{MAX_ATOMIC_NUMBER}, got {numbers.min()}..{numbers.max()}")
    positions = _floats("positions", structure.positions, (n, 3)).astype(np.float64)
    if np.abs(positions).max() > MAX_COORDINATE:
        raise ValueError(f"positions: beyond {MAX_COORDINATE:g} A")
    forces = None if structure.forces is None else _floats("forces", structure.forces, (n, 3))
    pbc = np.broadcast_to(np.asarray(structure.pbc, dtype=bool), (3,)).copy()
    cell = _floats("cell", structure.cell, (3, 3)).astype(np.float64) if pbc.any() else None
    tags = None if structure.tags is None else _per_atom("tags", _integers("tags", structure.tags), n)
    if tags is not None and not np.isin(tags, TAGS).all():
        raise ValueError(f"tags: expected {TAGS}, got {np.unique(tags)[:10].tolist()}")
    fixed = None if structure.fixed is None else _per_atom("fixed", _integers("fixed", structure.fixed), n) != 0
    energy = None if structure.energy is None else float(_floats("energy", structure.energy, ()))
    targets = {name: float(_floats(name, value, ())) for name, value in structure.targets.items()}
    return Structure(
        numbers=numbers, positions=positions, cell=cell, pbc=pbc, tags=tags, fixed=fixed,
        energy=energy, forces=forces, targets=targets, id=structure.id,
    )  # fmt: skip


def _floats(field: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return finite numbers of a shape; float32 and float64 stay what they are."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" or array.shape != shape:
        raise ValueError(f"{field}: expected numbers {list(shape)}, got {array.dtype} {list(array.shape)}")
    array = array.astype(np.float32 if array.dtype == np.float32 else np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{field}: NaN or infinite")
    return array


def _integers(field: str, value: Any) -> np.ndarray:
    """Return int64; whole numbers kept as floats, which OC20 has, are integers too."""
    array = np.asarray(value)
    if array.dtype.kind not in "biuf" or array.size > MAX_ATOMS:
        raise ValueError(f"{field}: expected integers, at most {MAX_ATOMS}, got {array.dtype} {list(array.shape)}")
    if array.dtype.kind == "f" and not (np.abs(array) < 2**31).all():
        raise ValueError(f"{field}: expected integers, got others")
    whole = array.astype(np.int64)
    if not np.array_equal(whole, array):
        raise ValueError(f"{field}: expected integers, got fractions")
    return whole


def _per_atom(field: str, array: np.ndarray, n: int) -> np.ndarray:
    if array.shape != (n,):
        raise ValueError(f"{field}: expected [{n}], got {list(array.shape)}")
    return array
