"""Images along reactions: hydrogen shifts between relaxed ends, bonds pulled apart, groups turned about bonds."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ejmp.data.generate.labels import attach, relax
from ejmp.data.generate.molecules import bonds, rotation, side

IMAGES = 7
"""Number of images between the two ends of a band."""
BAND_STEPS = 10
"""Steps for which a band is optimised."""
MAX_STRETCH = 1.8
"""Distance by which a bond is pulled apart, A."""


def hydrogen_shift(atoms: Any, rng: np.random.Generator) -> list[Any]:
    """Return images between a relaxed molecule and an isomer with one hydrogen elsewhere; none if no isomer is found.

    The images are those of a nudged elastic band (GFN2-xTB) at its start (image-dependent pair potential) and after
    10 steps.
    """
    from ase.calculators.calculator import CalculatorError  # noqa: PLC0415
    from ase.mep import NEB  # noqa: PLC0415
    from ase.optimize import FIRE  # noqa: PLC0415

    product = _shifted(atoms, rng)
    if product is None:
        return []
    band = [atoms.copy() for _ in range(IMAGES + 1)] + [product]
    neb: Any = NEB(band, method="improvedtangent")
    neb.interpolate("idpp")
    start = [image.copy() for image in band[1:-1]]
    for image in band:
        attach(image, "GFN2-xTB")
    try:
        FIRE(neb, logfile=None).run(fmax=0.1, steps=BAND_STEPS)  # pyright: ignore[reportArgumentType]
    except (CalculatorError, RuntimeError):
        return start
    return start + [image.copy() for image in band[1:]]


def _shifted(atoms: Any, rng: np.random.Generator) -> Any:
    """Return the relaxed isomer after moving a hydrogen to another heavy atom within 3.2 A, or None."""
    near = bonds(atoms)
    hydrogen = int(rng.choice(np.flatnonzero(atoms.numbers == 1)))
    giver = int(np.flatnonzero(near[hydrogen])[0])
    reach = np.linalg.norm(atoms.positions - atoms.positions[giver], axis=1)
    takers = np.flatnonzero((atoms.numbers > 1) & (reach < 3.2) & (np.arange(len(atoms)) != giver))
    if not len(takers):
        return None
    taker = int(rng.choice(takers))
    arms = atoms.positions[near[taker]] - atoms.positions[taker]
    away = -arms.sum(axis=0) / np.linalg.norm(arms, axis=1).mean() + 0.3 * rng.standard_normal(3)
    moved = atoms.copy()
    moved.positions[hydrogen] = atoms.positions[taker] + 1.05 * away / np.linalg.norm(away)
    relaxed = relax(moved, "GFN2-xTB", 40, fmax=0.1)[-1]
    changed = (bonds(relaxed) != near).any()
    return relaxed if changed and relaxed.get_all_distances().max() < 12 else None


def along_bonds(atoms: Any, rng: np.random.Generator) -> Iterator[Any]:
    """Yield images with one bond that is in no ring pulled apart, then images turned about another."""
    near = bonds(atoms)
    pairs = [(int(a), int(b)) for a, b in np.argwhere(np.triu(near)) if side(near, int(a), int(b)) is not None]
    for pull, (a, b) in enumerate(rng.permutation(np.array(pairs))[:2].tolist()):
        moving = side(near, a, b)
        axis = atoms.positions[b] - atoms.positions[a]
        axis = axis / np.linalg.norm(axis)
        for part in np.arange(1, IMAGES + 1) / IMAGES:
            image = atoms.copy()
            if pull == 0:
                image.positions[moving] += MAX_STRETCH * part * axis
            else:
                pivot = image.positions[b]
                image.positions[moving] = (image.positions[moving] - pivot) @ rotation(axis, np.pi * part).T + pivot
            yield image
