"""The checks that every structure passes before a reader yields it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ejmp.data.readers.files import SourceError
from ejmp.data.readers.impossible import check_possible
from ejmp.graph.structure import MAX_ATOMIC_NUMBER, MAX_COORDINATE, TAGS, Structure
from ejmp.limits import RefusedFileError, check_limit, current_limits


@dataclass(frozen=True, kw_only=True)
class Checks:
    """How strictly structures are checked, and what becomes of those that are refused.

    Raises:
        ValueError: naming the field that is impossible.
    """

    allow_close: bool = False
    """Whether atoms may be on top of each other."""
    occupancy: Literal["refuse", "ignore"] = "refuse"
    """What becomes of a CIF with partly occupied or shared sites: "ignore" takes the main species as if it were there.
    """
    on_error: Literal["raise", "skip"] = "raise"
    """What becomes of a structure that is refused: "raise" ends with it, "skip" leaves it out and notes it."""
    skipped: dict[str, None] = field(default_factory=dict)
    """Why structures were left out, in the order in which they were met."""

    def __post_init__(self) -> None:
        """Check the choices."""
        for name, known in (("occupancy", ("refuse", "ignore")), ("on_error", ("raise", "skip"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected {' or '.join(known)}, got {getattr(self, name)!r}")


_CHECKS: ContextVar[Checks] = ContextVar("ejmp checks", default=Checks())  # noqa: B039 - a default that raises notes nothing


@contextmanager
def checking(
    *,
    allow_close: bool = False,
    occupancy: Literal["refuse", "ignore"] = "refuse",
    on_error: Literal["raise", "skip"] = "raise",
) -> Iterator[Checks]:
    """Read, convert and verify in the `with` block with other checks than usual; the arguments are those of `Checks`.

    Raises:
        ValueError: for an unknown choice.
    """
    checks = Checks(allow_close=allow_close, occupancy=occupancy, on_error=on_error)
    token = _CHECKS.set(checks)
    try:
        yield checks
    finally:
        _CHECKS.reset(token)


def current_checks() -> Checks:
    """Return how structures are checked here."""
    return _CHECKS.get()


@contextmanager
def leaving_out() -> Iterator[None]:
    """Note an error of a source instead of raising it, where what is refused is left out."""
    try:
        yield
    except SourceError as error:
        if _CHECKS.get().on_error == "raise":
            raise
        _CHECKS.get().skipped[str(error)] = None


@dataclass(frozen=True, kw_only=True)
class Refused(Structure):
    """What stands in a reader's sequence for a structure that is left out."""


def validate(structure: Structure, path: Path, where: str, *, far_apart: bool = False) -> Structure:
    """Return a structure as float64 and int64 arrays, after checking that everything about it is possible.

    Args:
        structure: as a reader made it.
        path: the file it is from.
        where: the place in the file.
        far_apart: whether it is known already that no two atoms are on top of each other.

    Returns:
        The structure; or a `Refused` where refused structures are left out (see `checking`).

    Raises:
        SourceError: naming the file, the place in it and the field.
    """
    checks = _CHECKS.get()
    try:
        check_limit(path, "atoms", np.asarray(structure.numbers).size, "atoms")
        checked = _validated(structure)
        check_possible(checked, allow_close=far_apart or checks.allow_close)
    except (ValueError, TypeError, OverflowError) as error:
        found = SourceError(path, where, error.problem if isinstance(error, RefusedFileError) else str(error))
        if checks.on_error == "skip":
            checks.skipped[str(found)] = None
            return Refused(numbers=(), positions=(), id=structure.id)
        raise found from error
    return checked


def _validated(structure: Structure) -> Structure:
    numbers = _integers("atomic numbers", structure.numbers)
    n = len(numbers)
    if numbers.ndim != 1 or not n:
        raise ValueError(f"atomic numbers: expected [n] with n of 1 or more, got {list(numbers.shape)}")
    if numbers.min() < 1 or numbers.max() > MAX_ATOMIC_NUMBER:
        raise ValueError(f"atomic numbers: expected 1..{MAX_ATOMIC_NUMBER}, got {numbers.min()}..{numbers.max()}")
    positions = _floats("positions", structure.positions, (n, 3)).astype(np.float64, copy=False)
    if max(positions.max(), -positions.min()) > MAX_COORDINATE:
        raise ValueError(f"positions: beyond {MAX_COORDINATE:g} A")
    forces = None if structure.forces is None else _floats("forces", structure.forces, (n, 3))
    pbc = np.empty(3, bool)
    pbc[:] = structure.pbc
    periodic = True in pbc.tolist()
    if periodic and structure.cell is None:
        raise ValueError("cell: expected [3, 3] of a periodic structure, got none")
    cell = _floats("cell", structure.cell, (3, 3)).astype(np.float64, copy=False) if periodic else None
    tags = None if structure.tags is None else _per_atom("tags", _integers("tags", structure.tags), n)
    if tags is not None and not (tags.min() >= TAGS[0] and tags.max() <= TAGS[-1]):
        raise ValueError(f"tags: expected {TAGS}, got {np.unique(tags)[:10].tolist()}")
    fixed = None if structure.fixed is None else _per_atom("fixed", _integers("fixed", structure.fixed), n) != 0
    energy = None if structure.energy is None else _number("energy", structure.energy)
    targets = {name: _number(name, value) for name, value in structure.targets.items()}
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


def _number(field: str, value: Any) -> float:
    return value if type(value) is float and math.isfinite(value) else float(_floats(field, value, ()))


def _integers(field: str, value: Any) -> np.ndarray:
    """Return an int64 array; whole numbers that are stored as floats, as in OC20, are accepted."""
    array = np.asarray(value)
    if array.dtype.kind not in "biuf" or array.size > current_limits().atoms:
        most = f"at most {current_limits().atoms} (limit atoms)"
        raise ValueError(f"{field}: expected integers, {most}, got {array.dtype} {list(array.shape)}")
    if array.dtype.kind == "f" and not (np.abs(array) < 2**31).all():
        raise ValueError(f"{field}: expected integers, got others")
    whole = array.astype(np.int64)
    if not (whole == array).all():
        raise ValueError(f"{field}: expected integers, got fractions")
    return whole


def _per_atom(field: str, array: np.ndarray, n: int) -> np.ndarray:
    if array.shape != (n,):
        raise ValueError(f"{field}: expected [{n}], got {list(array.shape)}")
    return array
