"""Energies and forces: GFN-xTB for molecules, oxides and frameworks, EMT for metals; relaxation and dynamics."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from ejmp.graph.structure import Structure

Method = Literal["EMT", "GFN1-xTB", "GFN2-xTB"]
MAX_FORCE = 50.0
"""Largest component of a force, eV/A; structures with a larger one are dropped."""
HYDROGEN_MASS = 3.0
"""Mass of hydrogen, u. Heavy hydrogen allows longer steps, and positions are distributed as with light hydrogen."""
dropped: Counter[str] = Counter()
"""Number of structures that got no label, by reason."""


def label(
    atoms: Any,
    method: Method,
    name: str,
    *,
    forces: bool = True,
    gap: bool = False,
    max_force: float = MAX_FORCE,
) -> Structure | None:
    """Round positions to float32 and label a structure; return None if the labels are not sane.

    Args:
        atoms: an ase.Atoms; its arrays "tags" and "fixed" are kept.
        method: the method that labels.
        name: the structure's id.
        forces: whether forces are kept.
        gap: whether the HOMO-LUMO gap, eV, becomes the target "gap" (xTB only).
        max_force: largest component of a force, eV/A; a structure with a larger one is dropped.
    """
    positions = atoms.positions.astype(np.float32).astype(np.float64)
    rounded = atoms.copy()
    rounded.positions = positions
    values = emt(rounded) if method == "EMT" else xtb(rounded, method)
    if values is None:
        return None
    energy, gradient_forces, homo_lumo = values
    if not np.isfinite(energy) or not np.abs(gradient_forces).max() <= max_force:
        dropped[f"force beyond {max_force:g} eV/A"] += 1
        return None
    return Structure(
        numbers=atoms.numbers,
        positions=positions,
        cell=np.array(atoms.cell),
        pbc=np.array(atoms.pbc),
        tags=atoms.arrays.get("tags"),
        fixed=atoms.arrays.get("fixed"),
        energy=energy,
        forces=gradient_forces.astype(np.float32) if forces else None,
        targets={"gap": homo_lumo} if gap else {},
        id=name,
    )


def emt(atoms: Any) -> tuple[float, np.ndarray[Any, Any], float]:
    """Return energy (eV) and forces (eV/A) of ASE's effective medium theory, and NaN for the gap it does not have."""
    from ase.calculators.emt import EMT  # noqa: PLC0415

    atoms.calc = EMT()
    return float(atoms.get_potential_energy()), atoms.get_forces(apply_constraint=False), float("nan")


def xtb(atoms: Any, method: str) -> tuple[float, np.ndarray[Any, Any], float] | None:
    """Return energy (eV), forces (eV/A) and HOMO-LUMO gap (eV) of GFN-xTB; None without self-consistency.

    Periodic structures are computed at the Gamma point.
    """
    from ase.units import Bohr, Hartree  # noqa: PLC0415
    from tblite.interface import Calculator  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - an extra

    lattice = {"lattice": np.array(atoms.cell) / Bohr, "periodic": np.array(atoms.pbc)} if atoms.pbc.any() else {}
    calculator = Calculator(method, atoms.numbers, atoms.positions / Bohr, **lattice)
    calculator.set("verbosity", 0)
    try:
        result = calculator.singlepoint()
    except RuntimeError:
        dropped["no self-consistency"] += 1
        return None
    levels, occupations = result.get("orbital-energies"), result.get("orbital-occupations")
    filled = occupations > 1.0
    gap = float(levels[~filled].min() - levels[filled].max()) * Hartree if not filled.all() else float("nan")
    return float(result.get("energy")) * Hartree, -result.get("gradient") * (Hartree / Bohr), gap


def attach(atoms: Any, method: Method) -> None:
    """Attach an ASE calculator to atoms, and hold those marked in the array "fixed"."""
    from ase.calculators.emt import EMT  # noqa: PLC0415
    from ase.constraints import FixAtoms  # noqa: PLC0415

    if method == "EMT":
        atoms.calc = EMT()
    else:
        from tblite.ase import TBLite  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - an extra

        atoms.calc = TBLite(method=method, verbosity=0)
    if "fixed" in atoms.arrays:
        atoms.set_constraint(FixAtoms(mask=atoms.arrays["fixed"]))


def relax(atoms: Any, method: Method, steps: int, fmax: float = 0.05) -> list[Any]:
    """Return copies of every step of a relaxation (BFGS), as far as it got; the last one is the best.

    Args:
        atoms: where to start; they are not changed.
        method: the method that gives the forces.
        steps: most steps.
        fmax: largest force at which the relaxation ends, eV/A.
    """
    from ase.calculators.calculator import CalculatorError  # noqa: PLC0415
    from ase.optimize import BFGS  # noqa: PLC0415

    moving = atoms.copy()
    attach(moving, method)
    path: list[Any] = []
    try:
        for _ in BFGS(moving, logfile=None, maxstep=0.15).irun(fmax=fmax, steps=steps):
            path.append(moving.copy())  # noqa: PERF401 - a failure keeps the steps before it
    except (CalculatorError, RuntimeError):
        dropped["relaxation"] += 1
    return path or [atoms.copy()]


def dynamics(atoms: Any, method: Method, temperature: float, stride: int, rng: np.random.Generator) -> Iterator[Any]:
    """Yield frames of Langevin dynamics after an equilibration of 200 steps, without end.

    Args:
        atoms: where to start; they are not changed.
        method: the method that gives the forces.
        temperature: temperature, K.
        stride: steps of 2 fs between frames.
        rng: random numbers for the first velocities and the thermostat.
    """
    from ase import units  # noqa: PLC0415
    from ase.md.langevin import Langevin  # noqa: PLC0415

    moving = atoms.copy()
    attach(moving, method)
    masses = np.where(moving.numbers == 1, HYDROGEN_MASS, moving.get_masses())
    moving.set_masses(masses)
    moving.set_momenta(rng.standard_normal((len(moving), 3)) * np.sqrt(masses * units.kB * temperature)[:, None])
    run = Langevin(moving, 2 * units.fs, temperature_K=temperature, friction=0.02 / units.fs, rng=rng)
    run.run(200)
    while True:
        run.run(stride)
        yield moving.copy()
