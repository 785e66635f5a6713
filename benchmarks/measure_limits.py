"""Measure where the model's energy is not smooth, as JMP defines it, and write the figures down.

1. When an atom crosses the boundary of a nearest-k selection, edges appear and vanish: how far does the energy jump?
2. Near a straight line of three atoms a dihedral angle is undefined: how large do gradient forces become?

Usage: python benchmarks/measure_limits.py [benchmarks/results/limits.json]
"""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule

import ejmp
from ejmp.graph.graph import EDGE_SETS
from ejmp.provenance import provenance


def make_model(graph):
    torch.manual_seed(0)
    sizes = {"emb_size_atom": 64, "emb_size_edge": 128}
    model = ejmp.JMP(dataclasses.replace(ejmp.jmp_s(blocks=2, scalar=True), **sizes)).double()
    ejmp.fit_scale_factors(model, [graph])
    return model


def keys(graph):
    """Return the edges of each set as (source, target, image), to see which change."""
    found = {}
    for name in EDGE_SETS:
        edges = getattr(graph, name)
        found[name] = set(zip(edges.source.tolist(), edges.target.tolist(), edges.image.tolist(), strict=True))
    return found


def energy(model, graph):
    with torch.no_grad():
        return model(graph).energy[0, 0].item()


def neighbor_jumps(max_neighbors=30, cutoff=12.0, length=0.1, steps=20):
    """Move one atom of a rattled Cu3Au crystal along a line; measure the jump at every change of an edge set."""
    atoms = bulk("Cu", cubic=True).repeat((2, 2, 1))
    atoms.symbols[::4] = "Au"
    atoms.rattle(0.05, seed=1)
    start, direction = atoms.positions[5].copy(), np.array([0.6, 0.64, 0.48])

    def graph(x):
        atoms.positions[5] = start + x * direction
        return ejmp.build_graph(atoms, cutoff, max_neighbors, dtype=torch.float64)

    model = make_model(graph(0.0))
    grid = np.linspace(0, length, steps + 1)
    rows = []
    for low, high in itertools.pairwise(grid):
        for below, above in bisect(graph, low, high):
            before, after = graph(below), graph(above)
            sets = keys(before), keys(after)
            changed = {name: len(sets[0][name] ^ sets[1][name]) for name in EDGE_SETS}
            jump = energy(model, after) - energy(model, before)
            rows.append({"x": below, "changed": changed, "jump": jump})
    ends = [energy(model, graph(x)) for x in grid]
    limited = ("main", "atom_edges", "quad_edges")
    jumps = {name: [abs(r["jump"]) for r in rows if r["changed"][name]] for name in limited}
    return {
        "system": f"Cu12Au4 crystal, {max_neighbors} neighbours, {cutoff} A; one atom moved by {length} A",
        "energy": ends[0],
        "energy_change_along_path": max(ends) - min(ends),
        "boundary_crossings": len(rows),
        "largest_jump": {name: max(values, default=0.0) for name, values in jumps.items()},
        "median_jump": {name: float(np.median(values)) if values else 0.0 for name, values in jumps.items()},
        "crossings": {name: len(values) for name, values in jumps.items()},
    }


def bisect(graph, low, high, width=1e-9):
    """Return the intervals of [low, high] in which an edge set changes, each narrowed to `width`."""
    if keys(graph(low)) == keys(graph(high)):
        return []
    if high - low < width:
        return [(low, high)]
    middle = (low + high) / 2
    return bisect(graph, low, middle, width) + bisect(graph, middle, high, width)


def linear_forces():
    """Bend linear molecules into a zigzag; report the largest gradient force at each bend."""
    acetylene = molecule("C2H2")
    carbon_dioxide = Atoms("OCO", [[0, 0, -1.16], [0, 0, 0], [0, 0, 1.16]])
    rows = []
    zigzag = torch.tensor([1.0, -0.6, 0.3, -0.1, 0.0, 0.0], dtype=torch.float64)
    for name, atoms in (("CO2", carbon_dioxide), ("C2H2", acetylene), ("CH3CN", molecule("CH3CN"))):
        graph = ejmp.build_graph(atoms, 12.0, dtype=torch.float64)
        model = make_model(ejmp.build_graph(molecule("CH3CH2OH"), 12.0, dtype=torch.float64))
        single = ejmp.JMP(model.config)
        single.load_state_dict(model.state_dict())
        for bend in (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
            positions = graph.positions.clone()
            positions[:, 0] += bend * zigzag[: len(atoms)]
            bent = graph.with_positions(positions)
            double = ejmp.gradient_forces(model, bent)
            rounded = ejmp.gradient_forces(single, bent.to(dtype=torch.float32))
            rows.append(
                {
                    "molecule": name,
                    "bend_A": bend,
                    "largest_force_float64": double.abs().max().item(),
                    "largest_force_float32": rounded.abs().max().item(),
                    "energy": energy(model, bent),
                    "finite_difference_error": difference_error(model, bent, double),
                }
            )
    return rows


def difference_error(model, graph, forces, step=1e-9):
    """Return the largest difference of the forces along x from the energy's central difference, in their unit."""
    worst = 0.0
    for atom in range(graph.num_atoms):
        ends = []
        for sign in (1, -1):
            positions = graph.positions.clone()
            positions[atom, 0] += sign * step
            ends.append(energy(model, graph.with_positions(positions)))
        worst = max(worst, abs(-(ends[0] - ends[1]) / (2 * step) - forces[atom, 0].item()))
    return worst


if __name__ == "__main__":
    result = {
        "benchmark": "limits",
        "model": "JMP-S at 64 atom and 128 edge channels, 2 blocks, scalar, random weights (seed 0), fitted "
        "ScaleFactors; energies in its own units",
        "neighbor_boundaries": [neighbor_jumps(), neighbor_jumps(max_neighbors=60)],
        "near_linear": linear_forces(),
        "provenance": provenance(torch.device("cpu")),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n")
