"""Edge dropout, as in JMP's pre-training: graphs with pairs left out at random, and the output scaled to match."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ejmp.graph.graph import AtomGraph, EdgeSet, edge_geometry, make_edge_set
from ejmp.graph.settings import GraphSettings
from ejmp.model.interactions import OutputBlock
from ejmp.model.jmp import JMP
from ejmp_kernels.neighbors import csr_pointers, symmetrise


def drop_edges(
    graph: AtomGraph, share: float, settings: Sequence[GraphSettings], *, generator: torch.Generator | None = None
) -> AtomGraph:
    """Leave out each directed atom pair with some probability, then choose the other edge sets from those left.

    Each atom's edges are the nearest of its pairs that are left, as `build_graph` chooses them from all; so further
    neighbours take the place of dropped ones, and main edges are closed under swapping afterwards.

    Args:
        graph: graph that `build_graph` made.
        share: probability to leave a pair out, 0 to below 1.
        settings: how the graph of each structure was made.
        generator: generator of the random numbers, on the graph's device; None: torch's default one.

    Raises:
        ValueError: if the share is out of range, there are no settings for each structure, or they are not JMP's, where
            every edge set is chosen from the pairs.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share: expected 0 or more and less than 1, got {share}")
    if len(settings) != graph.num_structures:
        raise ValueError(f"settings: expected one per structure ({graph.num_structures}), got {len(settings)}")
    if any(s.ties != "cut" or s.atom_edges or s.quad_edges or s.atom_pairs for s in settings):
        raise ValueError("settings: edge dropout needs graphs with one cutoff and exact numbers of neighbours")
    pairs = graph.atom_pairs
    chance = torch.rand(pairs.num_edges, dtype=torch.float64, generator=generator, device=graph.device)
    left = _subset(pairs, chance >= share)
    place = torch.arange(left.num_edges, device=graph.device) - left.ptr[left.target]
    sizes = graph.ptr.diff().tolist()
    rows = [[most for _, most in s.reach(size)] for s, size in zip(settings, sizes, strict=True)]
    limits = torch.tensor(rows, device=graph.device)[graph.batch[left.target]]
    main, near, quad = (place < limits[:, j] for j in (1, 2, 3))
    tags = torch.tensor([[tag in s.quad_tags for tag in range(3)] for s in settings], device=graph.device)
    around = tags[graph.batch, graph.tags]
    quad &= around[left.source] | around[left.target]
    return dataclasses.replace(
        graph,
        atom_pairs=left,
        atom_edges=_subset(left, near),
        quad_edges=_subset(left, quad),
        main=_close(graph, _subset(left, main)),
    )


def _subset(edges: EdgeSet, keep: Tensor) -> EdgeSet:
    rows = {
        name: getattr(edges, name)[keep]
        for name in ("source", "target", "offset", "image", "shift", "distance", "vector")
    }
    ptr = csr_pointers(rows["target"], len(edges.ptr) - 1)
    return EdgeSet(**rows, ptr=ptr, max_degree=int(ptr.diff().max()))


def _close(graph: AtomGraph, edges: EdgeSet) -> EdgeSet:
    """Return main edges in which every edge has its counter-edge; of each pair one direction is kept."""
    distance, _ = edge_geometry(graph.positions, edges.source, edges.target, edges.shift)
    rank = (distance.detach() * 1e6).round().long()
    found, swap = symmetrise(edges.source, edges.target, edges.offset, rank, graph.num_atoms)
    return make_edge_set(graph.positions, found, graph.cell, graph.ptr, graph.dtype, swap)


@contextmanager
def scaled_outputs(model: JMP, share: float) -> Iterator[None]:
    """Divide the output blocks' sums over edges by 1 - share, while the body of the `with` statement runs."""
    factors = [block.scale_sum for block in model.backbone.out_blocks if isinstance(block, OutputBlock)]
    before = [factor.scale_factor for factor in factors]
    try:
        for factor, value in zip(factors, before, strict=True):
            factor.scale_factor = value / (1 - share)  # not in place: autograd may have saved the old tensor
        yield
    finally:
        for factor, value in zip(factors, before, strict=True):
            factor.scale_factor = value
