"""Build graphs that are absurd or large, each in a process of its own with limits; prints what became of each as JSON.

The processes are forks of one that has imported everything, and so take no longer than their graph.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np

import ejmp
from ejmp import Structure, build_graph

UNCUT = ejmp.GraphSettings(cutoff=12.0, atom_pairs=(12.0, 10_000))
SECONDS, MEMORY = 5, 3 << 30
"""Limits of a case: seconds of a processor and bytes."""


def cube(edge, num_atoms=1, **fields):
    """Atoms at random places of a periodic cube of a given edge in A."""
    positions = np.random.default_rng(0).random((num_atoms, 3)) * edge
    return Structure(numbers=np.full(num_atoms, 29), positions=positions, cell=np.eye(3) * edge, pbc=True, **fields)


def one_atom(cell, pbc=True):
    return Structure(numbers=[29], positions=[[0.0, 0.0, 0.0]], cell=cell, pbc=pbc)


def molecule(positions):
    return Structure(numbers=np.full(len(positions), 6), positions=positions)


def crowd(num_atoms, edge):
    return np.random.default_rng(1).random((num_atoms, 3)) * edge


def outlier(num_atoms):
    """A crowd with one atom far away, which makes its mean density small."""
    positions = crowd(num_atoms, 5.0)
    positions[0] = 9e5
    return positions


def fcc(repeats, a=3.61):
    """A crystal of 4 repeats^3 atoms."""
    cells = np.stack(np.meshgrid(*[np.arange(repeats)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    places = (cells + np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])).reshape(-1, 3) * a
    return Structure(numbers=np.full(len(places), 29), positions=places, cell=np.eye(3) * a * repeats, pbc=True)


def cells():
    """Cells of one atom, by name."""
    eye = np.eye(3)
    made = {f"1e{power}": eye * 10.0**power for power in (-310, -8, 9, 10, 80, 103, 110, 150, 300, 308)}
    made |= {f"one axis of 1e{power}": np.diag([4.0, 4.0, 10.0**power]) for power in (-310, 12, 150, 300)}
    made["volume 1e-8"] = np.diag([1e-4, 1e-2, 1e-2])
    made["flat"] = np.array([[4.0, 0, 0], [0, 4.0, 0], [1e8, 1e8, 1e-3]])
    return made


CASES = {
    **{f"cell {name}": lambda c=cell: build_graph(one_atom(c)) for name, cell in cells().items()},
    **{
        f"slab {name}": lambda c=cell: build_graph(one_atom(c, [True, False, True]))
        for name, cell in cells().items()
        if "axis" in name
    },
    "0.1 A, cutoff 12 A": lambda: build_graph(one_atom(np.eye(3) * 0.1), 12.0),
    "0.1 A, cutoff 1000 A": lambda: build_graph(one_atom(np.eye(3) * 0.1), 1000.0),
    "0.1 A, cutoff 1000 A, in torch": lambda: build_graph(one_atom(np.eye(3) * 0.1), 1000.0, backend="reference"),
    "3 A, cutoff 1000 A": lambda: build_graph(one_atom(np.eye(3) * 3.0), 1000.0),
    "a needle, cutoff 1000 A": lambda: build_graph(one_atom(np.diag([0.1, 1e6, 1e6])), 1000.0),
    "1e5 atoms in 5 A": lambda: build_graph(molecule(crowd(100_000, 5.0))),
    "1e5 atoms in 5 A, in torch": lambda: build_graph(molecule(crowd(100_000, 5.0)), backend="reference"),
    "1e5 atoms in a cell of 5 A": lambda: build_graph(cube(5.0, 100_000)),
    "1e5 atoms on one spot": lambda: build_graph(molecule(np.zeros((100_000, 3)))),
    "1e5 atoms in 5 A and one far away": lambda: build_graph(molecule(outlier(100_000))),
    "many of them": lambda: build_graph([cube(12.0, 300)] * 100, 19.0),
    "coordinates of 1e12": lambda: build_graph(molecule(np.array([[0.0, 0, 0], [1e12, 0, 0]]))),
    "coordinates of 1e300": lambda: build_graph(molecule(np.array([[0.0, 0, 0], [1e300, 0, 0]]))),
    "denormal coordinates": lambda: build_graph(molecule(np.array([[5e-324, 0, 0], [1.2, 5e-324, -5e-324]]))),
    "far apart": lambda: build_graph(molecule(np.array([[-1e6, 0, 0], [1e6, 1e6, 1e6], [1e6, 1e6, 1e6 - 1]]))),
    "a crystal of 6,912 atoms": lambda: build_graph(fcc(12), 6.0),
}
LARGE = {
    "a metal of 108,000 atoms, 6 A": lambda: build_graph(fcc(30), 6.0),
    "a framework of 10,000 atoms, 12 A": lambda: build_graph(framework(), settings=UNCUT),
}


def framework():
    """A periodic structure of 10,000 atoms, no two closer than 1 A, as dense as a metal-organic framework."""
    points = 1.6 * np.stack(np.meshgrid(*[np.arange(34)] * 3, indexing="ij"), -1).reshape(-1, 3)
    rng = np.random.default_rng(2)
    chosen = points[rng.permutation(len(points))[:10_000]] + rng.uniform(-0.3, 0.3, (10_000, 3))
    return Structure(numbers=np.full(10_000, 6), positions=chosen, cell=np.eye(3) * 1.6 * 34, pbc=True)


def outcome_of(call):
    """Return in a fork what a call's graph is, or its error, or the signal that ended it."""
    reader, writer = os.pipe()
    start, child = time.perf_counter(), os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        signal.alarm(20 * SECONDS)  # where it waits
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        if "ASAN_OPTIONS" not in os.environ:  # its shadow memory is larger than any limit
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        try:
            pairs = call().atom_pairs
            found = {"pairs": pairs.num_edges, "degree": pairs.max_degree}
        except BaseException as error:  # noqa: BLE001 - all of them are reported
            found = {"error": f"{type(error).__name__}: {error}"}
        os.write(writer, json.dumps(found).encode()[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    killed = {"killed": signal.Signals(os.WTERMSIG(status)).name} if os.WIFSIGNALED(status) else {}
    return (json.loads(said) if said else {}) | killed | {"seconds": time.perf_counter() - start}


if __name__ == "__main__":
    chosen = LARGE if sys.argv[1:] == ["large"] else CASES
    SECONDS = 60 if chosen is LARGE else SECONDS
    MEMORY *= 2 if chosen is LARGE else 1
    assert ejmp.build_graph(cube(4.0)).num_atoms == 1
    json.dump({name: outcome_of(call) for name, call in chosen.items()}, sys.stdout)
