"""The graph agrees with ASE's neighbour list, the golden edges and a brute-force search, and keeps its invariants."""

import dataclasses
import io
import itertools
import zipfile

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk, fcc111, molecule
from ase.neighborlist import neighbor_list
from support.edges import brute_force, differences, edges_of, keys, rows
from support.inputs import BACKENDS, require_native
from support.tolerances import assert_close

from ejmp import Structure, build_graph, graph_from_edges
from ejmp.graph.graph import EDGE_SETS, IMAGE_BASE, pack_offset

UPSTREAM = {"main": "main", "atom_edges": "a2ee2a", "quad_edges": "qint", "atom_pairs": "a2a"}
UNCUT = 100_000


def random_atoms(seed, num_atoms=None, pbc=None):
    """Return a random triclinic structure, periodic in some directions, with atoms up to four cells outside.

    No two atoms are closer than 0.5 A.
    """
    rng = np.random.default_rng(seed)
    n = num_atoms or rng.integers(4, 9)
    cell = np.diag(rng.uniform(3, 7, 3)) + rng.uniform(-1, 1, (3, 3))
    atoms = ase.Atoms(rng.integers(1, 90, n), cell=cell, pbc=rng.random(3) < 0.6 if pbc is None else pbc)
    atoms.set_tags(rng.integers(0, 3, n))
    while True:
        atoms.set_scaled_positions(rng.uniform(-3, 4, (n, 3)))
        if not len(neighbor_list("i", atoms, 0.5)):
            return atoms


SLAB = fcc111("Pt", (2, 2, 3))
SLAB.set_cell([*SLAB.cell[:2], np.zeros(3)])
SLAB.set_tags([0] * 4 + [1] * 8)
CHAIN = ase.Atoms("CHO", [[0, 0, 0], [0.9, 0.3, 0], [-0.2, 1.2, 0.4]], pbc=[False, True, False])
CHAIN.set_cell([np.zeros(3), [1.0, 2.5, 0.5], np.zeros(3)])
FAR = random_atoms(7, num_atoms=6, pbc=True)
FAR.positions += np.random.default_rng(8).integers(-40, 41, (6, 3)) @ FAR.cell.array
HARD = {
    "molecule": (molecule("CH3CH2OH"), 5.0),
    "triclinic": (random_atoms(1, num_atoms=8, pbc=True), 6.0),
    "one atom in a small cell": (bulk("Cu", a=3.6), 8.0),
    "slab": (SLAB, 6.0),
    "chain": (CHAIN, 7.0),
    "far outside": (FAR, 6.0),
    **{f"random {seed}": (random_atoms(seed), 4.0 + seed % 4) for seed in range(10, 16)},
}
FCC, DIAMOND = bulk("Cu", a=3.61, cubic=True) * (3, 3, 3), bulk("Si", a=5.43, cubic=True)
ROCKSALT = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
ROCKSALT.set_tags([0, 0, 0, 1, 0, 2, 0, 0])
ALL = [*(atoms for atoms, _ in HARD.values()), FCC, DIAMOND, ROCKSALT]


@pytest.fixture(params=HARD)
def hard(request):
    return HARD[request.param]


def check_invariants(graph):
    for name in EDGE_SETS:
        edges = getattr(graph, name)
        degree = torch.bincount(edges.target, minlength=graph.num_atoms)
        assert (edges.target.diff() >= 0).all()
        assert torch.equal(edges.ptr, torch.nn.functional.pad(degree.cumsum(0), (1, 0)))
        assert (type(edges.max_degree), edges.max_degree) == (int, max(degree.tolist()))
        assert (torch.linalg.vector_norm(edges.vector, dim=1) - 1).abs().le(1e-12).all()
        distinct, inverse = edges.offset.unique(dim=0, return_inverse=True)
        assert len(pack_offset(distinct).unique()) == len(distinct)
        assert torch.equal(pack_offset(distinct)[inverse], edges.image)
        assert torch.equal(edges.image + edges.image.flip(0), pack_offset(edges.offset + edges.offset.flip(0)))
    main, swap = graph.main, graph.main.swap
    assert torch.equal(swap[swap], torch.arange(main.num_edges))
    assert torch.equal(main.source[swap], main.target)
    assert torch.equal(main.offset[swap], -main.offset)
    assert torch.equal(main.vector[swap], -main.vector)
    assert torch.equal(main.distance[swap], main.distance)


def test_golden_edges(golden, backend):
    graph = golden.graph(backend=backend)
    check_invariants(graph)
    ours, values = keys(graph), golden.values
    theirs = {name: rows(values[f"{u}_edge_index"], values[f"{u}_cell_offset"]) for name, u in UPSTREAM.items()}
    for name in EDGE_SETS:
        assert sorted(ours[name]) == sorted(theirs[name])
    distance = dict(zip(theirs["main"], values["main_distance"].tolist(), strict=True))
    assert graph.main.distance.tolist() == pytest.approx([distance[key] for key in ours["main"]], rel=1e-12, abs=0)


def test_pairs_are_those_of_ase(hard, backend):
    atoms, cutoff = hard
    graph = build_graph(atoms, cutoff, UNCUT, dtype=torch.float64, backend=backend)
    # ASE's D = r_j - r_i + S.cell is minus our vector if i is the target, j the source and S the source's offset.
    target, source, offset, vector = neighbor_list("ijSD", atoms, cutoff)
    expected = dict(zip(rows(np.stack([source, target]), offset), -vector, strict=True))
    pairs, found = graph.atom_pairs, keys(graph)["atom_pairs"]
    assert len(expected) > 0
    assert sorted(found) == sorted(expected)
    ours = (pairs.vector * pairs.distance[:, None]).numpy()
    np.testing.assert_allclose(ours, [expected[key] for key in found], rtol=0, atol=1e-9)


def test_an_atom_at_the_cutoff_is_a_neighbor(backend):
    graphs = [build_graph(bulk("Cu", a=3.6), cutoff, backend=backend) for cutoff in (3.6, 3.5999998, 3.599999)]
    assert [graph.atom_pairs.num_edges for graph in graphs] == [12 + 6, 12 + 6, 12]


SEARCHES = {
    "fcc": ([FCC], 6.0, 30),
    "fcc, shells cut": ([FCC], 4.0, 7),
    "diamond": ([DIAMOND], 7.0, 10),
    "rocksalt": ([ROCKSALT], 9.0, 4),
    "batch": (ALL, [4.0 + b % 5 / 2 for b in range(15)], [1 + 7 * b % 31 for b in range(15)]),
}


@pytest.mark.parametrize("case", SEARCHES)
def test_native_is_the_reference_bit_for_bit(case):
    require_native()
    native, reference = (build_graph(*SEARCHES[case], dtype=torch.float64, backend=name) for name in BACKENDS)
    assert differences(native, reference) == []
    check_invariants(native)


def test_native_is_the_reference_on_mofs(shared):
    require_native()
    with zipfile.ZipFile(shared("data/mofs/odac23_pristine_mofs.zip")) as archive:
        files = sorted((f for f in archive.infolist() if f.filename.endswith(".cif")), key=lambda f: f.file_size)
        picked = [archive.read(files[len(files) * percent // 100]).decode() for percent in (0, 10, 20, 35, 50)]
    mofs = [ase.io.read(io.StringIO(text), format="cif") for text in picked]
    assert len({len(atoms) for atoms in mofs}) == 5
    native, reference = (build_graph(mofs, 19.0, [30, 10, 5, 10, 5], backend=name) for name in BACKENDS)
    assert differences(native, reference) == []


@pytest.mark.parametrize(
    ("atoms", "cutoff", "most"),
    [(ROCKSALT, 9.0, 4), (ROCKSALT, 6.0, 14), (DIAMOND, 7.0, 10), (bulk("Cu", a=3.6), 9.0, 6)],
)
def test_ties_are_resolved_by_the_rule(atoms, cutoff, most, backend):
    found = brute_force(atoms, cutoff)
    assert all(edges[most - 1][1] == edges[most][1] for edges in found), "no tie at the limit"
    base, pairs, near, middle = (
        [edge for edges in found for edge in edges[:k]]
        for k in (most, most * 1000 // 30, most * 20 // 30, most * 8 // 30)
    )
    tags = atoms.get_tags() if atoms.has("tags") else np.full(len(atoms), 2)
    quad = [(t, rank, s, *o) for t, rank, s, *o in middle if tags[t] > 0 or tags[s] > 0]
    half = [(t, rank, s, *o) for t, rank, s, *o in base if s < t or (s == t and o < [0, 0, 0])]
    main = sorted(half + [(s, rank, t, -x, -y, -z) for t, rank, s, x, y, z in half])
    expected = {"main": main, "atom_edges": near, "quad_edges": quad, "atom_pairs": pairs}
    expected = {name: [(s, t, *o) for t, _, s, *o in edges] for name, edges in expected.items()}
    graph = build_graph(atoms, cutoff, most, backend=backend)
    assert keys(graph) == expected
    swapped = [(t, s, -x, -y, -z) for s, t, x, y, z in expected["main"]]
    assert graph.main.swap.tolist() == [expected["main"].index(key) for key in swapped]


def test_images_of_large_offsets():
    limit = IMAGE_BASE >> 3
    offset = torch.cartesian_prod(*[torch.tensor([-limit, -1, 0, 1, limit])] * 3)
    assert len(pack_offset(offset).unique()) == len(offset)
    with pytest.raises(ValueError, match=r"^offset: .* cells away"):
        pack_offset(torch.tensor([[0, 0, -limit - 1]]))


def test_a_batch_is_its_parts(backend):
    structures, cutoffs = zip(*HARD.values(), strict=True)
    most = [3 + 2 * b for b in range(len(structures))]
    options = {"dtype": torch.float64, "backend": backend}
    batch = build_graph(structures, cutoffs, most, **options)
    alone = [build_graph(*part, **options) for part in zip(structures, cutoffs, most, strict=True)]
    assert batch.ptr.tolist() == [0, *itertools.accumulate(len(atoms) for atoms in structures)]
    for name in EDGE_SETS:
        parts = [(first, keys(graph)[name]) for graph, first in zip(alone, batch.ptr.tolist(), strict=False)]
        assert keys(batch)[name] == [(s + first, t + first, *o) for first, part in parts for s, t, *o in part]
        assert torch.equal(getattr(batch, name).distance, torch.cat([getattr(g, name).distance for g in alone]))


@pytest.mark.parametrize(("most", "names"), [(UNCUT, EDGE_SETS), (5, ("atom_edges", "atom_pairs"))])
def test_translation_wrapping_and_rotation_keep_distances(hard, most, names):
    atoms, cutoff = hard
    moved, rotated = atoms.copy(), atoms.copy()
    moved.positions += [0.37, -11.3, 5.71]
    moved.wrap()
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
    turn *= np.linalg.det(turn)
    rotated.set_cell(atoms.cell.array @ turn)
    rotated.positions = atoms.positions @ turn
    graph, *others = (build_graph(a, cutoff, most, dtype=torch.float64) for a in (atoms, moved, rotated))
    for other, name in itertools.product(others, names):
        assert_close(getattr(other, name).distance.sort().values, getattr(graph, name).distance.sort().values)


def test_permuted_atoms_have_permuted_edges(hard):
    atoms, cutoff = hard
    order = np.random.default_rng(4).permutation(len(atoms))
    before, after = (keys(build_graph(a, cutoff, UNCUT)) for a in (atoms, atoms[order]))
    for name in EDGE_SETS:
        assert sorted((order[s], order[t], *o) for s, t, *o in after[name]) == sorted(before[name])


def test_distances_are_differentiable_twice():
    atoms = random_atoms(21, num_atoms=3, pbc=True)
    positions = torch.tensor(atoms.positions, requires_grad=True)

    def rebuild(positions, dtype=torch.float64):
        structure = Structure(numbers=atoms.numbers, positions=positions, cell=atoms.cell, pbc=atoms.pbc)
        return build_graph(structure, 3.6, 10, dtype=dtype)

    fixed = rebuild(positions.detach())
    assert 5 < fixed.main.num_edges < 30
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda p: (fixed.with_positions(p).main.distance, fixed.with_positions(p).main.vector), positions)
    assert torch.autograd.gradcheck(lambda p: rebuild(p).main.distance, positions)
    single = positions.detach().float().requires_grad_()
    rebuild(single, torch.float32).main.vector[:, 0].square().sum().backward()
    assert single.grad.abs().max() > 0.01


def test_with_positions_recomputes_the_geometry(golden):
    graph = golden.graph()
    assert differences(graph, graph.with_positions(graph.positions)) == []
    positions = graph.positions + 0.1 * torch.rand(graph.positions.shape, generator=torch.Generator().manual_seed(0))
    moved, r, cell = graph.with_positions(positions), positions.numpy(), graph.cell.numpy()[graph.batch]
    for name in EDGE_SETS:
        e = getattr(moved, name)
        vector = r[e.target] - r[e.source] - np.einsum("ei,eix->ex", e.offset.numpy(), cell[e.target])
        assert_close(e.vector * e.distance[:, None], vector)
    assert golden.graph(torch.float32).with_positions(positions).dtype == torch.float32
    with pytest.raises(ValueError, match=r"^positions: expected shape"):
        graph.with_positions(positions[1:])


def test_given_edges_make_the_same_graph(golden):
    graph, generator, shuffled = golden.graph(), torch.Generator().manual_seed(0), {}
    for name, (edge_index, offset) in edges_of(graph).items():
        order = torch.randperm(len(offset), generator=generator)
        shuffled[name] = (edge_index[:, order], offset[order].long())
    assert differences(graph_from_edges(golden.structures, shuffled, dtype=torch.float64), graph) == []
    for wrong in ({name: shuffled[name] for name in EDGE_SETS[1:]}, shuffled | {"pairs": shuffled["main"]}):
        with pytest.raises(ValueError, match=r"^edges: expected the sets .*'main'"):
            graph_from_edges(golden.structures, wrong)


@pytest.mark.parametrize(
    "structures",
    [
        [ase.Atoms("Cu")],
        [ase.Atoms("Cu", cell=[30] * 3, pbc=True)],
        [ase.Atoms("CuO", [[0, 0, 0], [0, 0, 9.1]])],
        [ase.Atoms("Cu"), molecule("H2O"), ase.Atoms("CuO", [[0, 0, 0], [0, 50, 0]])],
    ],
)
def test_isolated_atoms_have_no_edges(structures, backend):
    graph = build_graph(structures, 9.0, backend=backend)
    degree = [2 if len(structures[b]) == 3 else 0 for b in graph.batch]
    for name in EDGE_SETS:
        edges = getattr(graph, name)
        assert edges.ptr.tolist() == [0, *itertools.accumulate(degree)]
        assert edges.offset.shape == edges.vector.shape == (sum(degree), 3)
        assert edges.max_degree == max(degree)
    assert graph.main.swap.shape == (sum(degree),)
    assert differences(graph_from_edges(structures, edges_of(graph)), graph) == []


def test_tags_and_quad_edges(backend):
    water = molecule("H2O")
    graph = build_graph([SLAB, water, Structure(numbers=[1], positions=np.zeros((1, 3)))], 5.0, backend=backend)
    assert graph.tags.tolist() == [0] * 4 + [1] * 8 + [2] * 4
    ends = graph.tags[torch.stack([graph.quad_edges.source, graph.quad_edges.target])]
    assert (ends > 0).any(0).all()
    assert (ends == 0).any()
    water.set_tags([0, 0, 0])
    graph = build_graph(water, backend=backend)
    assert graph.tags.tolist() == [0, 0, 0]
    assert (graph.quad_edges.num_edges, graph.main.num_edges) == (0, 6)


def test_a_cell_counts_only_where_periodic(backend):
    free, boxed = molecule("H2O"), molecule("H2O")
    boxed.set_cell([3.0, 3.0, 3.0])
    assert differences(build_graph(free, backend=backend), build_graph(boxed, backend=backend)) == []
    boxed.set_pbc([False, True, False])
    offset = build_graph(boxed, 7.0, backend=backend).atom_pairs.offset
    assert offset.unique(dim=0).tolist() == [[0, y, 0] for y in (-2, -1, 0, 1, 2)]


def test_dtypes_and_frozen_values(golden):
    double, single = golden.graph(), golden.graph(torch.float32)
    assert (double.dtype, single.dtype, single.positions.dtype) == (torch.float64, torch.float32, torch.float64)
    assert torch.equal(single.main.distance, double.main.distance.float())
    assert differences(double.to(dtype=torch.float32), single) == differences(double.to("cpu"), double) == []
    assert single.to(dtype=torch.float64).atom_pairs.vector.dtype == torch.float64
    for value, name in ((single, "positions"), (single, "main"), (single.main, "source")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)
