"""Comparison of graphs edge by edge."""

import dataclasses

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
