"""One structure as raw arrays, and the checks every structure passes before it becomes part of a graph."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_ATOMIC_NUMBER = 120
MIN_CELL_HEIGHT = 0.1
"""A; a periodic cell thinner than this counts as one without a volume."""
MAX_COORDINATE = 1e6
"""A; further out, float64 coordinates are no longer exact to the 1e-6 A that distances are compared at."""
MAX_CELLS_OUTSIDE = 1 << 16
TAGS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Atoms in space, as arrays or tensors, and what is known of them. `build_graph` takes ASE atoms just as well."""

    numbers: Any
    """[n] integers, atomic numbers 1..120."""
    positions: Any
    """[n, 3], A; a tensor that requires grad stays connected to the graph."""
    cell: Any = None
    """[3, 3], A, rows are lattice vectors; needed in the periodic directions only."""
    pbc: Any = False
    """One bool, or three."""
    tags: Any = None
    """[n] integers: 0 bulk, 1 surface, 2 adsorbate or molecule. None: 2 everywhere."""
    fixed: Any = None
    """[n] booleans: atoms held in place, which metrics leave out (losses do not, as upstream). None: all are free."""
    energy: float | None = None
    """Total energy, eV."""
    forces: Any = None
    """[n, 3], eV/A."""
    targets: Mapping[str, float] = field(default_factory=dict)
    """Other labels of the whole structure by name, each in the unit its reader documents."""
    id: str = ""
    """Where it comes from; unique within its dataset."""


def to_list(structures: Any) -> list[Any]:
    """Return one structure, ASE atoms object, or an iterable of them as a list; refuse anything else.

    Raises:
        ValueError: if there is no structure, or one lacks numbers or positions.
    """
    one = hasattr(structures, "positions")
    if not one and not isinstance(structures, Iterable):
        raise ValueError(f"structures: expected ase.Atoms, ejmp.Structure or a list, got {type(structures).__name__}")
    listed = [structures] if one else list(structures)
    if not listed:
        raise ValueError("structures: expected at least one structure, got an empty list")
    for b, item in enumerate(listed):
        missing = [name for name in ("numbers", "positions") if not hasattr(item, name)]
        if missing:
            raise ValueError(f"structure {b}: {type(item).__name__} has no {' or '.join(missing)}")
    return listed


@dataclass(frozen=True)
class Checked:
    """One structure as checked tensors: a cell that is never singular beside the one that was given."""

    numbers: Tensor
    positions: Tensor
    cell: Tensor
    search_cell: Tensor
    pbc: Tensor
    tags: Tensor


def check_structure(structure: Any, b: int, device: torch.device) -> Checked:
    """Convert one structure to tensors on a device, or say what is wrong with it.

    Args:
        structure: has numbers, positions and optionally cell, pbc, tags.
        b: its place in the batch, for messages.
        device: where the tensors go.

    Raises:
        ValueError: naming the structure and the field, if anything about it is impossible.
    """
    numbers = _tensor(structure.numbers, b, "numbers", device)
    positions = _tensor(structure.positions, b, "positions", device)
    if numbers.numel() == 0:
        raise ValueError(f"structure {b}: numbers: the structure has no atoms")
    if numbers.ndim != 1 or not is_integer(numbers):
        raise ValueError(f"structure {b}: numbers: expected integers [n], got {_describe(numbers)}")
    n = len(numbers)
    if positions.shape != (n, 3) or not positions.is_floating_point():
        raise ValueError(f"structure {b}: positions: expected floats [{n}, 3], got {_describe(positions)}")
    if not torch.isfinite(positions).all():
        raise ValueError(f"structure {b}: positions: NaN or infinite coordinates")
    if positions.abs().max() > MAX_COORDINATE:
        raise ValueError(f"structure {b}: positions: coordinates beyond {MAX_COORDINATE:g} A; move the structure")
    wrong = numbers[(numbers < 1) | (numbers > MAX_ATOMIC_NUMBER)]
    if len(wrong):
        raise ValueError(f"structure {b}: numbers: expected 1..{MAX_ATOMIC_NUMBER}, got {wrong[0].item()}")
    pbc = _pbc(getattr(structure, "pbc", False), b, device)
    cell, search_cell = _cell(getattr(structure, "cell", None), pbc, b, device)
    if pbc.any():
        cells_away = (positions.detach().double() @ torch.linalg.inv(search_cell)).abs().amax(0)
        if (cells_away[pbc] > MAX_CELLS_OUTSIDE).any():
            raise ValueError(f"structure {b}: positions: more than {MAX_CELLS_OUTSIDE} cells outside the cell")
    tags = _tags(structure, n, b, device)
    return Checked(numbers.long(), positions.double(), cell, search_cell, pbc, tags)


def _tensor(value: Any, b: int, field: str, device: torch.device) -> Tensor:
    try:
        if isinstance(value, Tensor):
            return value.to(device)
        array = np.asarray(value)
        kind = np.dtype(np.int64) if array.dtype.kind == "u" else array.dtype.newbyteorder("=")
        return torch.as_tensor(np.array(array, dtype=kind, order="C"), device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"structure {b}: {field}: expected an array of numbers ({error})") from error


def is_integer(value: Tensor) -> bool:
    """Return whether a tensor holds integers (booleans are not)."""
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _describe(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _pbc(value: Any, b: int, device: torch.device) -> Tensor:
    pbc = _tensor(value, b, "pbc", device)
    if pbc.numel() not in (1, 3) or pbc.ndim > 1 or not (pbc.dtype == torch.bool or is_integer(pbc)):
        raise ValueError(f"structure {b}: pbc: expected one bool or three, got {_describe(pbc)}")
    return pbc.bool().expand(3).clone()


def _cell(value: Any, pbc: Tensor, b: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the cell with zero rows where not periodic, and one completed by orthonormal rows there."""
    if value is None:
        if pbc.any():
            raise ValueError(f"structure {b}: cell: expected [3, 3] for a periodic structure, got none")
        value = np.zeros((3, 3))
    cell = _tensor(value, b, "cell", device)
    if cell.shape == (3,):
        cell = torch.diag(cell)
    if cell.shape == (1, 3, 3):
        cell = cell[0]
    if cell.shape != (3, 3) or cell.dtype == torch.bool or cell.is_complex():
        raise ValueError(f"structure {b}: cell: expected floats [3, 3], got {_describe(cell)}")
    if not pbc.any():
        return torch.zeros(3, 3, dtype=torch.float64, device=device), torch.eye(3, dtype=torch.float64, device=device)
    cell = torch.where(pbc[:, None], cell.double(), 0.0)
    if not torch.isfinite(cell).all():
        raise ValueError(f"structure {b}: cell: NaN or infinite lattice vectors")
    complete = cell.clone()
    free = (~pbc).nonzero().flatten()
    if len(free):
        # The right singular vectors beyond the rank span what the periodic vectors leave free.
        _, _, rows = torch.linalg.svd(cell[pbc], full_matrices=True)
        complete[free] = rows[3 - len(free) :]
    inverse, singular = torch.linalg.inv_ex(complete)
    heights = 1 / inverse.norm(dim=0)  # the distance between opposite faces
    if singular or not heights[pbc].min() >= MIN_CELL_HEIGHT:
        raise ValueError(
            f"structure {b}: cell: a periodic cell needs a volume; its faces are closer than {MIN_CELL_HEIGHT} A "
            f"or its vectors are dependent: {cell.tolist()}"
        )
    return cell, complete


def _tags(structure: Any, n: int, b: int, device: torch.device) -> Tensor:
    """Return the tags; ASE atoms without a tags array, like molecules, are all 2."""
    if hasattr(structure, "get_tags"):
        value = structure.get_tags() if structure.has("tags") else None
    else:
        value = getattr(structure, "tags", None)
    if value is None:
        return torch.full((n,), 2, dtype=torch.int64, device=device)
    tags = _tensor(value, b, "tags", device)
    if tags.shape != (n,) or not is_integer(tags):
        raise ValueError(f"structure {b}: tags: expected integers [{n}], got {_describe(tags)}")
    if not torch.isin(tags, torch.tensor(TAGS, device=device)).all():
        raise ValueError(f"structure {b}: tags: expected 0 (bulk), 1 (surface), 2 (adsorbate), got {tags.unique()}")
    return tags.long()
