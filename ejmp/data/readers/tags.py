"""Held atoms, and tags made from them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

ADSORBATE_ELEMENTS = (1, 6, 7, 8)
"""Elements of OC20's adsorbates: H, C, N, O."""
OTHER_NONMETALS = (2, 5, 9, 10, 14, 15, 16, 17, 18, 32, 33, 34, 35, 36, 51, 52, 53, 54)
"""Elements that are neither metals nor in OC20's adsorbates, so that nothing says where they belong."""


def held_atoms(constraints: Sequence[Any], n: int, move_mask: Any = None) -> np.ndarray | None:
    """Return which atoms cannot move at all, [n] bool; None if nothing says so of any atom.

    FixAtoms holds atoms; FixCartesian and FixScaled hold an atom where they hold all three directions, alone or
    together. Every other constraint, and an atom that is held in one or two directions, counts as free.

    Args:
        constraints: those of an ase.Atoms.
        n: number of atoms.
        move_mask: which atoms, or which of their directions, may move, [n] or [n, 3]; None if that is not given.

    Raises:
        ValueError: if the mask is of another shape.
    """
    if not constraints and move_mask is None:
        return None
    whole, known = np.zeros(n, bool), False
    parts: dict[str, np.ndarray] = {}
    for constraint in constraints:
        kind = type(constraint).__name__
        if kind == "FixAtoms":
            whole[constraint.index] = known = True
        elif kind in ("FixCartesian", "FixScaled"):
            parts.setdefault(kind, np.zeros((n, 3), bool))[np.atleast_1d(constraint.index)] |= np.asarray(
                constraint.mask, bool
            )
    for part in parts.values():
        whole |= part.all(1)
    if move_mask is not None:
        mask = np.asarray(move_mask)
        if mask.shape not in ((n,), (n, 1), (n, 3)) or not np.isin(mask, (0, 1)).all():
            raise ValueError(f"move_mask: expected [{n}] or [{n}, 3] of true and false, got {list(mask.shape)}")
        whole |= ~mask.reshape(n, -1).astype(bool).any(1)
        known = True
    return whole if known or whole.any() else None


def infer_tags(numbers: np.ndarray, fixed: np.ndarray | None) -> np.ndarray:
    """Return OC20's tags of a slab with adsorbates: 0 for held atoms, 1 for free ones of the slab, 2 for others.

    A free atom is of the adsorbate if it is H, C, N or O and no held atom is of its element.

    Args:
        numbers: atomic numbers, [n].
        fixed: atoms that are held, [n] bool.

    Raises:
        ValueError: if nothing is held or everything, or an element may be of the slab as well as of an adsorbate.
    """
    if fixed is None or not fixed.any() or fixed.all():
        got = "all atoms" if fixed is not None and fixed.any() else "none"
        raise ValueError(f"--tags infer: expected a slab whose lower atoms are held (FixAtoms), got {got} held")
    free = np.unique(numbers[~fixed])
    slab = np.unique(numbers[fixed])
    unclear = [int(z) for z in free if z in ADSORBATE_ELEMENTS and z in slab]
    unclear += [int(z) for z in free if z in OTHER_NONMETALS and z not in slab]
    if unclear:
        problem = f"free atoms of elements {unclear} may be of the slab or of an adsorbate"
        raise ValueError(f"--tags infer: {problem}: write tags 0, 1, 2 into the file and say --tags oc20")
    return np.where(fixed, 0, np.where(np.isin(numbers, ADSORBATE_ELEMENTS), 2, 1))
