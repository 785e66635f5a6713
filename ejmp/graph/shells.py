"""Shells of neighbours that a limit on their number cuts in two, which breaks the symmetry of crystals."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ejmp.graph.build import build_graph
from ejmp.graph.graph import EDGE_SETS, AtomGraph
from ejmp.graph.settings import GraphSettings
from ejmp.graph.structure import Structure

ORDER = ("atom_pairs", "main", "atom_edges", "quad_edges")
"""Edge sets in the order of `GraphSettings.reach`."""


def cut_shells(
    graph: AtomGraph, settings: GraphSettings | Sequence[GraphSettings], tolerance: float = 0.01
) -> dict[str, Tensor]:
    """Return the atoms of which one neighbour is kept and another at the same distance is not, by edge set.

    In a crystal such a choice breaks the symmetry: atoms that forces should not act on feel some, and a supercell has
    another energy per atom. `GraphSettings(ties="keep")` keeps whole shells. Without any symmetry, about one atom in
    seven has two neighbours that close by chance. The answer is computed from the pairs of the graph; only where an
    atom has as many pairs as it may have, neighbours are searched for again.

    Args:
        graph: graph that `build_graph` made.
        settings: the settings it was made with, one or one per structure.
        tolerance: distances that differ by no more count as the same, A.

    Returns:
        For each edge set with a cut shell, the numbers of those atoms, [n] int64; nothing if no shell is cut.

    Raises:
        ValueError: if there are not as many settings as structures.
    """
    chosen = [settings] * graph.num_structures if isinstance(settings, GraphSettings) else list(settings)
    if len(chosen) != graph.num_structures:
        raise ValueError(f"settings: expected one or {graph.num_structures}, got {len(chosen)}")
    reach = [s.reach(n) for s, n in zip(chosen, graph.ptr.diff().tolist(), strict=True)]
    cut_ties = torch.tensor([s.ties == "cut" for s in chosen], device=graph.device)[graph.batch]
    if not cut_ties.any():
        return {}
    cutoff, most = (
        torch.tensor([[pair[i] for pair in sets] for sets in reach], device=graph.device)[graph.batch] for i in (0, 1)
    )
    pairs = graph.atom_pairs
    if ((pairs.ptr.diff() >= most[:, 0]) & cut_ties).any():
        pairs = _more_pairs(graph, chosen, reach).atom_pairs
    distance = torch.nn.functional.pad(pairs.distance.detach().double(), (0, 1), value=torch.inf)
    found = {}
    for j, name in enumerate(ORDER):
        last = pairs.ptr[:-1] + most[:, j] - 1  # the last one that is kept, and behind it the first one that is not
        more = (pairs.ptr.diff() > most[:, j]) & (most[:, j] > 0) & cut_ties
        last = torch.where(more, last, len(pairs.distance) - 1)
        beyond = distance[last + 1]
        cut = more & (beyond <= cutoff[:, j] + 5e-7) & (beyond - distance[last] <= tolerance)
        if cut.any():
            found[name] = cut.nonzero().flatten()
    return {name: found[name] for name in EDGE_SETS if name in found}


def _more_pairs(graph: AtomGraph, settings: list[GraphSettings], reach: list[list[tuple[float, int]]]) -> AtomGraph:
    """Return the graph with one more pair into each atom than its settings allow."""
    structures, more = [], []
    for b, (first, last) in enumerate(zip(graph.ptr.tolist()[:-1], graph.ptr.tolist()[1:], strict=True)):
        rows = slice(first, last)
        numbers, positions = graph.atomic_numbers[rows], graph.positions[rows].detach()
        structures.append(
            Structure(numbers=numbers, positions=positions, cell=graph.cell[b].detach(), pbc=graph.pbc[b])
        )
        pair_cutoff, most = reach[b][0]
        more.append(dataclasses.replace(settings[b], atom_pairs=(pair_cutoff, most + 1)))
    return build_graph(structures, settings=more, device=graph.device, dtype=torch.float64)
