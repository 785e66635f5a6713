"""Graph building: the compiled cell list beside its plain-torch twin, and its growth with the number of atoms."""

import pytest
import torch
from ase.build import bulk

import ejmp
from ejmp.graph.graph import EDGE_SETS
from ejmp.measure import bench


def edge_sets(graph):
    return [getattr(graph, name) for name in EDGE_SETS]


@pytest.mark.parametrize("backend", ["native", "reference"])
def bench_build_graph(benchmark, provenance, workload, backend):
    graph = bench.workload_graph(workload, backend=backend)
    other = bench.workload_graph(workload, backend="reference")
    for edges, expected in zip(edge_sets(graph), edge_sets(other), strict=True):
        assert torch.equal(edges.source, expected.source)
        assert torch.equal(edges.offset, expected.offset)
    benchmark.pedantic(bench.workload_graph, (workload,), {"backend": backend}, rounds=5, warmup_rounds=1)
    provenance |= {"atoms": graph.num_atoms, "edges": graph.main.num_edges, "pairs": graph.atom_pairs.num_edges}


def sodium_chloride(num_atoms):
    """Return a rattled rocksalt crystal of about this many atoms, at constant density."""
    repeats = round((num_atoms / 8) ** (1 / 3))
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True).repeat(repeats)
    atoms.rattle(0.05, seed=0)
    return atoms


@pytest.mark.parametrize("num_atoms", [100, 200, 500, 1000, 2000, 5000, 10000])
def bench_growth(benchmark, provenance, num_atoms):
    atoms = sodium_chloride(num_atoms)
    benchmark.pedantic(ejmp.build_graph, (atoms, 12.0, 30), rounds=5, warmup_rounds=1)
    provenance |= {"atoms": len(atoms), "us_per_atom": 1e6 * benchmark.stats.stats.median / len(atoms)}
