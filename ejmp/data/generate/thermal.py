"""Random displacements like those of heat, without a calculator: normal modes of a model of pair springs."""

from typing import Any

import numpy as np

BOLTZMANN = 8.617333e-5
"""Boltzmann constant, eV/K."""
DECAY = 3.0
"""Rate at which springs weaken with the relative distance of their atoms."""
RIGID, SOFTEST = 0.01, 0.4
"""Stiffness of modes, eV/A^2: softer ones than the first are rigid motions; others are made as stiff as the second."""


def thermal(atoms: Any, temperature: float, rng: np.random.Generator, stiffness: float = 35.0) -> Any:
    """Return a copy displaced along the classical normal modes of a pair-spring model.

    A spring between two atoms at distance d has constant stiffness * exp(-3 (d/r - 1)), r the sum of their covalent
    radii, so that bonds are stiff, angles softer and torsions softest.

    Args:
        atoms: an ase.Atoms; if it has an array "fixed" of booleans, these atoms stay where they are.
        temperature: temperature, K.
        rng: source of the random numbers.
        stiffness: stiffness of a bond, eV/A^2.
    """
    from ase.data import covalent_radii  # noqa: PLC0415

    n = len(atoms)
    fixed = atoms.arrays.get("fixed", np.zeros(n, dtype=bool))
    vectors = atoms.get_all_distances(mic=bool(atoms.pbc.any()), vector=True)
    distances = np.linalg.norm(vectors, axis=-1) + np.eye(n)
    radii = covalent_radii[atoms.numbers]
    springs = stiffness * np.exp(-DECAY * (np.maximum(distances / (radii[:, None] + radii), 0.8) - 1))
    np.fill_diagonal(springs, 0.0)
    unit = vectors / distances[..., None]
    blocks = -springs[..., None, None] * unit[..., :, None] * unit[..., None, :]
    blocks[np.arange(n), np.arange(n)] = -blocks.sum(axis=1)
    hessian = blocks.transpose(0, 2, 1, 3).reshape(3 * n, 3 * n)
    free = np.repeat(~fixed, 3)
    stiff, modes = np.linalg.eigh(hessian[np.ix_(free, free)])
    sigma = np.where(stiff > RIGID, np.sqrt(BOLTZMANN * temperature / np.maximum(stiff, SOFTEST)), 0.0)
    shift = np.zeros(3 * n)
    shift[free] = modes @ (sigma * rng.standard_normal(len(sigma)))
    moved = atoms.copy()
    moved.positions += shift.reshape(n, 3)
    return moved


def strained(atoms: Any, most: float, rng: np.random.Generator, axes: int = 3) -> Any:
    """Return a copy whose cell and atoms are strained by a random symmetric strain, up to `most`, in the first axes."""
    strain = np.zeros((3, 3))
    strain[:axes, :axes] = rng.uniform(-most, most, (axes, axes))
    moved = atoms.copy()
    moved.set_cell(atoms.cell @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    return moved
