"""Relaxations and molecular dynamics with a calculator, by ASE."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Relaxation:
    """How a structure is relaxed.

    Raises:
        ValueError: for an unknown optimizer, or numbers that are not positive.
    """

    optimizer: Literal["bfgs", "fire", "lbfgs"] = "bfgs"
    """Optimizer of ASE."""
    fmax: float = 0.05
    """Largest force on an atom at which the structure counts as relaxed, eV/A; with a cell, also its stress times the
    volume, as ASE's FrechetCellFilter has it."""
    steps: int = 200
    """Most steps."""
    cell: bool = False
    """Whether the cell is relaxed too."""

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.optimizer not in ("bfgs", "fire", "lbfgs"):
            raise ValueError(f"--optimizer: expected bfgs, fire or lbfgs, got {self.optimizer!r}")
        if not self.fmax > 0:
            raise ValueError(f"--fmax: expected a positive number, got {self.fmax}")
        if self.steps < 0:
            raise ValueError(f"--steps: expected 0 or more, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """How atoms move.

    Raises:
        ValueError: for an unknown ensemble, or numbers out of range.
    """

    ensemble: Literal["nve", "nvt"] = "nve"
    """Constant energy (velocity Verlet), or constant temperature (Langevin)."""
    temperature: float = 300.0
    """Temperature of the thermostat, and of the velocities that atoms without any get, K."""
    steps: int = 1000
    """Number of steps."""
    timestep: float = 0.5
    """Length of a step, fs."""
    friction: float = 0.01
    """Friction of the thermostat, 1/fs."""
    every: int = 10
    """Steps from one written frame to the next."""
    seed: int = 0
    """Seed of velocities and thermostat."""

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.ensemble not in ("nve", "nvt"):
            raise ValueError(f"--ensemble: expected nve or nvt, got {self.ensemble!r}")
        for name in ("steps", "timestep", "friction", "every"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature: expected 0 or more, got {self.temperature}")


def relax(atoms: Any, asked: Relaxation, *, report: Report) -> bool:
    """Relax atoms that have a calculator, in place; return whether they converged.

    Args:
        atoms: an ase.Atoms.
        asked: how.
        report: called with a line about each step.
    """
    from ase.filters import FrechetCellFilter  # noqa: PLC0415
    from ase.optimize import BFGS, FIRE, LBFGS  # noqa: PLC0415

    if asked.cell and not atoms.pbc.all():
        raise ValueError("--cell: the structure is not periodic in three directions")
    made = {"bfgs": BFGS, "fire": FIRE, "lbfgs": LBFGS}[asked.optimizer]
    optimizer = made(FrechetCellFilter(atoms) if asked.cell else atoms, logfile=None)
    converged = False
    for converged in optimizer.irun(fmax=asked.fmax, steps=asked.steps):  # noqa: B007 - the last counts
        largest = np.linalg.norm(atoms.get_forces(), axis=1).max()
        report(f"step {optimizer.nsteps}: {atoms.get_potential_energy():.6f} eV, largest force {largest:.4f} eV/A")
    return bool(converged)


def run(atoms: Any, asked: Dynamics, path: Path, *, report: Report) -> float:
    """Move atoms that have a calculator, in place, and write frames; return the drift of the total energy.

    Args:
        atoms: an ase.Atoms; without velocities it gets some.
        asked: how.
        path: file of frames that ase.io writes frame by frame: .traj, .extxyz or .xyz.
        report: called with a line about each written frame.

    Returns:
        Slope of a straight line through the total energy, meV per atom and ps; 0 for fewer than two frames.
    """
    from ase import units  # noqa: PLC0415
    from ase.md.langevin import Langevin  # noqa: PLC0415
    from ase.md.verlet import VelocityVerlet  # noqa: PLC0415

    random = np.random.default_rng(asked.seed)
    if not atoms.get_momenta().any():
        _set_velocities(atoms, asked.temperature, random)
    if asked.ensemble == "nve":
        dynamics = VelocityVerlet(atoms, asked.timestep * units.fs)
    else:
        dynamics = Langevin(
            atoms,
            asked.timestep * units.fs,
            temperature_K=asked.temperature,
            friction=asked.friction / units.fs,
            rng=random,
            fixcm=False,
        )
    times, totals = [], []

    def frame() -> None:
        times.append(1e-3 * asked.timestep * dynamics.nsteps)
        totals.append(atoms.get_total_energy())
        append_frame(path, atoms)
        report(f"{times[-1]:.4f} ps: total energy {totals[-1]:.6f} eV, temperature {atoms.get_temperature():.1f} K")

    dynamics.attach(frame, interval=asked.every)
    dynamics.run(asked.steps)
    return 1e3 * float(np.polyfit(times, totals, 1)[0]) / len(atoms) if len(times) > 1 else 0.0


def _set_velocities(atoms: Any, temperature: float, random: np.random.Generator) -> None:
    """Draw velocities of a temperature (K) from the Maxwell-Boltzmann distribution; free atoms as a whole stay."""
    from ase import units  # noqa: PLC0415

    masses = atoms.get_masses()[:, None]
    momenta = random.normal(size=(len(atoms), 3)) * np.sqrt(units.kB * temperature * masses)
    if len(atoms) > 1 and not atoms.constraints:
        momenta -= masses / masses.sum() * momenta.sum(axis=0)
    atoms.set_momenta(momenta)


def append_frame(path: Path, atoms: Any) -> None:
    """Add a frame to a trajectory, by the ending of its name; .traj, or else extxyz."""
    import ase.io  # noqa: PLC0415
    from ase.io.trajectory import TrajectoryWriter  # noqa: PLC0415

    if path.suffix == ".traj":
        with TrajectoryWriter(path, "a") as trajectory:
            trajectory.write(atoms)
    else:
        ase.io.write(path, atoms, format="extxyz", append=True)
