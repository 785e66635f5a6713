"""Metal and oxide slabs with adsorbates: tag 0 below the surface and fixed, 1 on the surface, 2 adsorbed."""

from collections.abc import Sequence
from typing import Any

import numpy as np

METALS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au")
FACETS = (("fcc111", (2, 2, 3)), ("fcc111", (2, 2, 4)), ("fcc111", (3, 2, 3)), ("fcc100", (2, 2, 3)),
          ("fcc100", (3, 2, 3)), ("fcc100", (3, 3, 3)), ("fcc110", (2, 2, 4)), ("fcc110", (2, 3, 3)))  # fmt: skip
ON_METAL = ("H", "C", "N", "O", "CO", "OH", "NH", "CH", "NO", "H2O", "CH3", "NH3", "HCO", "CH3OH")
ON_OXIDE = ("", "H", "O", "OH", "H2O", "CO", "N2", "CH3")
ROCKSALT = {"MgO": 4.21, "CaO": 4.81, "CdO": 4.70, "NiO": 4.18}
RUTILE = {"TiO2": (4.59, 2.96), "SnO2": (4.74, 3.19), "GeO2": (4.40, 2.86), "RuO2": (4.49, 3.11), "VO2": (4.55, 2.85)}
FLUORITE = {"ZrO2": 5.09, "HfO2": 5.08, "CeO2": 5.41}
WURTZITE = {"ZnO": (3.25, 5.21), "BeO": (2.70, 4.38)}
SWAPS = {"Mg": "Ca", "Ca": "Cd", "Ti": "Zr", "Sn": "Ti", "Ge": "Sn", "Zr": "Hf", "Hf": "Ti",
         "Zn": "Mg", "Be": "Zn", "Cd": "Zn", "Ru": "Ti", "V": "Ti", "Ce": "Zr", "Ni": "Mg"}  # fmt: skip
VACUUM = 7.0
"""Vacuum on either side of a slab, A."""
RATTLE = 0.02
"""Random displacement of oxide atoms, A. Periodic xTB energies are not smooth where two images are equally near."""
SURFACE_DEPTH = 1.3
"""Depth of an oxide's surface, measured from its uppermost atom, A."""


def metal_slab(rng: np.random.Generator) -> Any:
    """Return a slab of one or two metals with one adsorbate, unrelaxed."""
    from ase import build  # noqa: PLC0415
    from ase.data import atomic_numbers, reference_states  # noqa: PLC0415

    facet, size = FACETS[rng.integers(len(FACETS))]
    host, guest = rng.choice(METALS, 2, replace=False).tolist()
    share = rng.choice([0.0, 0.25, 0.5])
    lattice = [reference_states[atomic_numbers[metal]]["a"] for metal in (host, guest)]
    constant = (1 - share) * lattice[0] + share * lattice[1]
    slab = getattr(build, facet)(host, size=size, a=constant, vacuum=VACUUM)
    guests = rng.permutation(len(slab))[: round(share * len(slab))]
    slab.numbers[guests] = atomic_numbers[guest]
    slab.set_tags(np.where(slab.get_tags() == 1, 1, 0))
    return _finish(slab, str(rng.choice(ON_METAL)), rng)


def oxide_slab(rng: np.random.Generator) -> Any:
    """Return an oxide slab, some with a swapped cation, a vacancy of oxygen or an adsorbate, unrelaxed."""
    from ase.build import surface  # noqa: PLC0415

    bulk, miller, layers, repeat = _oxide(rng)
    slab = surface(bulk, miller, layers, vacuum=VACUUM) * repeat
    top = slab.positions[:, 2].max() - SURFACE_DEPTH
    slab.set_tags((slab.positions[:, 2] > top).astype(int))
    slab.positions += RATTLE * rng.standard_normal((len(slab), 3))
    if rng.random() < 0.6:
        cation = int(rng.choice(np.flatnonzero(slab.numbers != 8)))
        slab[cation].symbol = SWAPS[slab[cation].symbol]
    if rng.random() < 0.2:
        del slab[int(rng.choice(np.flatnonzero((slab.numbers == 8) & (slab.get_tags() == 1))))]
    return _finish(slab, str(rng.choice(ON_OXIDE)), rng)


def _oxide(rng: np.random.Generator) -> tuple[Any, Sequence[int], int, Sequence[int]]:
    """Return bulk, Miller indices, number of layers and lateral repeats of a random oxide."""
    from ase.build import bulk  # noqa: PLC0415
    from ase.spacegroup import crystal  # noqa: PLC0415

    kind = rng.choice(["rocksalt", "rutile", "fluorite", "wurtzite"], p=[0.4, 0.25, 0.2, 0.15])
    if kind == "rocksalt":
        name = str(rng.choice(sorted(ROCKSALT)))
        return bulk(name, "rocksalt", a=ROCKSALT[name], cubic=True), (1, 0, 0), 1, (int(rng.integers(1, 3)), 1, 1)
    if kind == "wurtzite":
        name = str(rng.choice(sorted(WURTZITE)))
        a, c = WURTZITE[name]
        return bulk(name, "wurtzite", a=a, c=c), (1, 0, 0), 2, (2, 1, 1)
    if kind == "fluorite":
        name = str(rng.choice(sorted(FLUORITE)))
        return bulk(name, "fluorite", a=FLUORITE[name]), (1, 1, 1), 1, (2, 2, 1)
    name = str(rng.choice(sorted(RUTILE)))
    a, c = RUTILE[name]
    basis = [(0, 0, 0), (0.305, 0.305, 0)]
    return crystal([name[:-2], "O"], basis, spacegroup=136, cellpar=[a, a, c, 90, 90, 90]), (1, 1, 0), 1, (1, 2, 1)


def _finish(slab: Any, adsorbate: str, rng: np.random.Generator) -> Any:
    """Put an adsorbate at a random place 1.4 to 2.4 A above a slab, mark fixed atoms, make all axes periodic."""
    from ase import Atoms  # noqa: PLC0415
    from ase.build import molecule  # noqa: PLC0415

    if adsorbate:
        added = molecule(adsorbate) if len(adsorbate) > 1 else Atoms(adsorbate)
        added.set_initial_magnetic_moments(None)
        anchor = int(rng.integers(len(added)))
        added.rotate(rng.uniform(0, 360), "z", center=added.positions[anchor])
        added.rotate(rng.uniform(0, 360), rng.standard_normal(3), center=added.positions[anchor])
        where = rng.random(2) @ np.array(slab.cell)[:2]
        where[2] = slab.positions[:, 2].max() + rng.uniform(1.4, 2.4)
        lowest = added.positions[:, 2].min() - added.positions[anchor, 2]
        added.translate(where - added.positions[anchor] - [0, 0, lowest])
        added.set_tags(np.full(len(added), 2))
        slab = slab + added
    slab.set_array("fixed", slab.get_tags() == 0)
    slab.set_constraint()
    slab.pbc = True
    return slab
