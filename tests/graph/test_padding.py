"""Padded graphs have the wanted shape, are consistent, and leave the results of real rows unchanged."""

import dataclasses

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from support.inputs import TRITON_DEVICE, load_golden, require_native, require_triton
from support.tolerances import assert_close, relative_error, tolerance

import ejmp
from ejmp.graph.graph import EDGE_SETS, edge_geometry, pack_offset
from ejmp.graph.padding import SPACING, Buckets, GraphShape, _offsets, pad_graph

DOUBLE = {"dtype": torch.float64}
GOLDEN = ("ethanol", "oxide", "batch")


def crystal():
    atoms = bulk("NaCl", "rocksalt", a=5.6).repeat((2, 1, 1))
    atoms.rattle(0.1, seed=0)
    return ejmp.build_graph([atoms, molecule("H2O")], 6.0, **DOUBLE)


def without_quadruplets():
    atoms = bulk("Cu", cubic=True)
    atoms.set_tags(np.zeros(len(atoms), int))
    atoms.rattle(0.1, seed=0)
    return ejmp.build_graph(atoms, 4.0, **DOUBLE)


GRAPHS = {
    **{name: lambda name=name: load_golden(name).graph() for name in GOLDEN},
    "crystal": crystal,
    "no quadruplets": without_quadruplets,
    "one atom": lambda: ejmp.build_graph(ase.Atoms("He"), 8.0, **DOUBLE),
}


@pytest.fixture(params=GRAPHS, scope="module")
def graph(request):
    return GRAPHS[request.param]()


def shapes(graph):
    """Return the least shape that holds a graph, one with more of everything, and one with several more structures."""
    own = GraphShape.of(graph)
    most = {name: size + 3 if "degree" in name else 2 * size + 6 for name, size in dataclasses.asdict(own).items()}
    return {
        "least": dataclasses.replace(own, num_atoms=own.num_atoms + 1, num_structures=own.num_structures + 1),
        "bucket": GraphShape.holding(own, 1.2),
        "most": GraphShape.holding(GraphShape(**most)),
    }


@pytest.fixture(params=["least", "bucket", "most"])
def shape(request, graph):
    return shapes(graph)[request.param]


def test_padded_graph_is_a_graph(graph, shape):
    padded = pad_graph(graph, shape)
    assert GraphShape.of(padded) == shape
    assert padded.ptr.tolist()[: len(graph.ptr)] == graph.ptr.tolist()
    assert (padded.ptr.diff() > 0).all()
    assert padded.ptr[-1] == shape.num_atoms
    assert torch.equal(torch.bincount(padded.batch), padded.ptr.diff())
    assert (padded.batch.diff() >= 0).all()
    for name in EDGE_SETS:
        edges, real = getattr(padded, name), getattr(graph, name)
        degree = torch.bincount(edges.target, minlength=shape.num_atoms)
        assert torch.equal(edges.ptr.diff(), degree)
        assert (edges.target.diff() >= 0).all()
        assert degree.max() <= edges.max_degree
        added = degree[graph.num_atoms :]
        assert added.max() - added.min() <= (1 if edges.swap is None else 2), "spread evenly"
        for field in dataclasses.fields(edges):
            value, before = getattr(edges, field.name), getattr(real, field.name)
            if isinstance(value, torch.Tensor):
                assert value.dtype == before.dtype
                assert torch.equal(value[: len(before)], before)
        assert torch.equal(edges.image, pack_offset(edges.offset))
        cell = padded.cell[padded.batch[edges.target]]
        assert torch.allclose(edges.shift, torch.einsum("ei,eij->ej", edges.offset.double(), cell), rtol=1e-14)
        distance, vector = edge_geometry(padded.positions, edges.source, edges.target, edges.shift)
        assert torch.equal(distance, edges.distance)
        assert torch.equal(vector, edges.vector)
        assert (distance[real.num_edges :] >= SPACING).all()
        rows = torch.stack([edges.source, edges.target, edges.image])
        assert rows.unique(dim=1).shape == rows.shape, "no edge is there twice"
    main = padded.main
    assert torch.equal(main.swap[main.swap], torch.arange(main.num_edges))
    assert torch.equal(main.source[main.swap], main.target)
    assert torch.equal(main.image[main.swap], -main.image)


@pytest.fixture(params=["native", "reference"], scope="module")
def model(request, tiny_config, tiny_weights):
    if request.param == "native":
        require_native()
    model = ejmp.JMP(tiny_config, backend=request.param)
    model.load_state_dict(tiny_weights)
    return model.double()


def results(model, graph, real):
    """Return outputs and gradient forces of the real rows, and the gradient of a loss on them."""
    out = model(graph)
    forces = ejmp.gradient_forces(model, graph, create_graph=True)
    weights = (model.backbone.bases.mlp_sbf_qint.weight, model.backbone.int_blocks[0].dense_ca.linear.weight)
    second = torch.autograd.grad((forces**2).sum() + (out.energy[: real.num_structures] ** 2).sum(), weights)
    for value in (out.energy, out.forces, forces, *second):
        assert torch.isfinite(value).all()
    assert not forces[real.num_atoms :].any()
    parts = out.energy[: real.num_structures], out.forces[: real.num_atoms], forces[: real.num_atoms], *second
    return [part.detach() for part in parts]


@pytest.mark.parametrize("name", ["ethanol", "oxide", "crystal", "no quadruplets", "one atom"])
def test_padding_changes_nothing(model, name):
    graph = GRAPHS[name]()
    expected = results(model, graph, graph)
    sizes = shapes(graph)
    for size in ("least", "bucket", "most") if graph.num_atoms < 10 else ("bucket",):
        for value, real in zip(results(model, pad_graph(graph, sizes[size]), graph), expected, strict=True):
            assert relative_error(value, real) < 1e-11


def test_padding_changes_nothing_in_triton(tiny_config):
    """The padded graph agrees with the reference backend without padding; it is small, as the interpreter is slow."""
    require_triton()
    config = dataclasses.replace(tiny_config, blocks=1, num_tasks=1)
    model, plain = (ejmp.JMP(config, backend=backend).double() for backend in ("triton", "reference"))
    model.load_state_dict(plain.state_dict())
    model.to(TRITON_DEVICE)
    water = ejmp.build_graph(molecule("H2O"), 8.0, **DOUBLE)
    own = dataclasses.asdict(GraphShape.of(water))
    shape = GraphShape(**{name: size + (0 if "degree" in name else 2) for name, size in own.items()})
    padded = pad_graph(water, shape).to(TRITON_DEVICE)
    out, expected = model(padded), plain(water)
    assert relative_error(out.energy[:1].detach().cpu(), expected.energy.detach()) < 1e-11
    assert relative_error(out.forces[:3].detach().cpu(), expected.forces.detach()) < 1e-11
    forces = ejmp.gradient_forces(model, padded).cpu()
    assert relative_error(forces[:3], ejmp.gradient_forces(plain, water)) < 1e-10
    assert not forces[3:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_of_the_padding_reaches_real_atoms(model, dtype):
    """Real rows do not depend on padding: NaN as the embedding of hydrogen, its only element, does not reach them."""
    atoms = bulk("NaCl", "rocksalt", a=5.6).repeat((2, 1, 1))
    atoms.rattle(0.1, seed=0)
    graph = ejmp.build_graph(atoms, 6.0, dtype=dtype)
    poisoned = ejmp.JMP(model.config, backend=model.requested_backend).to(dtype)
    poisoned.load_state_dict(model.state_dict())
    expected = poisoned(graph), ejmp.gradient_forces(poisoned, graph)
    with torch.no_grad():
        poisoned.embedding.atom_embedding.weight[0] = torch.nan
    padded = pad_graph(graph, GraphShape.holding(GraphShape.of(graph), 1.2))
    out, forces = poisoned(padded), ejmp.gradient_forces(poisoned, padded)
    assert out.energy[1:].isnan().all(), "the poison is there"
    allowed = tolerance("padded model", dtype)
    assert relative_error(out.energy[:1].detach(), expected[0].energy.detach()) < allowed
    assert relative_error(out.forces[: len(atoms)].detach(), expected[0].forces.detach()) < allowed
    assert relative_error(forces[: len(atoms)], expected[1]) < allowed


def test_energy_per_atom(tiny_config):
    mean = ejmp.JMP(dataclasses.replace(tiny_config, energy_reduction="mean")).double()
    graph = ejmp.build_graph([molecule("H2O"), molecule("CH4")], 8.0, **DOUBLE)
    out = mean(pad_graph(graph, shapes(graph)["most"]))
    assert torch.isfinite(out.energy).all()
    assert_close(out.energy[:2].detach(), mean(graph).energy.detach())


def test_images_are_many_and_in_pairs():
    for num in (1, 2, 26, 27, 124, 125, 1000, 3000):
        offset = _offsets(torch.arange(num), num)
        assert offset.unique(dim=0).shape == (num, 3)
        assert offset.any(dim=1).all()
        assert torch.equal(offset[1::2], -offset[: 2 * (num // 2) : 2])
        assert offset.abs().max() <= (num + 1) ** (1 / 3)
    directions = {tuple(np.array(v) // np.gcd.reduce(v)) for v in offset.tolist()}
    assert len(directions) > 0.7 * len(offset), "few are in one line"


def test_shapes_hold_whatever_is_smaller():
    """A shape for the largest graph holds every graph with no larger size, however few edges it has."""
    largest = ejmp.build_graph([molecule("C6H6"), molecule("CH3CH2OH")], 8.0)
    shape = GraphShape.holding(GraphShape.of(largest))
    smaller = [
        largest,
        ejmp.build_graph([ase.Atoms("H"), ase.Atoms("H")], 8.0),
        ejmp.build_graph(ase.Atoms("H21", positions=np.arange(63).reshape(21, 3) * 50.0), 8.0),
        ejmp.build_graph(molecule("C6H6"), 1.5),
    ]
    for graph in smaller:
        assert shape.misfit(graph) is None
        assert GraphShape.of(pad_graph(graph, shape)) == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_structures": 0}, "1 structures with 3 atoms"),
        ({"num_atoms": 0}, "1 structures with 3 atoms"),
        ({"main": -2}, "main: 6 edges"),
        ({"atom_pairs_degree": -1}, "atom_pairs: 6 edges, at most 2 per atom"),
        ({"main": 1}, "in pairs"),
        ({"quad_edges": 9}, "quad_edges: 9 additional edges, at most 2 per atom, on 1"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    water = ejmp.build_graph(molecule("H2O"), 8.0)
    own = GraphShape.of(water)
    least = dataclasses.replace(own, num_atoms=own.num_atoms + 1, num_structures=own.num_structures + 1)
    pad_graph(water, least)
    changes = {name: getattr(own if step == 0 else least, name) + step for name, step in change.items()}
    wrong = dataclasses.replace(least, **changes)
    with pytest.raises(ValueError, match=message):
        pad_graph(water, wrong)
    with pytest.raises(ValueError, match="fits in a shape"):
        Buckets([wrong], growth=None).choose(water)


def chains(sizes):
    return [ejmp.build_graph(ase.Atoms(f"C{n}", positions=np.arange(n)[:, None] * [1.3, 0.2, 0]), 6.0) for n in sizes]


def test_a_ladder_grows_with_its_graphs():
    buckets = Buckets(growth=1.5)
    graphs = chains(range(2, 120, 3))
    for graph in graphs:
        shape = buckets.choose(graph)
        assert shape.misfit(graph) is None
    assert len(buckets.shapes) <= 10
    for graph in graphs:
        wanted = GraphShape.holding(GraphShape.of(graph), 1.5)
        assert buckets.choose(graph).main <= wanted.main * 1.5**2, "not too large"
    small = chains([2])[0]
    assert buckets.choose(small) == buckets.shapes[0], "the smallest that fits"


def test_fixed_ladders():
    graphs = chains(range(4, 80, 5))
    buckets = Buckets.from_graphs(graphs, growth=1.5)
    assert len(buckets.shapes) <= 9
    assert len({buckets.choose(graph) for graph in graphs}) > 3
    with pytest.raises(ValueError, match="400 atoms"):
        buckets.choose(chains([400])[0])
    settings = Buckets.ladder([32, 64, 128], max_neighbors=30, pairs_per_atom=40)
    assert [settings.shapes.index(settings.choose(g)) for g in chains([8, 50, 100])] == [0, 1, 2]
    assert {shape.num_structures for shape in settings.shapes} == {2}
    with pytest.raises(ValueError, match="at least one"):
        Buckets.from_graphs([])
    with pytest.raises(ValueError, match="growth"):
        Buckets(growth=0.5)
