"""The recipes of the nine datasets: which structures there are, how many, and by which method they are labelled."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ejmp.data.generate.frameworks import random_framework
from ejmp.data.generate.labels import dynamics, label, relax
from ejmp.data.generate.molecules import aspirin, clashes, fingerprint, peptide, random_molecule
from ejmp.data.generate.paths import along_bonds, hydrogen_shift
from ejmp.data.generate.slabs import metal_slab, oxide_slab
from ejmp.data.generate.thermal import strained, thermal
from ejmp.graph.structure import Structure

Recipe = Callable[[np.random.Generator], Iterator[Structure | None]]
"""Function that yields structures without end; None for a structure that got no label."""
METAL_STIFFNESS, OXIDE_STIFFNESS = 3.0, 12.0
"""Stiffness of bonds in metals and oxides, eV/A^2."""
MAX_EMT_FORCE = 5.0
"""Largest component of a force in a metal slab, eV/A: beyond, EMT's crude adsorbates would set the whole loss."""
MAX_STRAIN = 0.03
"""Largest component of a random strain."""
FRAME_STEPS = 10
"""Steps of 2 fs between the frames of dynamics."""


def oc20(rng: np.random.Generator) -> Iterator[Structure | None]:
    """Yield metal slabs with an adsorbate: two steps of a relaxation, and a frame with heat and strain (EMT)."""
    for number in _count():
        slab = metal_slab(rng)
        path = relax(slab, "EMT", 30)
        for step in _some(len(path), 2, rng):
            yield label(path[step], "EMT", f"{number}/step{step}", max_force=MAX_EMT_FORCE)
        hot = thermal(strained(path[-1], MAX_STRAIN, rng, axes=2), rng.uniform(100, 1000), rng, METAL_STIFFNESS)
        yield label(hot, "EMT", f"{number}/hot", max_force=MAX_EMT_FORCE)


def oc22(rng: np.random.Generator) -> Iterator[Structure | None]:
    """Yield oxide slabs: two steps of a short relaxation, two frames with heat and strain (GFN1-xTB, periodic)."""
    for number in _count():
        path = relax(oxide_slab(rng), "GFN1-xTB", 8)
        for step in sorted({len(path) // 2, len(path) - 1}):
            yield label(path[step], "GFN1-xTB", f"{number}/step{step}")
        for copy, temperature in enumerate(rng.uniform(100, 1000, 2)):
            hot = thermal(strained(path[-1], MAX_STRAIN, rng, axes=2), temperature, rng, OXIDE_STIFFNESS)
            yield label(hot, "GFN1-xTB", f"{number}/hot{copy}")


def ani1x(rng: np.random.Generator) -> Iterator[Structure | None]:
    """Yield random molecules, each in four frames from 50 to 2000 K (GFN2-xTB)."""
    for number, molecule in enumerate(_relaxed_molecules(rng)):
        for temperature in np.geomspace(50, 2000, 4).round():
            yield label(thermal(molecule, temperature, rng), "GFN2-xTB", f"{number}/{temperature:.0f}K")


def transition1x(rng: np.random.Generator) -> Iterator[Structure | None]:
    """Yield random molecules on the way to isomers, pulled apart at a bond, turned about a bond (GFN2-xTB)."""
    for number, molecule in enumerate(_relaxed_molecules(rng)):
        images = hydrogen_shift(molecule, rng)
        for place in _some(len(images), 4, rng):
            yield label(images[place], "GFN2-xTB", f"{number}/shift{place}")
        turned = list(along_bonds(molecule, rng))
        for place in _some(len(turned), 4, rng):
            yield label(thermal(turned[place], 100, rng), "GFN2-xTB", f"{number}/bond{place}")


def qm9(rng: np.random.Generator) -> Iterator[Structure | None]:
    """Yield random molecules at their minimum, with total energy and HOMO-LUMO gap (GFN2-xTB)."""
    for number, molecule in enumerate(_relaxed_molecules(rng, max_heavy=9, steps=120)):
        yield label(molecule, "GFN2-xTB", f"{number}", forces=False, gap=True)


def spice(rng: np.random.Generator) -> Iterator[Structure | None]:
    """Yield random molecules with 2 to 5 waters, each in four frames from 200 to 800 K (GFN2-xTB)."""
    for number, molecule in enumerate(_relaxed_molecules(rng, max_heavy=6)):
        solvated = relax(_with_waters(molecule, int(rng.integers(2, 6)), rng), "GFN2-xTB", 25)[-1]
        for temperature in np.geomspace(200, 800, 4).round():
            yield label(thermal(solvated, temperature, rng), "GFN2-xTB", f"{number}/{temperature:.0f}K")


def rmd17(rng: np.random.Generator) -> Iterator[Structure | None]:
    """Yield frames 20 fs apart of aspirin's dynamics at 500 K (GFN2-xTB)."""
    return _trajectory(aspirin(), rng)


def md22(rng: np.random.Generator) -> Iterator[Structure | None]:
    """Yield frames 20 fs apart of the dynamics of Ac-Ala3-NHMe at 500 K (GFN2-xTB)."""
    return _trajectory(peptide(), rng)


def qmof(rng: np.random.Generator) -> Iterator[Structure | None]:
    """Yield porous frameworks: one frame after a short relaxation, one with heat and strain (GFN1-xTB, periodic)."""
    for number in _count():
        solid = random_framework(rng)
        if len(solid) > 60 or clashes(solid):
            continue
        relaxed = relax(solid, "GFN1-xTB", 8)[-1]
        yield label(relaxed, "GFN1-xTB", f"{number}/relaxed", gap=True)
        hot = thermal(strained(relaxed, MAX_STRAIN, rng), 300, rng)
        yield label(hot, "GFN1-xTB", f"{number}/300K", gap=True)


RECIPES: dict[str, tuple[Recipe, int, dict[str, float]]] = {
    "oc20": (oc20, 3000, {"val": 0.1}),
    "oc22": (oc22, 960, {"val": 0.1}),
    "ani1x": (ani1x, 4000, {"val": 0.1}),
    "transition1x": (transition1x, 4000, {"val": 0.1}),
    "rmd17": (rmd17, 600, {"val": 0.1, "test": 0.2}),
    "qm9": (qm9, 1000, {"val": 0.1, "test": 0.1}),
    "spice": (spice, 600, {"val": 0.1, "test": 0.1}),
    "md22": (md22, 600, {"val": 0.1, "test": 0.2}),
    "qmof": (qmof, 400, {"val": 0.1, "test": 0.1}),
}
"""For each dataset its recipe, the number of structures, and the shares of the splits other than train."""


def _count() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def _some(count: int, most: int, rng: np.random.Generator) -> list[int]:
    """Return up to `most` different numbers below `count`, in order."""
    return sorted(rng.choice(count, min(most, count), replace=False).tolist())


def _trajectory(molecule: Any, rng: np.random.Generator) -> Iterator[Structure | None]:
    start = relax(molecule, "GFN2-xTB", 300)[-1]
    for frame, atoms in enumerate(dynamics(start, "GFN2-xTB", 500, FRAME_STEPS, rng)):
        yield label(atoms, "GFN2-xTB", f"{2 * FRAME_STEPS * frame}fs")


def _relaxed_molecules(rng: np.random.Generator, max_heavy: int = 8, steps: int = 60) -> Iterator[Any]:
    """Yield relaxed random molecules of at least four atoms without end; no two have the same bonds."""
    seen: set[bytes] = set()
    while True:
        molecule = random_molecule(rng, max_heavy)
        known = fingerprint(molecule)
        if len(molecule) >= 4 and known not in seen and not clashes(molecule):
            seen.add(known)
            yield relax(molecule, "GFN2-xTB", steps)[-1]


def _with_waters(molecule: Any, waters: int, rng: np.random.Generator) -> Any:
    """Return a molecule with waters in random directions, as near as possible with 1.8 A between all atoms."""
    from ase.build import molecule as named  # noqa: PLC0415

    solvated = molecule.copy()
    center = molecule.positions.mean(axis=0)
    for _ in range(waters):
        water = named("H2O")
        water.rotate(rng.uniform(0, 360), rng.standard_normal(3), center="COM")
        out = rng.standard_normal(3)
        out /= np.linalg.norm(out)
        for distance in np.arange(2.0, 15.0, 0.2):
            placed = water.positions - water.get_center_of_mass() + center + distance * out
            if np.linalg.norm(placed[:, None] - solvated.positions, axis=-1).min() > 1.8:
                water.positions = placed
                solvated += water
                break
    return solvated
