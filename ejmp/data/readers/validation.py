"""The checks that every structure passes before a reader yields it."""

from pathlib import Path
from typing import Any

import numpy as np

from ejmp.data.readers.files import SourceError
from ejmp.graph.structure import MAX_ATOMIC_NUMBER, MAX_COORDINATE, TAGS, Structure

MAX_ATOMS = 100_000
"""Most atoms of one structure; a source that claims more is taken to be damaged."""


def validate(structure: Structure, path: Path, where: str) -> Structure:
    """Return a structure as float64 and int64 arrays, after checking that everything about it is possible.

    Raises:
        SourceError: naming the file, the place in it and the field.
    """
    try:
        return _validated(structure)
    except (ValueError, TypeError, OverflowError) as error:
        raise SourceError(path, where, str(error)) from error


def _validated(structure: Structure) -> Structure:
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
    """Return an array of finite numbers of the given shape; float32 stays float32, other types become float64."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" or array.shape != shape:
        raise ValueError(f"{field}: expected numbers {list(shape)}, got {array.dtype} {list(array.shape)}")
    array = array.astype(np.float32 if array.dtype == np.float32 else np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{field}: NaN or infinite")
    return array


def _integers(field: str, value: Any) -> np.ndarray:
    """Return an int64 array; whole numbers that are stored as floats, as in OC20, are accepted."""
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
