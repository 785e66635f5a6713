"""Graphs of absurd size are refused in seconds, before they take memory; large honest ones are built."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.inputs import environment, require_native
from support.large_graphs import CASES, LARGE, cube, fcc, framework, one_atom

from ejmp import GraphSettings, build_graph
from ejmp.graph import settings

PAIRS, THIN = "pairs of atoms are within reach", "cell: a periodic cell needs a volume"
REFUSED = {
    **dict.fromkeys(
        ["cell 1e-310", "cell 1e-8", "cell volume 1e-8", "cell flat"], "cell: a periodic cell needs a volume"
    ),
    **dict.fromkeys([f"cell 1e{n}" for n in (10, 80, 103, 110, 150, 300, 308)], "cell: lattice vectors longer"),
    **dict.fromkeys(["cell one axis of 1e-310", "slab one axis of 1e-310"], THIN),
    **{f"{kind} one axis of 1e{n}": "cell: lattice" for kind in ("cell", "slab") for n in (12, 150, 300)},
    **dict.fromkeys(["0.1 A, cutoff 1000 A", "0.1 A, cutoff 1000 A, in torch", "3 A, cutoff 1000 A"], PAIRS),
    **dict.fromkeys(["1e5 atoms in 5 A", "1e5 atoms in 5 A, in torch", "1e5 atoms in a cell of 5 A"], PAIRS),
    **dict.fromkeys(["1e5 atoms on one spot", "1e5 atoms in 5 A and one far away", "many of them"], PAIRS),
    **dict.fromkeys(["coordinates of 1e12", "coordinates of 1e300"], "positions: coordinates beyond"),
}


def points_within(radius):
    """Return how many points but the origin a lattice of cubes of edge 1 has within a radius."""
    x = np.arange(-int(radius), int(radius) + 1)
    return int((x[:, None, None] ** 2 + x[:, None] ** 2 + x**2 <= radius**2).sum()) - 1


# An atom has at most 1,000 pairs. Within 6 A of an atom of copper (a = 3.61 A) lie its first five shells.
BUILT = {
    "cell 1e9": 0,
    "0.1 A, cutoff 12 A": min(1000, points_within(120)),
    "a needle, cutoff 1000 A": 1000,
    "denormal coordinates": 2,
    "far apart": 2,
    "a crystal of 6,912 atoms": 6912 * (12 + 6 + 24 + 12 + 24),
}


def run(*arguments):
    command = [sys.executable, "-m", "support.large_graphs", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def outcomes():
    require_native()
    return run()


def test_every_case_is_here():
    assert set(REFUSED) | set(BUILT) == set(CASES)


@pytest.mark.parametrize("name", REFUSED)
def test_absurd_graphs_are_refused(outcomes, name):
    outcome = outcomes[name]
    assert outcome.get("error", str(outcome)).startswith("ValueError: structure 0: "), outcome
    assert REFUSED[name] in outcome["error"]


@pytest.mark.parametrize("name", BUILT)
def test_strange_graphs_are_built(outcomes, name):
    assert outcomes[name].get("pairs") == BUILT[name], outcomes[name]


@pytest.mark.slow
def test_large_graphs_are_built():
    require_native()
    from scipy.spatial import cKDTree

    atoms = framework()
    tree = cKDTree(atoms.positions % atoms.cell[0, 0], boxsize=atoms.cell[0, 0])
    expected = {"a metal of 108,000 atoms, 6 A": 108_000 * (12 + 6 + 24 + 12 + 24)}
    reach = 12.0 + 5e-7  # lengths are rounded to 1e-6 A before they are compared with the cutoff
    expected["a framework of 10,000 atoms, 12 A"] = int(tree.count_neighbors(tree, reach)) - 10_000
    assert set(expected) == set(LARGE)
    assert {name: outcome.get("pairs", outcome) for name, outcome in run("large").items()} == expected


def test_an_error_names_the_number_of_pairs_and_the_limit(monkeypatch, backend):
    """1,000 atoms in a cube of 20 A have about 1000 * 4/3 pi 6^3 * 1000 / 20^3 = 113,000 pairs within 6 A."""
    crystal = cube(20.0, 1000)
    monkeypatch.setenv("EJMP_MAX_PAIRS", "5e4")
    with pytest.raises(ValueError, match=rf"^structure 1: cutoff: about .* {PAIRS}") as error:
        build_graph([one_atom(np.eye(3) * 9), crystal], 6.0, backend=backend)
    assert 1e5 < float(str(error.value).split("about ")[1].split()[0]) < 5e6
    assert "50000 are allowed (max_pairs; EJMP_MAX_PAIRS" in str(error.value)
    monkeypatch.setenv("EJMP_MAX_PAIRS", "")
    assert settings.max_pairs() == settings.MAX_PAIRS


@pytest.mark.parametrize("value", ["0", "-3", "many", "nan", "inf", "1e30"])
def test_a_wrong_limit_is_named(monkeypatch, value):
    monkeypatch.setenv("EJMP_MAX_PAIRS", value)
    with pytest.raises(ValueError, match=f"^EJMP_MAX_PAIRS: expected a positive number, got '{value}'"):
        build_graph(fcc(1))


def pairs_within(atoms, cutoff):
    """Count all pairs of a periodic structure with a small cell one by one."""
    reach = int(cutoff / np.linalg.norm(atoms.cell, axis=1).min()) + 2
    cells = np.array(list(itertools.product(range(-reach, reach + 1), repeat=3)))
    delta = atoms.positions[:, None, None] - atoms.positions[None, :, None] - cells @ atoms.cell
    return int((np.linalg.norm(delta, axis=-1) <= cutoff).sum()) - len(atoms.positions)


@pytest.mark.parametrize(
    ("edge", "num_atoms", "cutoff"), [(2.0, 1, 9.0), (4.0, 3, 8.0), (9.0, 40, 6.0), (10.0, 100, 5.0)]
)
def test_the_estimate_is_near_the_number_of_pairs(monkeypatch, edge, num_atoms, cutoff):
    require_native()
    atoms = cube(edge, num_atoms)
    true = pairs_within(atoms, cutoff)
    monkeypatch.setenv("EJMP_MAX_PAIRS", "1")
    with pytest.raises(ValueError, match=PAIRS) as error:
        build_graph(atoms, cutoff)
    estimate = float(str(error.value).split("about ")[1].split()[0])
    assert 0.8 * true <= estimate <= 6 * true


@pytest.mark.parametrize("most", [7, 1000])
def test_many_candidates_are_pruned_on_the_way(most):
    """More than 2^18 atoms in reach: the nearest are kept, whichever came first."""
    require_native()
    chosen = GraphSettings(cutoff=5.0, max_neighbors=7, atom_pairs=(5.0, most))
    graph = build_graph(one_atom(np.eye(3) * 0.1), settings=chosen, dtype=torch.float64)
    lengths = sorted(0.1 * np.linalg.norm(np.array(n)) for n in itertools.product(range(-8, 9), repeat=3))[1:]
    assert graph.atom_pairs.distance.tolist() == pytest.approx(lengths[:most], rel=1e-9)
