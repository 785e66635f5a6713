"""One structure as raw arrays, and the checks every structure passes before it becomes part of a graph."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ejmp.graph.settings import GraphSettings

MAX_ATOMIC_NUMBER = 120
"""Largest atomic number that the model has an embedding for."""
MIN_CELL_HEIGHT = 0.1
"""A periodic cell thinner than this counts as one without a volume, A."""
MAX_COORDINATE = 1e6
"""Largest coordinate, A; further out, float64 is no longer exact to the 1e-6 A at which distances are compared."""
MAX_LATTICE = 1e9
"""Largest component of a lattice vector, A; the images of atoms beyond it are not exact to 1e-6 A."""
MAX_CELLS_OUTSIDE = 1 << 16
"""Most cells that an atom may be away from its own."""
TAGS = (0, 1, 2)
"""Tags of atoms: bulk, surface, and adsorbate or molecule."""
LAYER_DISTANCE = 0.5
"""Least distance in height of atoms of two tags by which these are told to be numbers of layers, A."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """One structure as arrays or tensors, with its labels. `build_graph` takes ASE atoms just as well."""

    numbers: Any
    """Atomic numbers 1..120, [n] integers."""
    positions: Any
    """Positions, [n, 3], A; a tensor that requires grad stays connected to the graph."""
    cell: Any = None
    """Lattice vectors as rows, [3, 3], A; needed in the periodic directions only."""
    pbc: Any = False
    """Whether the structure is periodic: one bool, or one for each lattice vector."""
    tags: Any = None
    """Tags, [n] integers: 0 bulk, 1 surface, 2 adsorbate or molecule. None: 2 everywhere."""
    fixed: Any = None
    """Atoms held in place, [n] booleans; metrics leave them out (losses do not, as upstream). None: all are free."""
    energy: float | None = None
    """Total energy, eV; None if it is not known."""
    forces: Any = None
    """Forces, [n, 3], eV/A; None if they are not known."""
    targets: Mapping[str, float] = field(default_factory=dict)
    """Other labels of the whole structure by name, each in the unit its reader documents."""
    id: str = ""
    """Name of the structure, unique within its dataset."""


def to_list(structures: Any) -> list[Any]:
    """Return one structure, one ASE atoms object, or an iterable of them, as a list.

    Raises:
        ValueError: if it is anything else, there is no structure, or one lacks numbers or positions.
    """
    _refuse_pyg(structures, "structures")
    one = hasattr(structures, "positions")
    if not one and not isinstance(structures, Iterable):
        raise ValueError(f"structures: expected ase.Atoms, ejmp.Structure or a list, got {type(structures).__name__}")
    listed = [structures] if one else list(structures)
    if not listed:
        raise ValueError("structures: expected at least one structure, got an empty list")
    for b, item in enumerate(listed):
        _refuse_pyg(item, f"structure {b}")
        missing = [name for name in ("numbers", "positions") if not hasattr(item, name)]
        if missing:
            raise ValueError(f"structure {b}: {type(item).__name__} has no {' or '.join(missing)}")
    return listed


def _refuse_pyg(value: Any, what: str) -> None:
    if any(kind.__module__.startswith("torch_geometric.") for kind in type(value).__mro__):
        kind = type(value).__name__
        raise ValueError(f"{what}: a torch_geometric {kind}: make a graph of it with ejmp.pyg.from_data")


@dataclass(frozen=True)
class Checked:
    """One structure as tensors, after `check_structure`."""

    numbers: Tensor
    """Atomic numbers, [n] int64."""
    positions: Tensor
    """Positions, [n, 3] float64, A."""
    cell: Tensor
    """Lattice vectors as rows, [3, 3] float64, A; zero where not periodic."""
    search_cell: Tensor
    """The cell with unit vectors where it is not periodic, so that it is never singular, [3, 3] float64, A."""
    pbc: Tensor
    """Directions in which the structure is periodic, [3] bool."""
    tags: Tensor
    """Tags, [n] int64."""


def check_structure(structure: Any, b: int, device: torch.device, settings: GraphSettings) -> Checked:
    """Convert one structure to tensors on a device, after checking that it is possible.

    Args:
        structure: anything with numbers, positions and optionally cell, pbc, tags.
        b: number of the structure in the batch, for messages.
        device: device of the tensors.
        settings: what tags mean, and which directions are periodic.

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
    vectors = _vectors(getattr(structure, "cell", None), b, device)
    if settings.periodic == "all":
        pbc = torch.zeros(3, dtype=torch.bool, device=device) if vectors is None else (vectors != 0).any(1)
    else:
        pbc = _pbc(getattr(structure, "pbc", False), b, device)
    cell, search_cell = _cell(vectors, pbc, b, device)
    if pbc.any():
        cells_away = (positions.detach().double() @ torch.linalg.inv(search_cell)).abs().amax(0)
        if (cells_away[pbc] > MAX_CELLS_OUTSIDE).any():
            raise ValueError(f"structure {b}: positions: more than {MAX_CELLS_OUTSIDE} cells outside the cell")
    no_tags = settings.tags == "none"
    tags = torch.full((n,), 2, device=device) if no_tags else _tags(structure, n, b, device)
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


def _vectors(value: Any, b: int, device: torch.device) -> Tensor | None:
    """Return the lattice vectors as they were given, [3, 3], or None."""
    if value is None:
        return None
    cell = _tensor(value, b, "cell", device)
    if cell.shape == (3,):
        cell = torch.diag(cell)
    if cell.shape == (1, 3, 3):
        cell = cell[0]
    if cell.shape != (3, 3) or cell.dtype == torch.bool or cell.is_complex():
        raise ValueError(f"structure {b}: cell: expected floats [3, 3], got {_describe(cell)}")
    return cell


def _cell(cell: Tensor | None, pbc: Tensor, b: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the cell with zero rows where it is not periodic, and with rows there that make it invertible."""
    if not pbc.any():
        return torch.zeros(3, 3, dtype=torch.float64, device=device), torch.eye(3, dtype=torch.float64, device=device)
    if cell is None:
        raise ValueError(f"structure {b}: cell: expected [3, 3] for a periodic structure, got none")
    cell = torch.where(pbc[:, None], cell.double(), 0.0)
    if not cell.abs().max() <= MAX_LATTICE:
        finite = torch.isfinite(cell).all()
        wrong = f"lattice vectors longer than {MAX_LATTICE:g} A" if finite else "NaN or infinite lattice vectors"
        raise ValueError(f"structure {b}: cell: {wrong}")
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


def are_layer_numbers(atoms: Any) -> bool:
    """Return whether tags of ASE atoms number layers from the top, one above the other, as ASE's slab builders do.

    OC20's tags rise with the height: bulk, surface, adsorbate.

    Args:
        atoms: an ase.Atoms.
    """
    tags, cell = atoms.get_tags(), atoms.cell.array
    kinds = np.unique(tags)
    normal = np.cross(cell[0], cell[1])
    if len(kinds) < 2 or not atoms.pbc.any() or not normal.any():
        return False
    normal *= (-1 if normal @ cell[2] < 0 else 1) / np.linalg.norm(normal)
    heights = [atoms.positions[tags == kind] @ normal for kind in kinds]
    return all(upper.min() - lower.max() > LAYER_DISTANCE for upper, lower in itertools.pairwise(heights))


def _tags(structure: Any, n: int, b: int, device: torch.device) -> Tensor:
    """Return the tags; those of ASE atoms without a tags array are all 2, as for molecules."""
    if hasattr(structure, "get_tags"):
        value = structure.get_tags() if structure.has("tags") else None
        if value is not None and are_layer_numbers(structure):
            raise ValueError(
                f"structure {b}: tags: expected 0 (bulk), 1 (surface), 2 (adsorbate), got {np.unique(value)}, which "
                "fall with the height, as the layer numbers of ASE's slab builders do; set_tags changes them"
            )
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
