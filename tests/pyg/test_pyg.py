"""Graphs, stores and datasets from and to PyTorch Geometric, with the real package."""

import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.neighborlist import neighbor_list
from support.data_store import make_structure, same
from support.edges import differences, edges_of
from support.inputs import environment

import ejmp
from ejmp import GraphSettings, Structure, build_graph
from ejmp.data import Format, Part, open_store
from ejmp.graph.graph import EDGE_SETS
from ejmp.pyg import MD17, QM9, Labels, convert, from_data, structures, to_data

pytest.importorskip("torch_geometric")
from torch_geometric import datasets
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader

from ejmp.pyg import StoreDataset

KCAL = 0.0433641042418
SETTINGS = GraphSettings(cutoff=5.0, max_neighbors=9, quad_tags=(0, 2), ties="keep")


def random_structure(seed):
    """Return up to ten atoms at least 0.7 A apart, with a cell that is periodic in some directions."""
    rng = np.random.default_rng(seed)
    n, pbc = int(rng.integers(1, 11)), rng.random(3) < 0.5
    grid = np.stack(np.meshgrid(*[np.arange(3.0)] * 3), -1).reshape(-1, 3)
    positions = 1.3 * rng.permutation(grid)[:n] + rng.uniform(-0.25, 0.25, (n, 3)) + rng.normal(size=3)
    return Structure(
        numbers=rng.integers(1, 90, n),
        positions=positions,
        cell=np.diag(rng.uniform(4, 6, 3)) + rng.uniform(-0.4, 0.4, (3, 3)),
        pbc=pbc,
        tags=rng.integers(0, 3, n),
    )


RANDOM = [random_structure(seed) for seed in range(100)]


def as_data(structure, **more):
    fields = {name: torch.as_tensor(getattr(structure, name)) for name in ("cell", "pbc", "tags")}
    fields["cell"], fields["pbc"] = fields["cell"][None], fields["pbc"][None]
    return Data(z=torch.as_tensor(structure.numbers), pos=torch.as_tensor(structure.positions), **fields, **more)


def test_a_hundred_structures_there_and_back():
    for dtype in (torch.float64, torch.float32):
        graph = build_graph(RANDOM, settings=SETTINGS, dtype=dtype)
        data = to_data(graph)
        assert isinstance(data, Batch)
        assert data.num_graphs == len(RANDOM)
        assert differences(from_data(data), graph) == []
        singles = data.to_data_list()
        assert differences(from_data(singles), graph) == []
        alone = [build_graph(RANDOM[b], settings=SETTINGS, dtype=dtype) for b in (0, 41, 99)]
        assert [differences(from_data(singles[b]), one) for b, one in zip((0, 41, 99), alone, strict=True)] == [[]] * 3
    again = next(iter(DataLoader(singles, batch_size=100)))
    assert differences(from_data(again), graph) == []


def test_edges_are_searched_for_where_there_are_none():
    graph = build_graph(RANDOM, settings=SETTINGS)
    listed = [as_data(structure, edge_index=torch.tensor([[0], [0]])) for structure in RANDOM]
    assert differences(from_data(listed, SETTINGS), graph) == []
    assert differences(from_data(Batch.from_data_list(listed), SETTINGS), graph) == []
    assert differences(from_data(listed[3], SETTINGS), build_graph(RANDOM[3], settings=SETTINGS)) == []
    each = [dataclasses.replace(SETTINGS, max_neighbors=9 + b % 5) for b in range(100)]
    assert differences(from_data(listed, each), build_graph(RANDOM, settings=each)) == []
    partly = [to_data(graph)[0], *listed[1:]]
    assert differences(from_data(partly, SETTINGS), graph) == []


def test_carried_edges_are_taken_as_they_are():
    graph = build_graph(molecule("CH3OH"), 8.0)
    data = to_data(graph)
    data.atom_edges_index, data.atom_edges_offset = data.atom_edges_index[:, ::2], data.atom_edges_offset[::2]
    changed = from_data(data, GraphSettings(cutoff=2.0))
    assert changed.atom_edges.num_edges == (graph.atom_edges.num_edges + 1) // 2
    assert torch.equal(changed.main.source, graph.main.source)
    assert from_data(data, dtype=torch.float64).dtype == torch.float64


def test_the_documented_conventions():
    atoms = bulk("NaCl", "rocksalt", a=5.64) * (2, 1, 1)
    atoms.rattle(0.05, seed=1)
    data = to_data(build_graph(atoms, 5.0, 100, dtype=torch.float64))
    for prefix in ("edge", *EDGE_SETS[1:]):
        (source, target), offset = data[f"{prefix}_index"], data[f"{prefix}_offset"].double()
        vector = data.pos[target] - data.pos[source] - offset @ data.cell[0]
        found = data[f"{prefix}_vector"] * data[f"{prefix}_distance"][:, None]
        torch.testing.assert_close(found, vector, rtol=0, atol=1e-12)
    i, j, shift = neighbor_list("ijS", atoms, 5.0)
    theirs = sorted(zip(j.tolist(), i.tolist(), shift.tolist(), strict=True))
    assert sorted(zip(*data.atom_pairs_index.tolist(), data.atom_pairs_offset.tolist(), strict=True)) == theirs


def test_names_and_shapes_of_others():
    """OCP's data: atomic numbers as floats, a cell without pbc; and a cell that does not count."""
    slab = bulk("Cu", a=3.6, cubic=True)
    cell = torch.tensor(slab.cell.array)
    ocp = Data(atomic_numbers=torch.tensor(slab.numbers).float(), pos=torch.tensor(slab.positions), cell=cell[None])
    expected = build_graph(slab, 6.0)
    six = GraphSettings(cutoff=6.0)
    assert differences(from_data(ocp, six), expected) == []
    ocp.cell = cell
    assert differences(from_data(ocp, six), expected) == []
    ocp.pbc = torch.tensor([True])
    assert differences(from_data(ocp, six), expected) == []
    ocp.pbc = torch.tensor([True, True, False])
    assert from_data(ocp, six).pbc.tolist() == [[True, True, False]]
    free = Data(z=ocp.atomic_numbers.long(), pos=ocp.pos)
    slab.pbc = False
    assert differences(from_data(free), build_graph(slab)) == []
    everywhere = dataclasses.replace(six, periodic="all")
    ocp.pbc = torch.tensor([False])
    assert from_data(ocp, everywhere).pbc.all()


def test_gradients_pass():
    data = as_data(RANDOM[5])
    data.pos.requires_grad_()
    graph = from_data(data, SETTINGS, dtype=torch.float64)
    to_data(graph).edge_distance.sum().backward()
    expected = graph.with_positions(graph.positions.detach().requires_grad_())
    expected.main.distance.sum().backward()
    torch.testing.assert_close(data.pos.grad, expected.positions.grad)
    assert data.pos.grad.abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos": None}, "data: expected z or atomic_numbers, and pos, got Data with"),
        ({"z": torch.tensor([1.5])}, "data: z: expected 1 whole numbers"),
        ({"z": torch.tensor([1, 1])}, "data: z: expected 1 whole numbers"),
        ({"z": torch.tensor([0])}, "structure 0: numbers"),
        ({"cell": torch.zeros(2, 3, 3)}, r"data: cell: expected \[1, 3, 3\]"),
        ({"cell": torch.eye(3), "pbc": torch.tensor([True, False])}, r"data: pbc: expected \[1, 3\]"),
        ({"tags": torch.tensor([7])}, "structure 0: tags"),
    ],
)
def test_wrong_data_are_refused(change, message):
    data = Data(z=torch.tensor([6]), pos=torch.zeros(1, 3))
    for name, value in change.items():
        data[name] = value
    with pytest.raises(ValueError, match=f"^{message}"):
        from_data(data)


def test_a_batch_out_of_order_is_refused():
    mixed = Data(z=torch.tensor([6, 6]), pos=torch.eye(3)[:2], batch=torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"^data: batch: expected the structure of each atom, in ascending order"):
        from_data(mixed)


def test_build_graph_names_the_reader():
    for wrong in (as_data(RANDOM[0]), [as_data(RANDOM[0])], Batch.from_data_list([as_data(RANDOM[0])])):
        with pytest.raises(ValueError, match=r"a torch_geometric \w+: make a graph of it with ejmp\.pyg\.from_data"):
            build_graph(wrong)


def md17_frames(folder):
    """Return PyG's own dataset, which makes itself of the file it would have downloaded."""
    rng, ethanol = np.random.default_rng(0), molecule("CH3CH2OH")
    (folder / "ethanol" / "raw").mkdir(parents=True)
    np.savez(
        folder / "ethanol" / "raw" / "md17_ethanol.npz",
        z=ethanol.numbers,
        R=ethanol.positions + 0.05 * rng.normal(size=(7, 9, 3)),
        E=-97000.25 - np.arange(7),
        F=rng.normal(size=(7, 9, 3)),
    )
    return datasets.MD17(str(folder), "ethanol")


def test_md17_becomes_a_store(tmp_path):
    frames = md17_frames(tmp_path)
    folders = convert(frames, tmp_path / "ethanol", MD17, split="train", licence="CC0")
    assert folders == [tmp_path / "ethanol" / "train"]
    store = open_store(folders[0])
    assert (len(store), store.info.name, store.info.licence) == (7, "ethanol", "CC0")
    for k, (structure, data) in enumerate(zip(store, frames, strict=True)):
        assert np.array_equal(structure.numbers, data.z)
        np.testing.assert_allclose(structure.positions, data.pos, rtol=0, atol=1e-7)
        assert structure.energy == pytest.approx((-97000.25 - k) * KCAL, rel=1e-12)
        np.testing.assert_allclose(structure.forces, data.force.double() * KCAL, rtol=1e-6)
    assert convert(frames, tmp_path / "ethanol", MD17, split="train") == folders  # finished already
    with pytest.raises(ValueError, match="dest holds another conversion"):
        convert(frames, tmp_path / "ethanol", dataclasses.replace(MD17, unit_energy="eV"), split="train")


def test_qm9_labels(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)  # PyG then takes a list of dictionaries
    y = torch.arange(19.0)[None] - 10
    molecules = [
        {"z": torch.tensor([1, 8]), "pos": torch.eye(3)[:2], "y": y, "name": f"gdb_{k}", "idx": k} for k in (1, 2)
    ]
    (tmp_path / "raw").mkdir()
    torch.save(molecules, tmp_path / "raw" / "qm9_v3.pt")
    found = list(structures(datasets.QM9(str(tmp_path)), QM9))
    assert [s.id for s in found] == ["gdb_1", "gdb_2"]
    assert found[0].energy == found[0].targets["U0"] == -3
    assert (found[0].targets["mu"], found[0].targets["C"], len(found[0].targets)) == (-10, 8, 19)
    assert found[0].forces is None


def test_units_of_datasets():
    data = Data(z=torch.tensor([1, 1]), pos=torch.eye(3)[:2], cell=4 * torch.eye(3)[None], e=0.1, f=torch.ones(2, 3))
    (found,) = structures([data], Labels(unit_energy="hartree", unit_length="bohr", energy="e", forces="f"))
    assert found.energy == pytest.approx(0.1 * 27.211386245988, rel=1e-15)
    np.testing.assert_allclose(found.forces, 27.211386245988 / 0.529177210544)
    np.testing.assert_allclose(found.positions, 0.529177210544 * np.eye(3)[:2])
    np.testing.assert_allclose(found.cell, 4 * 0.529177210544 * np.eye(3))
    with pytest.raises(ValueError, match=r"^unit_energy: expected one of eV, kcal/mol, kJ/mol, hartree, got 'kcal'"):
        Labels(unit_energy="kcal")
    for labels, message in (
        (MD17, "item 0: expected a label 'force'"),
        (Labels(unit_energy="eV", energy="f"), "item 0: f: expected one value, got 6"),
        (Labels(unit_energy="eV", energy=("e", 1)), "item 0: e: expected more than 1 values, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            list(structures([data], labels))
    with pytest.raises(ValueError, match=r"^list: item 0: forces: expected numbers \[2, 3\], got float64 \[\]"):
        list(structures([data], Labels(unit_energy="eV", energy=None, forces="e")))


def test_a_store_is_a_dataset(tmp_path):
    made = [make_structure(number) for number in range(12)]
    source = Format(parts=lambda _: [Part(name="all", count=12)], read=lambda *_: iter(made))
    (folder,) = ejmp.data.convert("made", tmp_path / "set", format=source, split="train")
    dataset = StoreDataset(folder)
    assert len(dataset) == 12
    dataset = pickle.loads(pickle.dumps(dataset))  # noqa: S301, made here
    for data, structure in zip(dataset, open_store(folder), strict=True):
        assert torch.equal(data.pos, torch.tensor(structure.positions).double())
        assert data.y.tolist() == data.energy.tolist() == [structure.energy]
        assert torch.equal(data.forces, torch.tensor(structure.forces).double())
        assert data.pbc.tolist() == [structure.pbc.tolist()]
        assert {name: value.item() for name, value in data.get("targets", {}).items()} == structure.targets
        back = next(structures([data], Labels(unit_energy="eV", forces="forces")))
        twos = np.full(len(structure.numbers), 2)
        again = dataclasses.replace(structure, forces=structure.forces.astype(float), targets={}, fixed=None, tags=twos)
        assert same(dataclasses.replace(back, id=structure.id), again)
        assert data.fixed.tolist() == (np.zeros(len(twos)) if structure.fixed is None else structure.fixed).tolist()
    batch = next(iter(DataLoader(StoreDataset(folder, dtype=torch.float32)[[1, 2, 4, 5]], batch_size=4)))
    assert batch.forces.shape == (sum(len(made[k].numbers) for k in (1, 2, 4, 5)), 3)
    assert batch.targets["gap"].shape == (4,)
    assert (batch.pos.dtype, batch.energy.dtype, batch.cell.shape) == (torch.float32, torch.float32, (4, 3, 3))
    seen = StoreDataset(folder, transform=lambda data: data.z.tolist())
    assert seen[3] == made[3].numbers.tolist()
    demo = StoreDataset(ejmp.data.demo("rmd17", "train"))
    assert demo[0].forces.shape == demo[0].pos.shape


def test_ejmp_comes_without_it():
    code = "import sys, ejmp, ejmp.pyg; print('torch_geometric' in sys.modules, ejmp.pyg.from_data.__name__)"
    run = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "from_data"]
    hidden = "import sys; sys.modules['torch_geometric'] = None; import ejmp.pyg; ejmp.pyg.StoreDataset"
    run = subprocess.run([sys.executable, "-c", hidden], env=environment(), capture_output=True, text=True, check=False)
    assert "ImportError: torch_geometric is missing: pip install ejmp[pyg] brings it" in run.stderr


def test_edges_of_all_sets_are_there():
    graph = build_graph(molecule("CH3OH"), 8.0)
    data = to_data(graph)
    for name, (edge_index, offset) in edges_of(graph).items():
        prefix = "edge" if name == "main" else name
        assert torch.equal(data[f"{prefix}_index"], edge_index)
        assert torch.equal(data[f"{prefix}_offset"], offset)
    assert json.loads(json.dumps(sorted(data.to_dict()))) == sorted(
        ["z", "pos", "tags", "cell", "pbc", "batch", "ptr"]
        + [f"{p}_{k}" for p in ("edge", *EDGE_SETS[1:]) for k in ("index", "offset", "distance", "vector")]
    )
