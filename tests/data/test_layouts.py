"""The readers on small sources in every layout, and on wrong and damaged ones."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch
from support import data_sources as made
from support.data_sources import FRAMES, METHANE, NUMBERS, N, everything, oc_record, truth

from ejmp.data import FORMATS, read
from ejmp.data.readers.format import SLICE
from ejmp.data.readers.hdf5 import ANI1X_LAYOUT, SPICE_LAYOUT, TRANSITION1X_LAYOUT
from ejmp.data.readers.md import MD22_LAYOUT, RMD17_LAYOUT

HARTREE, KCAL, BOHR = 27.211386245988, 0.0433641042418, 0.529177210544
POSITIONS, ENERGY, FORCES = truth()


def assert_is_truth(found, length=1.0, energy=1.0, force=1.0, rtol=1e-6):
    assert len(found) == FRAMES
    for k, s in enumerate(found):
        np.testing.assert_array_equal(s.numbers, NUMBERS)
        np.testing.assert_allclose(s.positions, POSITIONS[k] * length, rtol=rtol)
        np.testing.assert_allclose(s.forces, FORCES[k] * force, rtol=rtol)
        assert s.energy == pytest.approx(ENERGY[k] * energy, rel=1e-11)


@pytest.mark.parametrize("name", ["oc20", "oc22"])
@pytest.mark.parametrize("layout", ["1.x", "2.x"])
def test_oc_lmdb(tmp_path, name, layout):
    path = made.write_lmdb(tmp_path / "data.0000.lmdb", [oc_record(k, layout) for k in range(FRAMES)])
    found = everything(path, name)
    assert_is_truth(found)
    assert found[1].id == "data.0000.lmdb/1/1234/1"
    np.testing.assert_array_equal(found[0].cell, np.diag([7.0, 8.0, 20.0]) + 0.5)
    assert found[0].pbc.all()
    np.testing.assert_array_equal(found[0].tags, [0, 0, 1, 2, 2])
    np.testing.assert_array_equal(found[0].fixed, [True, True, False, False, False])
    assert found[0].forces.dtype == np.float32


def test_oc_folders_and_energies(tmp_path):
    relaxed = {"y": ..., "y_relaxed": torch.tensor([-3.5])}
    made.write_lmdb(tmp_path / "data.0001.lmdb", [oc_record(0, sid="random7", fid=...)])
    made.write_lmdb(tmp_path / "data.0000.lmdb", [oc_record(0), oc_record(1, **relaxed), oc_record(2, y=np.float64(1))])
    assert [s.energy for s in everything(tmp_path, "oc20")] == [ENERGY[0], None, 1.0, ENERGY[0]]
    found = everything(tmp_path, "oc22")
    assert [s.energy for s in found] == [ENERGY[0], -3.5, 1.0, ENERGY[0]]
    assert found[3].id == "data.0001.lmdb/0/random7"
    test = made.write_lmdb(tmp_path / "test.lmdb", [oc_record(0, y=..., force=..., tags=..., fixed=...)])
    (s,) = everything(test, "oc20")
    assert s.energy is s.forces is s.tags is s.fixed is None


def test_oc_lmdb_in_slices_and_at_once(tmp_path):
    path = made.write_lmdb(tmp_path / "data.lmdb", [oc_record(0)] * (SLICE + 1))
    parts = FORMATS["oc20"].parts(path)
    assert [(part.name, part.count) for part in parts] == [("data.lmdb:0-1000", 1000), ("data.lmdb:1000-1001", 1)]
    both = zip(*(FORMATS["oc20"].read(path, part) for part in (parts[0], parts[0])), strict=True)
    assert next(both)[1].energy == ENERGY[0]
    # Without "length", there are as many structures as entries.
    import lmdb

    with lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 26) as file, file.begin(write=True) as change:
        change.delete(b"length")
    assert sum(part.count for part in FORMATS["oc20"].parts(path)) == SLICE + 1


WRONG_RECORDS = {
    "no pos": {"pos": ...},
    "natoms is 6, but there are 5": {"natoms": 6},
    "expected 1..120": {"atomic_numbers": torch.tensor([1.0, 2.0, 3.0, 121.0, 1.0])},
    "got fractions": {"atomic_numbers": torch.tensor([1.0, 2.5, 3.0, 4.0, 1.0])},
    "positions: NaN or infinite": {"pos": torch.full((N, 3), torch.nan)},
    "positions: expected numbers": {"pos": torch.zeros(N, 2)},
    "positions: beyond": {"pos": torch.full((N, 3), 1e7)},
    "forces: NaN or infinite": {"force": torch.full((N, 3), torch.inf)},
    "forces: expected numbers": {"force": torch.zeros(N + 1, 3)},
    "energy: NaN or infinite": {"y": float("nan")},
    "energy: expected numbers": {"y": "low"},
    "y: expected an array or a number, got list": {"y": [1.0]},
    "tags: expected": {"tags": torch.tensor([0, 0, 1, 2, 3])},
    r"fixed: expected \[5\]": {"fixed": torch.zeros(4)},
    "cannot reshape": {"cell": torch.zeros(2, 3)},
    "cell: NaN": {"cell": torch.full((3, 3), torch.nan)},
}


@pytest.mark.parametrize("message", WRONG_RECORDS)
def test_wrong_oc_records_are_named(tmp_path, message):
    path = made.write_lmdb(tmp_path / "d.lmdb", [oc_record(0), oc_record(1, **WRONG_RECORDS[message])])
    with pytest.raises(ValueError, match=rf"d\.lmdb: record 1: .*{message}"):
        list(read(path, format="oc20"))


def test_wrong_oc_files_are_named(tmp_path):
    for records, length, message in (
        ([b"cos\nsystem\n."], 1, r"d\.lmdb: record 0: refused: it asks for os\.system"),
        ([oc_record(0)[:-9]], 1, r"d\.lmdb: record 0: damaged pickle"),
        ([pickle.dumps([1])], 1, r"d\.lmdb: record 0: expected PyG data, got list"),
        ([oc_record(0)], 9, r"d\.lmdb: length: 9 records announced, 2 entries"),
        ([oc_record(0)], "many", r"d\.lmdb: .*length|d\.lmdb: .*many"),
        ([oc_record(0)], 2, r"d\.lmdb: record 1: not there"),
    ):
        path = made.write_lmdb(tmp_path / "d.lmdb", records, length)
        with pytest.raises(ValueError, match=message):
            list(read(path, format="oc20"))
        path.unlink()
    (tmp_path / "e.lmdb").write_bytes(b"x" * 9000)
    with pytest.raises(ValueError, match=r"e\.lmdb: not an LMDB file"):
        list(read(tmp_path, format="oc20"))


@pytest.mark.parametrize("packed", [True, False])
def test_oc20_text(tmp_path, packed):
    found = everything(made.write_oc20_text(tmp_path, packed=packed), "oc20_text")
    for k, s in enumerate(found):
        assert s.energy == pytest.approx(ENERGY[k] + k + 0.5, rel=1e-12)
        np.testing.assert_allclose(s.forces, FORCES[k], rtol=1e-10)
    assert found[1].id == f"0.extxyz{'.xz' * packed}/1/random12/frame10"
    if not packed:
        (tmp_path / "0.txt").write_text("random12,frame0\n" * FRAMES)
        assert [s.energy for s in read(tmp_path, format="oc20_text")] == pytest.approx(ENERGY.tolist())
        for labels, message in (("a,b\n", "more frames"), ("a,b\n" * 4, "txt file has 4"), ("a\n", "expected lines")):
            (tmp_path / "0.txt").write_text(labels)
            with pytest.raises(ValueError, match=message):
                list(read(tmp_path, format="oc20_text"))
        (tmp_path / "0.txt").unlink()
        with pytest.raises(ValueError, match=r"0\.txt or 0\.txt\.xz should be beside it"):
            list(read(tmp_path, format="oc20_text"))


def test_ani1x_skips_frames_without_labels(tmp_path):
    energy, forces = ENERGY.copy(), FORCES.astype(np.float32)
    energy[0] = forces[2, 3, 1] = np.nan
    changes = {"wb97x_dz.energy": energy, "wb97x_dz.forces": forces}
    path = made.write_hdf5(tmp_path / "a.h5", ANI1X_LAYOUT, ["C1H3O1"], **changes)
    (s,) = everything(path, "ani1x")
    assert s.id == "C1H3O1:1"
    assert s.energy == pytest.approx(ENERGY[1] * HARTREE)
    path = made.write_hdf5(tmp_path / "b.h5", ANI1X_LAYOUT, ["C1H3O1"])
    assert_is_truth(everything(path, "ani1x"), energy=HARTREE, force=HARTREE)
    three = {"atomic_numbers": NUMBERS[:3], "coordinates": POSITIONS[:, :3], "wb97x_dz.forces": FORCES[:, :3]}
    path = made.write_hdf5(tmp_path / "c.h5", ANI1X_LAYOUT, ["H2O"], **three)
    with pytest.raises(ValueError, match="no group holds any conformations"):  # all are of fewer than 4 atoms
        list(read(path, format="ani1x"))


def test_transition1x_splits_and_small_systems(tmp_path):
    groups = [f"{split}/{place}" for split in ("train", "val", "test", "data") for place in ("A/r0", "A/r1", "B/r2")]
    path = made.write_hdf5(tmp_path / "t.h5", TRANSITION1X_LAYOUT, groups)
    parts = FORMATS["transition1x"].parts(path)
    assert [part.split for part in parts] == ["train"] * 3 + ["val"] * 3 + ["test"] * 3
    found = everything(path, "transition1x")
    assert [s.id for s in found[:4]] == ["train/A/r0:0", "train/A/r0:1", "train/A/r0:2", "train/A/r1:0"]
    assert_is_truth(found[:3])
    three = {"atomic_numbers": NUMBERS[:3], "positions": POSITIONS[:, :3], "wB97x_6-31G(d).forces": FORCES[:, :3]}
    path = made.write_hdf5(tmp_path / "d.h5", TRANSITION1X_LAYOUT, ["data/A/r"], **three)
    assert [part.split for part in FORMATS["transition1x"].parts(path)] == [None]
    assert [s.id for s in everything(path, "transition1x")] == [f"data/A/r:{k}:small" for k in range(3)]


def test_spice_of_nested_names(tmp_path):
    path = made.write_hdf5(tmp_path / "s.h5", SPICE_LAYOUT, ["C/C=C/C", "C#C"])
    found = everything(path, "spice")
    assert [s.id for s in found[::3]] == ["C/C=C/C:0", "C#C:0"]
    assert_is_truth(found[:3], length=BOHR, energy=HARTREE, force=-HARTREE / BOHR)
    assert found[0].targets == {"formation_energy": pytest.approx(ENERGY[0] / 2 * HARTREE)}


HDF5_FORMATS = {"ani1x": ANI1X_LAYOUT, "transition1x": TRANSITION1X_LAYOUT, "spice": SPICE_LAYOUT}


@pytest.mark.parametrize("name", HDF5_FORMATS)
def test_wrong_hdf5_is_named(tmp_path, name):
    layout, group = HDF5_FORMATS[name], "data/formula/reaction"
    for k, (change, message) in enumerate(
        (
            ({layout.energy: ...}, "no "),
            ({layout.energy: ENERGY[:2]}, r"expected numbers \[3\], got \(2,\)"),
            ({layout.forces: FORCES[:, :2]}, r"expected numbers \[3, 5, 3\]"),
            ({layout.positions: POSITIONS[0]}, "expected numbers"),
            ({layout.numbers: np.zeros(0, int)}, "expected 1 or more atoms, got none|expected numbers"),
            ({layout.positions: np.full(POSITIONS.shape, np.nan)}, "frame 0: positions: NaN"),
            ({layout.numbers: np.full(N, 200)}, r"frame 0: atomic numbers: expected 1\.\.120"),
            ({layout.energy: np.array([b"a", b"b", b"c"])}, "expected numbers"),
        )
    ):
        path = made.write_hdf5(tmp_path / f"{k}.h5", layout, [group], **change)
        with pytest.raises(ValueError, match=rf"{k}\.h5: {group}.*{message}"):
            list(read(path, format=name))
    (tmp_path / "cut.h5").write_bytes((tmp_path / "0.h5").read_bytes()[:3000])
    (tmp_path / "text.h5").write_text("no")
    for wrong in ("cut.h5", "text.h5", ""):
        with pytest.raises(ValueError, match=str(tmp_path / wrong)):
            list(read(tmp_path / wrong, format=name))


@pytest.mark.parametrize(("name", "layout"), [("rmd17", RMD17_LAYOUT), ("md22", MD22_LAYOUT)])
def test_npz(tmp_path, name, layout):
    path = made.write_npz(tmp_path / f"{name}_x.npz", layout)
    found = everything(tmp_path, name)
    assert_is_truth(found, energy=KCAL, force=KCAL, rtol=1e-12)
    assert found[2].id == f"{name}_x:2"
    column = made.write_npz(tmp_path / "b.npz", layout, **{layout.energy: ENERGY[:, None]})  # as sGDML writes it
    assert_is_truth(everything(column, name), energy=KCAL, force=KCAL, rtol=1e-12)
    for change, message in (
        ({layout.forces: ...}, f"no {layout.forces}; it has"),
        ({layout.forces: FORCES[:2]}, f"{layout.forces}: expected numbers"),
        ({layout.positions: np.full(POSITIONS.shape, np.nan)}, "frame 0: positions: NaN"),
        ({layout.energy: np.array([{}, 1, 2])}, "Object arrays cannot be loaded|pickle"),
    ):
        made.write_npz(path, layout, **change)
        with pytest.raises(ValueError, match=rf"{name}_x\.npz: {message}|{name}_x\.npz: .*{message}"):
            list(read(path, format=name))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=rf"{name}_x\.npz: "):
        list(read(path, format=name))


def test_md22_xyz_of_both_comments(tmp_path):
    path = made.write_md22_xyz(tmp_path / "md22_x.xyz")
    assert_is_truth(everything(path, "md22"), energy=KCAL, force=KCAL, rtol=1e-10)
    good = path.read_text()
    for old, new, message in (
        ("pos:R:3:forces", "forces:R:3:pos", "frame 0: expected columns"),
        ("Energy=", "E=", "frame 0: .*float"),
        ("\nO ", "\nXy ", "frame 0: expected lines of symbol"),
        ("5\nEnergy", "6\nEnergy", "frame "),
        ("5\nEnergy", "-5\nEnergy", "frame 0: expected 1 to 100000 atoms"),
    ):
        path.write_text(good.replace(old, new))
        with pytest.raises(ValueError, match=rf"md22_x\.xyz: {message}"):
            list(read(path, format="md22"))
    path.write_text(good[:-200])
    with pytest.raises(ValueError, match=r"md22_x\.xyz: frame 2: it ends early"):
        list(read(path, format="md22"))


def test_xyz_in_slices(tmp_path):
    frame = "1\nenergy={}\nH 0 0 0 0 0 0\n"
    (tmp_path / "long.xyz").write_text("".join(frame.format(k) for k in range(2 * SLICE + 1)))
    found = everything(tmp_path / "long.xyz", "md22")
    assert [s.energy for s in found] == pytest.approx([k * KCAL for k in range(2 * SLICE + 1)])


@pytest.mark.parametrize("mode", ["folder", "w:bz2", "w"])
def test_qm9_raw(tmp_path, mode):
    path = made.write_qm9_raw(tmp_path)
    if mode != "folder":
        path = made.write_qm9_tar(tmp_path / "dsgdb9nsd.xyz.tar", tmp_path, mode)
    assert [s.id for s in everything(path, "qm9")] == ["gdb_1", "gdb_2", "gdb_3"]
    (tmp_path / "uncharacterized.txt").write_text("List of 3 molecules\n=====\nIndex name x\n  2  C  C  9\n3 O O 9\n")
    (s,) = everything(path, "qm9")
    assert s.energy == pytest.approx(-40.47893 * HARTREE)
    assert s.positions[1, 1] == -6.0313176e-3
    assert len(s.targets) == 19


def test_wrong_qm9_raw_is_named(tmp_path):
    file = made.write_qm9_raw(tmp_path, [1]) / "dsgdb9nsd_000001.xyz"
    for old, new in (("5\ngdb", "4\ngdb"), ("13.21", "x"), ("\t35.3641", ""), ("H\t", "Q\t"), ("gdb", "gbd")):
        file.write_text(METHANE.replace("{number}", "1").replace(old, new))
        with pytest.raises(ValueError, match=r"dsgdb9nsd_000001\.xyz: "):
            list(read(tmp_path, format="qm9"))
    (tmp_path / "uncharacterized.txt").write_text("nothing\n")
    with pytest.raises(ValueError, match=r"uncharacterized\.txt: expected lines"):
        list(read(tmp_path, format="qm9"))


@pytest.mark.parametrize("form", ["list", "dicts", "joined"])
@pytest.mark.parametrize("layout", ["1.x", "2.x"])
def test_qm9_of_pyg(tmp_path, form, layout):
    path = made.write_qm9_pt(tmp_path / "data_v3.pt", layout, form)
    found = everything(path, "qm9")
    assert [s.id for s in found] == ["gdb_1", "gdb_2", "gdb_3"]
    for k, s in enumerate(found):
        np.testing.assert_array_equal(s.positions, POSITIONS[k].astype(np.float32))
        np.testing.assert_array_equal(s.numbers, NUMBERS)
        assert list(s.targets.values()) == [(19 * k + j) / 8 for j in range(19)]
        assert s.energy == s.targets["U0"] == (19 * k + 7) / 8
    (tmp_path / "uncharacterized.txt").write_text("2\n")
    assert [s.id for s in everything(made.write_qm9_pt(tmp_path / "b.pt", layout, form), "qm9")] == ["gdb_1", "gdb_3"]


def test_qm9_of_pyg_where_pyg_is_installed(tmp_path):
    """It tells torch to make its own classes, which no reader wants."""
    data = pytest.importorskip("torch_geometric.data").Data
    before = set(torch.serialization.get_safe_globals())
    found = everything(made.write_qm9_pt(tmp_path / "data_v3.pt", "2.x", "list"), "qm9")
    assert [s.id for s in found] == ["gdb_1", "gdb_2", "gdb_3"]
    assert set(torch.serialization.get_safe_globals()) == before
    assert data in before


def test_wrong_qm9_of_pyg_is_named(tmp_path):
    for saved, message in (
        ({"a": 1}, "expected a list of PyG data, got dict"),
        ([{"z": torch.ones(2)}], "molecule 0: no tensors pos, y"),
        (
            [{"z": torch.ones(2), "pos": torch.zeros(2, 3), "y": torch.zeros(1, 15)}],
            "y: expected 19 values",
        ),
        ([3], "expected PyG data, got int"),
        (({"z": torch.ones(2)}, {"z": torch.tensor([0, 2])}), "expected bounds of z, pos and y"),
    ):
        torch.save(saved, tmp_path / "q.pt")
        with pytest.raises(ValueError, match=rf"q\.pt: .*{message}"):
            list(read(tmp_path / "q.pt", format="qm9"))
        (tmp_path / "q.pt").unlink()


def test_qmof_json(tmp_path):
    first, second = everything(made.write_qmof_json(tmp_path), "qmof")
    assert (first.id, first.targets, second.targets) == ("qmof-1", {"bandgap": 1.25}, {"bandgap": 0.0})
    np.testing.assert_array_equal(first.numbers, [30, 8])
    np.testing.assert_array_equal(first.positions, [[0.5, 1, 1.5], [2.5, 1, 1.5]])
    np.testing.assert_array_equal(first.cell, [[8, 0, 0], [1, 9, 0], [0, 0, 10]])
    labels, structures = tmp_path / "qmof.json", tmp_path / "qmof_structure_data.json"
    good = structures.read_text()
    for wrong, message in (
        (good.replace('"qmof-2"', '"other"'), "qmof-2: not there, as 1 of 3"),
        (good.replace("Zn1", "zinc"), "qmof-1: site 0: its label 'zinc' is no element"),
        (good.replace("[8, 0, 0]", "[8, 0]"), "qmof-1: "),
        (good.replace("sites", "size"), "qmof-1: KeyError: 'sites'"),
        (good[:-20], ""),
    ):
        structures.write_text(wrong)
        with pytest.raises(ValueError, match=rf"qmof_structure_data\.json: {message}"):
            list(read(tmp_path, format="qmof"))
    labels.write_text(json.dumps([{"id": 3}]))
    with pytest.raises(ValueError, match=r"qmof\.json: KeyError: 'qmof_id'"):
        list(read(tmp_path, format="qmof"))


@pytest.mark.parametrize("ending", [".extxyz", ".traj", ".db", ".extxyz.gz", ".json"])
def test_ase_files(tmp_path, ending):
    import ase.db
    import ase.io

    path = tmp_path / f"frames{ending}"
    if ending in (".db", ".json"):
        with ase.db.connect(path) as database:
            for atoms in made.ase_frames():
                database.write(atoms, gap=1.5, label="x", data={"dipole": 0.25, "many": [1, 2]})
    else:
        ase.io.write(path, made.ase_frames())
    assert {s.tags for s in everything(path, "ase")} == {None}
    found = everything(path, "ase", tags="oc20")
    assert_is_truth(found, rtol=1e-6)
    s = found[1]
    assert s.id == f"frames{ending}:1"
    np.testing.assert_array_equal(s.tags, [0, 0, 1, 2, 2])
    np.testing.assert_array_equal(s.fixed, [True, True, False, False, False])
    np.testing.assert_array_equal(s.cell, np.diag([7, 8, 9.0]))
    assert s.pbc.tolist() == [True, True, False]
    assert dict(s.targets) == ({"gap": 1.5, "dipole": 0.25} if ending in (".db", ".json") else {})


def test_ase_labels_in_info(tmp_path):
    columns = "Properties=species:S:1:pos:R:3:tags:I:1:REF_forces:R:3"
    (tmp_path / "a.xyz").write_text(f"1\n{columns} REF_energy=-1.5 charge=1 good=T name=x\nH 0 0 0 4 1 2 3\n")
    (s,) = everything(tmp_path / "a.xyz", "ase")
    assert (s.energy, s.forces.tolist(), s.targets, s.tags) == (-1.5, [[1, 2, 3]], {"charge": 1.0}, None)


def test_ase_refuses_what_it_should(tmp_path):
    (tmp_path / "old.traj").write_bytes(b"PickleTrajectory" + pickle.dumps({"a": 1}))
    (tmp_path / "a.py").write_text("open('ran', 'w')")
    (tmp_path / "cut.cif").write_text("data_x\n_cell_length_a 3\n")
    (tmp_path / "cut.db").write_bytes(b"SQLite format 3\0" + b"x" * 500)
    (tmp_path / "empty.xyz").write_text("")
    (tmp_path / "wide.xyz").write_text("1\nProperties=species:S:1:pos:R:3000000000\nH 0 0 0\n")
    (tmp_path / "POSCAR").write_text("H\n1\n9 0 0\n0 9 0\n0 0 9\nH\n3000000000\nDirect\n0 0 0\n")
    for name in ("old.traj", "a.py", "cut.cif", "cut.db", "empty.xyz", "wide.xyz", "POSCAR"):
        with pytest.raises(ValueError, match=name):
            list(read(tmp_path / name, format="ase"))


def test_read_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"format: expected one of oc20, oc22, .* ase, got 'ani'"):
        read(tmp_path, format="ani")
    for name in FORMATS:
        with pytest.raises(FileNotFoundError, match="nowhere"):
            read(tmp_path / "nowhere", format=name)
        with pytest.raises(ValueError, match=str(tmp_path)):
            list(read(tmp_path, format=name))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    for module, file, name in (("h5py", "a.h5", "spice"), ("ase.io.formats", "a.cif", "ase")):
        monkeypatch.setitem(sys.modules, module, None)
        (tmp_path / file).write_text("")
        with pytest.raises(ImportError, match=rf"{module[:3]}\w* is missing: pip install ejmp\[data\] brings it"):
            list(read(tmp_path / file, format=name))
