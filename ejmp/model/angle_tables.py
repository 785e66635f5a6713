"""Angles of a graph for the reference backend: tables of neighbours and spherical functions, once per forward."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ejmp.graph.graph import AtomGraph
from ejmp_kernels import specification
from ejmp_kernels.specification import Quadruplets, Triplets


@dataclass(frozen=True, kw_only=True)
class AngleTables:
    """Tables of neighbours and spherical functions of their angles, for the four sums over neighbours."""

    edge_to_edge: Triplets
    atom_to_edge: Triplets
    edge_to_atom: Triplets
    quadruplets: Quadruplets
    pairs: Tensor
    """Ids of the atom pairs into each atom, [N, K], padded."""


def angle_tables(graph: AtomGraph, num_spherical: int) -> AngleTables:
    """Evaluate all angular functions of a graph."""
    main, near = graph.main, graph.atom_edges
    atoms = torch.arange(graph.num_atoms, device=graph.device)
    return AngleTables(
        edge_to_edge=specification.triplets(main, main, num_spherical, same_set=True),
        atom_to_edge=specification.triplets(main, near, num_spherical),
        edge_to_atom=specification.triplets(near, main, num_spherical),
        quadruplets=specification.quadruplets(main, graph.quad_edges, num_spherical),
        pairs=specification.neighbor_table(atoms, graph.atom_pairs.ptr, graph.atom_pairs.max_degree),
    )
