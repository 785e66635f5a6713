"""The atoms of a crystal from its sites and symmetry operations, in time that grows with their number.

ase.io compares every site with every atom that the sites before it made, and every image of a site with all others: a
CIF of 2,000 sites takes it half a minute. Here places are looked up in a grid, with ase.io's rules and numbers
otherwise: the images of a site that are one place are one atom, and a site at which there is an atom adds none.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ejmp.data.readers.files import import_optional
from ejmp.limits import check_limit, current_limits

SAME_ATOM = 1e-3
"""Greatest difference of fractional coordinates of two images that are one atom: ase.io's."""
MOST_IMAGES = 10
"""Most images per atom that a structure may have, of the number of atoms that limits allow."""
CROWD = 64
"""Most atoms in one thousandth of each side of the cell."""
_CELLS = round(1 / SAME_ATOM)
_AROUND = tuple(itertools.product((-1, 0, 1), repeat=3))
Place = tuple[float, float, float]


class _Grid:
    """Places in the unit cell, by which of its small parts they are in."""

    def __init__(self) -> None:
        self._parts: dict[tuple[int, int, int], list[Place]] = {}

    def has(self, place: Place) -> bool:
        """Return whether a place is that of another, under periodic boundaries."""
        x, y, z = (int(value * _CELLS) for value in place)
        for dx, dy, dz in _AROUND:
            for other in self._parts.get(((x + dx) % _CELLS, (y + dy) % _CELLS, (z + dz) % _CELLS), ()):
                if all(abs(a - b - round(a - b)) < SAME_ATOM for a, b in zip(place, other, strict=True)):
                    return True
        return False

    def add(self, places: Iterable[Place]) -> None:
        """Add places.

        Raises:
            ValueError: if very many are almost one.
        """
        for place in places:
            x, y, z = (int(value * _CELLS) % _CELLS for value in place)
            part = self._parts.setdefault((x, y, z), [])
            if len(part) == CROWD:
                raise ValueError(f"more than {CROWD} atoms near {', '.join(f'{value:.3f}' for value in place)}")
            part.append(place)


def images(group: Any, sites: np.ndarray, path: Path) -> tuple[np.ndarray, list[int]]:
    """Return the fractional coordinates of all atoms, and the number of the site each is an image of.

    Args:
        group: an ase.spacegroup.Spacegroup.
        sites: fractional coordinates of the sites.
        path: the file, for messages.

    Raises:
        LimitError: if there are more atoms than `ejmp.limits` allows.
        ValueError: if a site is not in the cell at all, or very many atoms are almost one.
    """
    rotations, shifts = (np.array(part) for part in zip(*dict.fromkeys(map(_key, group.get_symop())), strict=True))
    rotations, shifts = rotations.reshape(-1, 3, 3), shifts.reshape(-1, 3)
    if not np.isfinite(sites).all():
        raise ValueError("coordinates: expected finite numbers")
    if len(sites) * len(rotations) > MOST_IMAGES * current_limits().atoms:
        check_limit(path, "atoms", len(sites) * len(rotations), "images of sites")
    taken, found, kinds = _Grid(), [], []
    for kind, site in enumerate(sites):
        if taken.has(_place(site % 1.0)):
            continue
        own = _Grid()
        for image in ((rotations @ site) + shifts % 1.0) % 1.0:
            place = _place(image)
            if not own.has(place):
                own.add([place])
                found.append(image)
                kinds.append(kind)
                taken.add([place])
        check_limit(path, "atoms", len(found), "atoms or more")
    return np.array(found), kinds


def _key(operation: tuple[np.ndarray, np.ndarray]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    rotation, shift = operation
    return tuple(rotation.ravel().tolist()), tuple(shift.tolist())


def _place(values: np.ndarray) -> Place:
    x, y, z = values.tolist()
    return x, y, z


def shares(symbols: list[str], sites: np.ndarray, occupancies: list[Any]) -> list[dict[str, Any]]:
    """Return how often each species is at the place of each site; the last of the most frequent is the main one."""
    _, counts = np.unique(np.floor(sites * _CELLS), axis=0, return_counts=True)
    if counts.max() > CROWD:
        raise ValueError(f"{counts.max()} sites at one place")
    near: list[list[int]] = [[] for _ in symbols]
    tree = import_optional("scipy.spatial").cKDTree(sites)
    for first, second in tree.query_pairs(SAME_ATOM, output_type="ndarray").tolist():
        near[first].append(second)
        near[second].append(first)
    return [
        {symbols[k]: occupancies[k]} | {symbols[other]: occupancies[other] for other in sorted(others)}
        for k, others in enumerate(near)
    ]


def crystal(block: Any, path: Path) -> Any:
    """Return the crystal of a block of a CIF as ase.Atoms: what `ase.io.cif.CIFBlock.get_atoms` returns.

    Args:
        block: an ase.io.cif.CIFBlock.
        path: the file, for messages.

    Raises:
        ValueError: if its sites make no crystal.
    """
    asymmetric = block.get_unsymmetrized_structure()
    if asymmetric.cell.rank != 3:
        if asymmetric.cell.rank:
            raise ValueError("the cell is flat")
        return asymmetric
    group = block.get_spacegroup(True)  # noqa: FBT003 - ase's own name for it has changed
    sites = asymmetric.get_scaled_positions()
    symbols, occupancies = list(asymmetric.symbols), block.get("_atom_site_occupancy")
    places, kinds = images(group, sites, path)
    info: dict[str, Any] = {"spacegroup": group, "unit_cell": "conventional"}
    if occupancies is not None:
        occupied = shares(symbols, sites, occupancies if isinstance(occupancies, list) else [occupancies])
        symbols = [sorted(species.items(), key=lambda item: item[1])[-1][0] for species in occupied]  # noqa: FURB192
        info["occupancy"] = {str(k): species for k, species in enumerate(occupied)}
    atoms = import_optional("ase").Atoms(
        [symbols[kind] for kind in kinds], scaled_positions=places, cell=asymmetric.cell, pbc=True, info=info
    )
    for name, values in asymmetric.arrays.items():
        if not atoms.has(name):
            atoms.new_array(name, values[kinds])
    atoms.new_array("spacegroup_kinds", np.array(kinds, dtype=int))
    return atoms
