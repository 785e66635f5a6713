"""Rows of energy Hessians: how the forces change when one atom moves, for students that learn it from a teacher."""

import torch
from torch import Tensor

from ejmp.graph.graph import AtomGraph

STEP = 0.01
"""How far an atom is moved, A: far enough for float32, near enough for the forces to be linear in it."""


def one_atom_moved(graph: AtomGraph) -> Tensor:
    """Return displacements of length 1 of one atom of each structure along one axis, both at random, [N, 3] float64."""
    sizes = graph.ptr.diff()
    atoms = graph.ptr[:-1] + (torch.rand(len(sizes), device=graph.device) * sizes).long().clamp_max(sizes - 1)
    axes = torch.randint(3, (len(sizes),), device=graph.device)
    displacements = torch.zeros(graph.num_atoms, 3, dtype=torch.float64, device=graph.device)
    displacements[atoms, axes] = 1.0
    return displacements


def hessian_rows(at_rest: Tensor, moved: Tensor) -> Tensor:
    """Return the rows of the structures' Hessians that belong to displacements, by forward differences of forces.

    Structures of a batch do not see each other, so that one displacement in each of them gives one row of each. The
    difference is of first order in STEP, which does no harm where rows of two models are compared that are made alike.
    Differences need derivatives of the energy up to the second to train on, where a row by automatic differentiation
    needs the third, which compiled operations do not have.

    Args:
        at_rest: forces, [N, 3].
        moved: forces after atoms were moved by STEP times their displacement, [N, 3].

    Returns:
        For each structure, the row of its displacement, spread over its atoms, [N, 3], in units of forces per A.
    """
    return (at_rest - moved) / STEP
