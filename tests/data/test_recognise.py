"""The format of a source is recognised by its contents, said, and asked for where several fit."""

import bz2
import gzip
import lzma
import shutil

import ase.db
import ase.io
import numpy as np
import pytest
from ase.build import bulk
from support import data_sources as made
from support.inputs import shared_file

from ejmp import cli
from ejmp.data import ReadOptions, convert, open_store, read
from ejmp.data.readers.hdf5 import ANI1X_LAYOUT, SPICE_LAYOUT, TRANSITION1X_LAYOUT
from ejmp.data.readers.md import MD22_LAYOUT, RMD17_LAYOUT
from ejmp.data.readers.recognise import recognise
from ejmp.data.readers.units import binding_energy

GROUPS = ["train/C1H3O1/rxn0"]
PACKERS = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress}


def text_of(kind, folder):
    path = folder / f"source.{kind}"
    ase.io.write(path, bulk("NaCl", "rocksalt", a=5.64), format=kind)
    contents = path.read_bytes()
    path.unlink()
    return contents


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("POSCAR.01", "vasp"),
        ("POSCAR_relaxed", "vasp"),
        ("CONTCAR", "vasp"),
        ("contcar.42.vasp.bak", "vasp"),
        ("a.XYZ", "extxyz"),
        ("frames.dat", "extxyz"),
        ("POSCAR.xyz", "vasp"),
        ("a.cif.1", "cif"),
        ("a", "cif"),
    ],
)
def test_names_of_every_kind(tmp_path, name, kind, packed):
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(PACKERS[packed](text_of(kind, tmp_path)))
    for source in (path, tmp_path):
        (s,) = read(source)
        assert sorted(s.numbers) == [11, 17]
        assert abs(np.linalg.det(s.cell)) == pytest.approx(5.64**3 / 4, rel=1e-6)
        assert s.id == f"{path.name}:0"


def test_databases_of_any_name(tmp_path):
    with ase.db.connect(tmp_path / "a.db") as database:
        database.write(bulk("Cu"), gap=1.5)
    with ase.db.connect(tmp_path / "b.json") as database:
        database.write(bulk("Cu"), gap=1.5)
    ase.io.write(tmp_path / "c.traj", bulk("Cu"))
    for name, targets in (("a.db", {"gap": 1.5}), ("b.json", {"gap": 1.5}), ("c.traj", {})):
        shutil.move(tmp_path / name, tmp_path / f"{name}.old")
        (s,) = read(tmp_path / f"{name}.old")
        assert s.targets == targets


WRITERS = {
    "rmd17": lambda path: made.write_npz(path / "x.npz", RMD17_LAYOUT),
    "md22": lambda path: made.write_npz(path / "x.npz", MD22_LAYOUT),
    "ani1x": lambda path: made.write_hdf5(path / "x.h5", ANI1X_LAYOUT, GROUPS),
    "transition1x": lambda path: made.write_hdf5(path / "x.h5", TRANSITION1X_LAYOUT, GROUPS),
    "spice": lambda path: made.write_hdf5(path / "x.h5", SPICE_LAYOUT, GROUPS),
    "qm9": made.write_qm9_raw,
    "qm9 of PyG": lambda path: made.write_qm9_pt(path / "x.pt"),
    "qmof": made.write_qmof_json,
    "oc20_text": made.write_oc20_text,
    "oc20_text plain": lambda path: made.write_oc20_text(path, packed=False),
}


@pytest.mark.parametrize("name", WRITERS)
def test_formats_of_datasets(tmp_path, name, capsys):
    path = WRITERS[name](tmp_path)
    expected = name.partition(" ")[0]
    for source in {path, tmp_path} if expected in ("rmd17", "md22") else {path}:
        if source.is_file():
            source = source.rename(tmp_path / "renamed")
        assert recognise(source).format == expected
        found = [s.id for s in read(source)]
        assert f"{source}: taken for {expected}: " in capsys.readouterr().err
        if source.is_file():
            source.rename(path)
            continue
        assert found == [s.id for s in read(source, format=expected)]


@pytest.mark.parametrize("name", ["ani1x", "spice", "qm9 of PyG"])
def test_a_folder_of_a_format_that_is_one_file(tmp_path, name):
    path = WRITERS[name](tmp_path)
    with pytest.raises(ValueError, match=f"{path.name} in it is of the format {name[:3]}.*: name that file"):
        read(tmp_path)


def test_real_sources():
    for name, expected in (
        ("ani1x/ani1x_subset.h5", "ani1x"),
        ("spice/SPICE-1.1.4_subset.hdf5", "spice"),
        ("rmd17", "rmd17"),
        ("qmof", "qmof"),
        ("botnet", "ase"),
        ("oc20/raw_traj", "ase"),
        ("oxides_bo2/bo2_pbe_eos.extxyz", "ase"),
        ("qm9/dsgdb9nsd_000001.xyz", "qm9"),
        ("qm9/schnetpack_test_qm9_15props.db", "ase"),
    ):
        assert recognise(shared_file(f"data/{name}")).format == expected


def test_ambiguous_sources_are_asked_for(tmp_path, capsys):
    for name in ("md22/md22_Ac-Ala3-NHMe_5frames.xyz", "md17/ethanol_sampledata.xyz"):
        with pytest.raises(
            ValueError, match=r"xyz: energy -\d+\.\d+ is too low for eV.* --format md22 or --format ase"
        ):
            read(shared_file(f"data/{name}"))
    made.write_oc(tmp_path)
    assert cli.main(["data", "convert", str(tmp_path), str(tmp_path / "set"), "--split", "train"]) == 2
    assert "of OC20 or of OC22: say which it is, --format oc20 or --format oc22" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"qm9: its files are of several formats: ase \(\S+\), qm9 \(\S+\): say which"):
        read(shared_file("data/qm9"))


@pytest.mark.parametrize(
    ("symbol", "hartree"), [("H", -0.5), ("C", -37.8), ("O", -75.1), ("Cu", -1640), ("Au", -17866)]
)
def test_binding_energies(symbol, hartree):
    """Energies of free atoms: what the estimate calls too low for eV must be far from them (nonrelativistic values)."""
    from ase.data import atomic_numbers

    assert 0.85 < binding_energy([atomic_numbers[symbol]]) / (-hartree * 27.211386) < 1.15


def test_units_of_molecules(tmp_path):
    """Water at -76.4 hartree: eV and a unit that is stated are ase, kcal/mol is asked for, a bare number is md22."""
    rows = "O 0 0 0 0 0 0\nH 0 0 1 0 0 0\nH 0 1 0 0 0 0\n"
    columns = "Properties=species:S:1:pos:R:3:forces:R:3"
    for comment, expected in (
        (f"{columns} energy=-2079 pbc='F F F'", "ase"),
        (f"Energy=-2079 {columns}", "ase"),
        (f"Energy=-12 {columns}", "--format md22 or --format ase"),
        (f"{columns} energy=-47900", "--format md22 or --format ase"),
        (f"{columns} energy=-47900 energy_unit=kcal/mol", "ase"),
        ("-47900.5", "md22"),
    ):
        (tmp_path / "a.xyz").write_text(f"3\n{comment}\n{rows}")
        if expected.startswith("--"):
            with pytest.raises(ValueError, match=expected):
                recognise(tmp_path / "a.xyz")
        else:
            assert recognise(tmp_path / "a.xyz").format == expected


def test_what_no_format_is(tmp_path):
    files = {
        "a.pkl": (b"\x80\x04N.", "a pickle, which could run code"),
        "a.txt": (b"hello\n", "of no format that ejmp recognises"),
        "empty": (b"", "of no format that ejmp recognises"),
        "a.h5": (b"\x89HDF\r\n\x1a\n" + b"x" * 100, ""),
        "a.npz": (b"PK\x03\x04" + b"x" * 100, ""),
        "a.gz": (b"\x1f\x8b" + b"x" * 100, "cannot be read"),
    }
    for name, (contents, message) in files.items():
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
            read(tmp_path / name)
    np.savez(tmp_path / "b.npz", weights=np.zeros(3))
    with pytest.raises(ValueError, match=r"b\.npz: an npz of no layout that ejmp knows; it has weights"):
        read(tmp_path / "b.npz")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none: of no format that ejmp knows; it has none: say --format"):
        read(tmp_path / "none")
    convert(made.write_npz(tmp_path / "c.npz", RMD17_LAYOUT), tmp_path / "set", split="train")
    for folder in (tmp_path / "set", tmp_path / "set" / "train"):
        with pytest.raises(ValueError, match=r"a record store that ejmp has written: ejmp\.data\.open_store"):
            read(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("format", [None, "ase"])
def test_a_folder_with_an_unreadable_file(tmp_path, capsys, format):  # noqa: A002
    source = tmp_path / "source"
    source.mkdir()
    for k in range(4):
        (source / f"POSCAR.{k}").write_bytes(text_of("vasp", tmp_path))
    (source / "POSCAR.2").write_text("NaCl\n1.0\n5 0 0\n0 5 0\n0 0 x\n")
    (source / "a.cif").write_text("data_x\n_cell_length_a 3\n")
    (source / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"POSCAR\.2: "):
        list(read(source, format=format))
    found = [s.id for s in read(source, format=format, options=ReadOptions(on_error="skip"))]
    assert found == ["POSCAR.0:0", "POSCAR.1:0", "POSCAR.3:0"]
    err = capsys.readouterr().err
    assert "POSCAR.2: " in err
    assert "left out, 2 so far: " in err
    assert "1 of other names are not: notes.txt" in err
    command = ["data", "convert", str(source), str(tmp_path / "set"), "--split", "train", "--on-error", "skip"]
    assert cli.main(command if format is None else [*command, "--format", format]) == 0
    assert "left out, 2 so far: " in capsys.readouterr().err
    assert [s.id for s in open_store(tmp_path / "set" / "train")] == found
