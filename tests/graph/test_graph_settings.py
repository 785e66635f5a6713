"""Graphs from GraphSettings: the edges of fairchem 1.x, of a brute-force search, and whole shells in crystals."""

import dataclasses
import itertools
from collections import Counter

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from support.edges import brute_force, differences, edges_of, keys, rows
from support.inputs import BACKENDS, require_native

from ejmp import GraphSettings, Structure, build_graph, graph_from_edges
from ejmp.graph.graph import EDGE_SETS
from ejmp.graph.shells import cut_shells
from ejmp_kernels import availability, neighbors

DOUBLE = {"dtype": torch.float64}
SILICON, SALT = bulk("Si", a=5.43, cubic=True), bulk("NaCl", "rocksalt", a=5.64, cubic=True)
FOUR = GraphSettings(
    cutoff=6.0, max_neighbors=14, quad_edges=(5.0, 5), atom_edges=(7.0, 10), atom_pairs=(9.0, 60), quad_tags=(0, 1, 2)
)
FAIRCHEM = {
    **dict.fromkeys(("triclinic", "slab", "oxide", "batch"), GraphSettings(periodic="all")),
    "cutoffs": FOUR,
    "crystal_not_strict": GraphSettings(ties="keep"),
}


def random_batch(seed):
    """Return six structures with whole-number lattices, so that many distances are equal, and settings for each."""
    rng = np.random.default_rng(seed)
    structures, settings = [], []
    for b in range(6):
        cells = rng.integers(1, 3, 3)
        atoms = bulk("Cu", "fcc", a=3.6, cubic=True) * cells
        atoms.set_tags(rng.integers(0, 3, len(atoms)))
        atoms.pbc = rng.random(3) < 0.7
        if b % 2:
            atoms.rattle(0.004, seed=seed)
        structures.append(atoms)
        pairs, k = float(rng.uniform(5, 8)), int(rng.integers(2, 20))
        smaller = [(float(rng.uniform(3, pairs)), int(rng.integers(1, 2 * k))) for _ in range(2)]
        settings.append(
            GraphSettings(
                cutoff=pairs - 0.5,
                max_neighbors=k,
                atom_pairs=(pairs, int(rng.integers(2 * k, 100))),
                atom_edges=smaller[0],
                quad_edges=smaller[1],
                ties="keep" if rng.random() < 0.6 else "cut",
                quad_tags=tuple(rng.permutation(3)[: rng.integers(4)].tolist()),
                tags="none" if b == 5 else "oc20",
                periodic="all" if b == 4 else "given",
            )
        )
    return structures, settings


@pytest.mark.parametrize("case", FAIRCHEM)
def test_edges_are_those_of_fairchem(case, shared, backend):
    with np.load(shared(f"golden/fairchem/{case}.npz")) as file:
        values = dict(file)
    structures = []
    for b, cell in enumerate(values["cell"]):
        here = values["batch"] == b
        fields = {name: values[name][here] for name in ("numbers", "positions", "tags")}
        structures.append(Structure(**fields, cell=cell, pbc=FAIRCHEM[case].periodic == "given"))
    graph = build_graph(structures, settings=FAIRCHEM[case], backend=backend, **DOUBLE)
    theirs = rows(values["main_edge_index"], -values["main_cell_offset"])  # there, an offset shifts the target
    assert Counter(keys(graph)["main"]) == Counter(theirs)
    counts = {"main": "n_main", "atom_edges": "n_a2ee2a", "quad_edges": "n_qint", "atom_pairs": "n_a2a"}
    for name, key in counts.items():
        assert getattr(graph, name).num_edges == values[key]


def chosen(edges, cutoff, most, settings, square):
    """Return those of one atom's edges (target, rank, ...) that a set keeps, by the words of the documentation."""
    inside = [edge for edge in edges if edge[1] <= round(cutoff * 1e6)]
    if len(inside) <= most:
        return inside
    if settings.ties == "cut":
        return inside[:most]
    beyond = inside[most][1] * 1e-6
    last = (beyond**2 + 0.01) ** 0.5 if square else beyond + 0.01
    return [edge for edge in inside if edge[1] * 1e-6 <= last]


def expected_sets(atoms, settings):
    """Return the edges of each set in plain Python, in the graph's order."""
    if settings.periodic == "all":
        atoms = atoms.copy()
        atoms.pbc = True
    tags = np.full(len(atoms), 2) if settings.tags == "none" else atoms.get_tags()
    pairs, *reach = settings.reach(len(atoms))
    lists = [chosen(edges, *pairs, settings, square=True) for edges in brute_force(atoms, pairs[0])]
    main, near, quad = ([chosen(edges, *pair, settings, square=False) for edges in lists] for pair in reach)
    half = [e for edges in main for e in edges if e[2] < e[0] or (e[2] == e[0] and e[3:] < (0, 0, 0))]
    closed = sorted(half + [(s, rank, t, -x, -y, -z) for t, rank, s, x, y, z in half])
    quad = [[e for e in edges if {tags[e[0]], tags[e[2]]} & set(settings.quad_tags)] for edges in quad]
    sets = {"main": [closed], "atom_edges": near, "quad_edges": quad, "atom_pairs": lists}
    return {name: [(s, t, *o) for edges in some for t, _, s, *o in edges] for name, some in sets.items()}


@pytest.mark.parametrize("seed", range(2))
def test_general_settings_against_brute_force(seed, backend):
    for atoms, settings in zip(*random_batch(seed), strict=True):
        assert keys(build_graph(atoms, settings=settings, backend=backend)) == expected_sets(atoms, settings)


@pytest.mark.parametrize("seed", range(3))
def test_native_is_the_reference_and_a_batch_is_its_parts(seed):
    require_native()
    structures, settings = random_batch(seed)
    native, reference = (build_graph(structures, settings=settings, backend=b, **DOUBLE) for b in BACKENDS)
    assert differences(native, reference) == []
    for b, (atoms, own) in enumerate(zip(structures, settings, strict=True)):
        alone = build_graph(atoms, settings=own, **DOUBLE)
        for name in EDGE_SETS:
            here = native.batch[getattr(native, name).target] == b
            assert torch.equal(getattr(native, name).distance[here], getattr(alone, name).distance)


def test_settings_say_what_the_two_numbers_say(golden, monkeypatch):
    cutoff, most = golden.values["cutoff"].tolist(), golden.values["max_neighbors"].tolist()
    settings = [GraphSettings(cutoff=c, max_neighbors=k) for c, k in zip(cutoff, most, strict=True)]
    # fairchem's numbers, if the four cutoffs are one, are searched for as fast.
    all_named = [
        dataclasses.replace(s, atom_pairs=a, atom_edges=e, quad_edges=q)
        for s in settings
        for a, _, e, q in [s.reach(1)]
    ]
    if availability.why_unavailable() is None:
        monkeypatch.setattr(neighbors, "_select_sets", None)
    for given in (settings, all_named):
        assert differences(golden.graph(), build_graph(golden.structures, settings=given, **DOUBLE)) == []


def test_larger_structures_get_fewer_neighbors(backend):
    settings = GraphSettings(cutoff=5.0, max_neighbors=20, fewer_above=((7, 10), (8, 5)))
    cells = [bulk("Cu", a=3.6) * (n, 1, 1) for n in (7, 8, 9)]
    graph = build_graph(cells, settings=settings, backend=backend)
    assert differences(graph, build_graph(cells, 5.0, [20, 10, 5], backend=backend)) == []


def test_what_tags_mean(backend):
    layers = bulk("Cu", a=3.6) * (1, 1, 3)
    layers.set_tags([0, 1, 3])  # ASE's slabs number their layers
    with pytest.raises(ValueError, match=r"^structure 0: tags"):
        build_graph(layers, 4.0, backend=backend)
    graph = build_graph(layers, settings=GraphSettings(cutoff=4.0, tags="none"), backend=backend)
    assert graph.tags.tolist() == [2, 2, 2]
    layers.set_tags([0, 1, 2])
    counts = [
        build_graph(layers, settings=GraphSettings(cutoff=2.6, quad_tags=tags), backend=backend).quad_edges.num_edges
        for tags in ((), (0,), (0, 1, 2))
    ]
    assert counts[0] == 0 < counts[1] < counts[2] == 3 * 8


def test_every_lattice_vector_is_periodic(backend):
    everywhere = GraphSettings(cutoff=6.0, periodic="all")
    boxed, free = molecule("H2O", vacuum=2.0), molecule("H2O")
    graph = build_graph([boxed, free], settings=everywhere, backend=backend)
    assert graph.pbc.tolist() == [[True] * 3, [False] * 3]
    boxed.pbc = True
    assert differences(graph, build_graph([boxed, free], 6.0, backend=backend)) == []
    boxed.set_cell([boxed.cell[0], [0, 0, 0], boxed.cell[2]])
    boxed.pbc = False
    assert build_graph(boxed, settings=everywhere, backend=backend).pbc.tolist() == [[True, False, True]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutoff": 8.0}, "^cutoff: expected none beside settings"),
        ({"max_neighbors": [20]}, "^max_neighbors: expected none beside settings"),
        ({"settings": [FOUR, FOUR]}, r"^settings: expected GraphSettings, one or one per structure \(1\), got 2"),
        ({"settings": [12.0]}, "^settings: expected GraphSettings.* got float"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_graph(SALT, **{"settings": FOUR} | options)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"atom_pairs": (11.0, 1000)}, "atom_pairs"),
        ({"atom_pairs": (12.0, 29)}, "atom_pairs"),
        ({"quad_edges": (13.0, 8)}, "atom_pairs"),
        ({"atom_edges": (12.0, 1001)}, "atom_pairs"),
        ({"atom_pairs": (12.0, 100), "fewer_above": ((50, 200),)}, "atom_pairs"),
        ({"fewer_above": ((100, 10), (50, 20))}, "fewer_above"),
        ({"fewer_above": ((0, 10),)}, "fewer_above"),
        ({"quad_tags": (3,)}, "quad_tags"),
        ({"ties": "all"}, "ties"),
    ],
)
def test_impossible_settings_are_named(fields, name):
    with pytest.raises(ValueError, match=f"^GraphSettings.{name}: expected"):
        GraphSettings(**fields)


@pytest.mark.parametrize("crystal", [SILICON, SALT], ids=["Si", "NaCl"])
def test_whole_shells_keep_the_symmetry(crystal, tiny):
    forces, energies = {}, {}
    for ties in ("cut", "keep"):
        settings = GraphSettings(cutoff=7.0, ties=ties)
        one, two = (tiny(build_graph(atoms, settings=settings, **DOUBLE)) for atoms in (crystal, crystal * (2, 1, 1)))
        forces[ties] = one.forces.abs().max()
        energies[ties] = (two.energy - 2 * one.energy).abs().max()
    assert forces["keep"] < 1e-10
    assert forces["cut"] > 0.1
    assert energies["keep"] < 1e-9
    assert energies["cut"] > 1e-2


def test_cut_shells_are_found(backend):
    settings = GraphSettings(cutoff=6.5)
    graph = build_graph([SALT, SILICON, molecule("CH4")], settings=settings, backend=backend)
    found = cut_shells(graph, settings)
    assert list(found) == ["main", "atom_edges", "quad_edges"]
    assert all(atoms.tolist() == list(range(16)) for atoms in found.values())
    whole = dataclasses.replace(settings, ties="keep")
    assert cut_shells(build_graph(SALT, settings=whole, backend=backend), whole) == {}
    # Shells of rock salt: 6, 12, 8, 6, 24, 24 neighbours, the next to last at a sqrt(5) / 2 = 6.306 A.
    for k, expected in ((18, []), (19, ["main"]), (26, []), (33, ["main"])):
        shells = GraphSettings(cutoff=6.5, max_neighbors=k, atom_edges=(6.5, 6), quad_edges=(6.5, 6))
        assert list(cut_shells(build_graph(SALT, settings=shells, backend=backend), shells)) == expected
    beyond = GraphSettings(
        cutoff=6.3, max_neighbors=33, atom_edges=(6.5, 6), quad_edges=(6.5, 6), atom_pairs=(7.0, 1000)
    )
    assert cut_shells(build_graph(SALT, settings=beyond, backend=backend), beyond) == {}


def test_cut_pairs_are_found_by_another_search(backend):
    for most, expected in ((32, []), (31, ["atom_pairs"]), (33, ["atom_pairs"])):
        six = {"max_neighbors": 6, "atom_edges": (6.5, 6), "quad_edges": (6.5, 6)}
        settings = GraphSettings(cutoff=6.5, atom_pairs=(6.5, most), **six)
        graph = build_graph([molecule("CH4"), SALT], settings=settings, backend=backend)
        assert list(cut_shells(graph, settings)) == expected


def test_the_tolerance_of_cut_shells():
    line = ase.Atoms("H4", [[0, 0, 0], [3, 0, 0], [0, 3.004, 0], [0, 0, 5]])
    settings = GraphSettings(cutoff=3.5, max_neighbors=1)
    graph = build_graph(line, settings=settings, **DOUBLE)
    assert cut_shells(graph, settings)["main"].tolist() == [0]
    assert "main" not in cut_shells(graph, settings, tolerance=0.003)
    with pytest.raises(ValueError, match=r"^settings: expected one or 1, got 2"):
        cut_shells(graph, [settings] * 2)


def test_a_graph_is_shown_on_one_line():
    graph = build_graph([molecule("H2O")] * 2, 8.0)
    sets = "main 12, atom_edges 12, quad_edges 12, atom_pairs 12"
    assert repr(graph) == f"AtomGraph(B=2, N=6, edges: {sets}; float32, cpu)"
    assert repr(graph.main) == "EdgeSet(E=12, N=6, max_degree=2, float32, cpu)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_message_is_short():
    water = molecule("H2O")
    graph = build_graph(water)
    for call in (
        lambda: graph.to("cuda"),
        lambda: build_graph(water, device="cuda:0"),
        lambda: graph_from_edges(water, edges_of(graph), device="cuda"),
    ):
        with pytest.raises(
            RuntimeError, match=r'^device: expected one of this machine, got "cuda(:0)?", .* use "cpu"$'
        ):
            call()


def test_pyg_data_is_pointed_to_its_reader():
    data = type("Data", (), {"__module__": "torch_geometric.data.data", "__iter__": lambda _: iter(())})()
    for structures, where in itertools.product((data, [molecule("H2O"), data]), (r"structures|structure 1",)):
        with pytest.raises(ValueError, match=rf"^({where}): a torch_geometric Data: .*ejmp\.pyg\.from_data"):
            build_graph(structures)
