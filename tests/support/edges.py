"""Comparison of graphs edge by edge."""

import dataclasses
import itertools

import numpy as np
import torch

import ejmp
from ejmp.graph.graph import EDGE_SETS


def rows(edge_index, offset):
    return [(s, t, *o) for s, t, o in zip(*edge_index.tolist(), offset.tolist(), strict=True)]


def edges_of(graph):
    sets = {name: getattr(graph, name) for name in EDGE_SETS}
    return {name: (torch.stack([e.source, e.target]), e.offset) for name, e in sets.items()}


def keys(graph):
    """Return the edges of each set as (source, target, *offset), in the graph's order."""
    return {name: rows(*edges) for name, edges in edges_of(graph).items()}


def differences(a, b):
    """Return the names of the fields that are not equal bit for bit."""
    names = []
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, ejmp.EdgeSet):
            names += [f"{field.name}.{name}" for name in differences(x, y)]
        elif not (x.dtype == y.dtype and torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y):
            names.append(field.name)
    return names


def brute_force(atoms, cutoff):
    """Return all edges as (target, rank, source, *offset) in the order the graph documents."""
    reach = int(cutoff * np.linalg.norm(atoms.cell.reciprocal(), axis=1).max()) + 1
    cells = np.array(list(itertools.product(*(range(-reach * p, reach * p + 1) for p in atoms.pbc.astype(int)))))
    shifts, found = cells @ atoms.cell.array, [[] for _ in atoms]
    for t, s in itertools.product(range(len(atoms)), range(len(atoms))):
        lengths = np.linalg.norm(atoms.positions[t] - atoms.positions[s] - shifts, axis=1)
        ranks = np.round(lengths * 1e6).astype(int)
        inside = (ranks <= round(cutoff * 1e6)) & ((s != t) | cells.any(1))
        found[t] += [(t, rank, s, *o) for rank, o in zip(ranks[inside].tolist(), cells[inside].tolist(), strict=True)]
    return [sorted(edges) for edges in found]
