"""The readers on real files, whose values are compared with other sources of the same numbers in eV and A."""

import csv
import json
import lzma
import re
import shutil
import sqlite3
import zipfile

import numpy as np
import pytest
from support.data_sources import everything

from ejmp.data.readers import units

HARTREE, KCAL, BOHR = 27.211386245988, 0.0433641042418, 0.529177210544


def test_units_are_those_of_ase():
    from ase.units import create_units

    codata = create_units("2022")
    np.testing.assert_allclose(units.HARTREE, codata["Hartree"], rtol=1e-12)
    np.testing.assert_allclose(units.BOHR, codata["Bohr"], rtol=1e-11)
    np.testing.assert_allclose(units.KCAL_PER_MOL, codata["kcal"] / codata["mol"], rtol=1e-12)
    assert (units.HARTREE, units.BOHR, units.KCAL_PER_MOL) == (HARTREE, BOHR, KCAL)


def test_ani1x_file(shared):
    import h5py

    path = shared("data/ani1x/ani1x_subset.h5")
    found = {s.id: s for s in everything(path, "ani1x")}
    with h5py.File(path) as file:
        assert sum(len(group["coordinates"]) for group in file.values()) == len(found) == 6
        for formula, group in file.items():
            for k, energy in enumerate(group["wb97x_dz.energy"][:]):
                s = found[f"{formula}:{k}"]
                np.testing.assert_array_equal(s.numbers, group["atomic_numbers"][:])
                np.testing.assert_array_equal(s.positions, group["coordinates"][k])
                np.testing.assert_allclose(s.forces, group["wb97x_dz.forces"][k] * HARTREE, rtol=1e-6)
                assert s.energy == pytest.approx(energy * HARTREE, rel=1e-12)
    assert found["C2H10N4O3:0"].energy == pytest.approx(-14325.8532, abs=1e-3)


def test_spice_file(shared):
    import h5py

    path = shared("data/spice/SPICE-1.1.4_subset.hdf5")
    found = {s.id: s for s in everything(path, "spice")}
    assert len(found) == 43
    with h5py.File(path) as file:
        group = file["C#C.[Na+]"]
        for k in range(3):
            s = found[f"C#C.[Na+]:{k}"]
            np.testing.assert_allclose(s.positions, group["conformations"][k].astype(float) * BOHR, rtol=1e-12)
            np.testing.assert_allclose(s.forces, -group["dft_total_gradient"][k] * HARTREE / BOHR, rtol=1e-6)
            assert s.energy == pytest.approx(group["dft_total_energy"][k] * HARTREE, rel=1e-12)
            assert s.targets == {"formation_energy": pytest.approx(group["formation_energy"][k] * HARTREE)}
    # Between the two closest conformations, the forces predict the change of the energy.
    assert_forces_explain([found["C#C.[Na+]:0"], found["C#C.[Na+]:1"], found["C#C.[Na+]:2"]], pairs=1, slope=0.2)


def test_rmd17_files(shared):
    folder = shared("data/rmd17")
    found = everything(folder, "rmd17")
    assert len(found) == 200 + 200 + 8 * 50
    by_id = {s.id: s for s in found}
    with np.load(folder / "rmd17_aspirin_train_01.npz") as arrays:
        s = by_id["rmd17_aspirin_train_01:17"]
        np.testing.assert_array_equal(s.numbers, arrays["nuclear_charges"])
        np.testing.assert_array_equal(s.positions, arrays["coords"][17])
        np.testing.assert_allclose(s.forces, arrays["forces"][17] * KCAL, rtol=1e-12)
        assert s.energy == pytest.approx(arrays["energies"][17] * KCAL, rel=1e-12)
    assert by_id["rmd17_aspirin_train_01:0"].energy == pytest.approx(-406273.74559918 * KCAL, rel=1e-12)
    assert_forces_explain([s for s in found if "ethanol" in s.id], pairs=20, slope=0.25)


def test_md22_and_md17_xyz(shared):
    path = shared("data/md22/md22_Ac-Ala3-NHMe_5frames.xyz")
    found = everything(path, "md22")
    lines = path.read_text().splitlines()
    assert len(found) == len(lines) // 44 == 5
    for k, s in enumerate(found):
        frame = lines[44 * k : 44 * k + 44]
        assert s.energy == pytest.approx(float(re.search(r"Energy=(\S+)", frame[1])[1]) * KCAL, rel=1e-12)
        rows = np.array([line.split()[1:] for line in frame[2:]], dtype=float)
        np.testing.assert_array_equal(s.positions, rows[:, :3])
        np.testing.assert_allclose(s.forces, rows[:, 3:] * KCAL, rtol=1e-12)
        assert "".join(line.split()[0] for line in frame[2:]).count("C") == (s.numbers == 6).sum()
    assert found[0].energy == pytest.approx(-620726.002662 * KCAL, rel=1e-12)
    assert_forces_explain(found, pairs=10, slope=0.02)
    ethanol = everything(shared("data/md17/ethanol_sampledata.xyz"), "md22")
    assert len(ethanol) == 100
    assert ethanol[0].energy == pytest.approx(-97195.01189948035 * KCAL, rel=1e-12)
    assert ethanol[0].forces[0] == pytest.approx(np.array([26.23068692, -14.15197537, 33.37017128]) * KCAL)
    assert_forces_explain(ethanol, pairs=20, slope=0.15)


def test_qm9_raw_files(shared):
    folder = shared("data/qm9")
    found = {s.id: s for s in everything(folder, "qm9")}
    assert list(found) == [f"gdb_{k}" for k in range(1, 8)]
    methane = found["gdb_1"]
    # PyG's own processed data have these values for this molecule, to the digits it prints.
    pyg = [0.0, 13.21, -10.5499, 3.1865, 13.7363, 35.3641, 1.2177, -1101.4878, -1101.4098, -1101.3840, -1102.0229]
    pyg += [6.469, -17.1722, -17.2868, -17.3897, -16.1519, 157.7118, 157.70997, 157.70699]
    np.testing.assert_allclose(list(methane.targets.values()), pyg, atol=6e-5)
    assert methane.energy == pytest.approx(-40.47893 * HARTREE, rel=1e-12)
    np.testing.assert_array_equal(methane.positions[0], [-0.0126981359, 1.0858041578, 0.0080009958])
    # SchNetPack's database has the same molecules in eV, converted with other constants.
    rows = {s.id.rpartition(":")[2]: s for s in everything(folder / "schnetpack_test_qm9_15props.db", "ase")}
    names = {"energy_U0": "U0", "homo": "homo", "zpve": "zpve", "free_energy": "G", "heat_capacity": "Cv"}
    for k in range(7):
        raw, row = found[f"gdb_{k + 1}"], rows[str(k)]
        np.testing.assert_allclose(raw.positions, row.positions, atol=1e-8)
        for theirs, ours in names.items():
            assert raw.targets[ours] == pytest.approx(row.targets[theirs], rel=1e-7)


def test_qm9_database_and_extxyz(shared):
    path = shared("data/qm9/schnetpack_test_qm9_15props.db")
    found = everything(path, "ase")
    with sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True) as database:
        (count,) = database.execute("select count(*) from systems").fetchone()
        blobs = [np.frombuffer(blob) for (blob,) in database.execute("select positions from systems order by id")]
    assert len(found) == count == 12
    for s, positions in zip(found, blobs, strict=True):
        np.testing.assert_array_equal(s.positions.ravel(), positions)
    assert found[0].targets["homo"] == pytest.approx(-0.3877 * HARTREE, rel=1e-6)
    path = shared("data/qm9/qm9_rows001_400_U0_eV.extxyz")
    found = everything(path, "ase")
    energies = re.findall(r"energy_U0=(\S+)", path.read_text())
    assert [s.targets["energy_U0"] for s in found] == [float(energy) for energy in energies]


def test_qmof_files(shared):
    folder = shared("data/qmof")
    with (folder / "bandgaps.csv").open() as lines:
        gaps = {row["file"]: row for row in csv.DictReader(lines)}
    found = everything(folder, "qmof")
    assert {s.id for s in found} == {name for name in gaps if (folder / name).exists()}
    for s in found:
        assert s.targets["bandgap"] == float(gaps[s.id]["BG_PBE_eV"])
        hybrid = gaps[s.id]["BG_HSE06_eV"]
        assert s.targets.get("bandgap_hse06") == (float(hybrid) if hybrid else None)
        assert s.energy is s.forces is None
    by_id = {s.id: s for s in found}
    assert by_id["qmof-81035b4.cif"].targets == {"bandgap": 1.647473}
    s = by_id["qmof-fc0e787.cif"]
    np.testing.assert_allclose(np.linalg.norm(s.cell, axis=1), [5.00523638, 6.56300777, 8.85998395], rtol=1e-8)
    assert np.bincount(s.numbers)[[1, 3, 6, 8]].tolist() == [8, 4, 8, 12]
    contcar = (folder / "RAXNEK.CONTCAR").read_text().splitlines()
    s = by_id["RAXNEK.CONTCAR"]
    np.testing.assert_allclose(s.cell, [[float(v) for v in line.split()] for line in contcar[2:5]], rtol=1e-14)
    fractions = np.array([[float(v) for v in line.split()[:3]] for line in contcar[8 : 8 + 78]])
    np.testing.assert_allclose(s.positions, fractions @ s.cell, atol=1e-9)


def test_oc20_trajectories_and_text(shared):
    from ase.io import read as ase_read

    folder = shared("data/oc20/raw_traj")
    found = everything(folder, "ase")
    assert len(found) == 80
    atoms = ase_read(folder / "random1000102.traj", 3)
    s = {s.id: s for s in found}["random1000102.traj:3"]
    np.testing.assert_array_equal(s.positions, atoms.positions)
    np.testing.assert_array_equal(s.cell, atoms.cell.array)
    np.testing.assert_array_equal(s.forces, atoms.get_forces(apply_constraint=False))
    np.testing.assert_array_equal(s.fixed.nonzero()[0], np.sort(atoms.constraints[0].index))
    assert s.energy == atoms.get_potential_energy()
    assert s.pbc.all()
    assert np.abs(s.forces[s.fixed]).max() > 0.1  # constraints are a mask, and do not change labels
    assert_forces_explain(found, pairs=20, slope=0.02)

    text = everything(shared("data/oc20/s2ef_extxyz_derived"), "ase", tags="oc20")
    rows = shared("data/oc20/s2ef_extxyz_derived/0.index.csv").read_text().split()[1:]
    assert len(text) == len(rows) == 80
    energies = sorted(s.energy for s in found)
    assert sorted(s.energy for s in text) == pytest.approx(energies, abs=1e-6)
    assert {0, 1, 2} == set(np.concatenate([s.tags for s in text]))


def test_oc20_text_of_the_published_form(shared, tmp_path):
    """A derived extxyz file is read with a txt file like the published ones, whose references are made up."""
    folder = shared("data/oc20/s2ef_extxyz_derived")
    rows = (folder / "0.index.csv").read_text().split()[1:]
    shutil.copy(folder / "0.extxyz.xz", tmp_path)
    references = np.linspace(-900, 100, len(rows))
    labels = "".join(f"{row},{value!r}\n" for row, value in zip(rows, references.tolist(), strict=True))
    (tmp_path / "0.txt.xz").write_bytes(lzma.compress(labels.encode()))
    found = everything(tmp_path, "oc20_text")
    whole = [s.energy for s in everything(folder, "ase")]
    assert [s.energy for s in found] == pytest.approx(np.subtract(whole, references).tolist())
    assert found[0].id == "0.extxyz.xz/0/random1000102/frame0"
    first = lzma.decompress((folder / "0.extxyz.xz").read_bytes()).decode().splitlines()
    columns = np.array([line.split() for line in first[2 : 2 + int(first[0])]])
    np.testing.assert_array_equal(found[0].positions, columns[:, 1:4].astype(float))
    np.testing.assert_array_equal(found[0].fixed, columns[:, 4] == "F")
    np.testing.assert_array_equal(found[0].tags, columns[:, 5].astype(int))
    np.testing.assert_array_equal(found[0].forces, columns[:, 6:].astype(float))


def test_other_ase_files(shared, tmp_path):
    oxides = everything(shared("data/oxides_bo2/bo2_pbe_eos.extxyz"), "ase")
    source = json.loads(shared("data/oxides_bo2/bo2_pbe_eos.json").read_text())
    first = source["SnO2"]["rutile"]["PBE"]["EOS"]["calculations"][0]
    assert len(oxides) == 108
    assert oxides[0].energy == pytest.approx(first["data"]["total_energy"], abs=1e-6)
    neb = everything(shared("data/oc20/oc20neb_structures"), "ase", tags="oc20")
    assert len(neb) == 10
    assert all(s.fixed.any() and set(s.tags) == {0, 1, 2} for s in neb)
    assert [s.energy is None for s in neb] == [True, *[False] * 8, True]
    botnet = {s.id: s for s in everything(shared("data/botnet"), "ase")}
    assert botnet["3bpa_train_300K.xyz:0"].energy == -17660.461737861464
    assert len(botnet) == 207
    with zipfile.ZipFile(shared("data/mofs/odac23_pristine_mofs.zip")) as archive:
        names = archive.namelist()[::45]
        archive.extractall(tmp_path, names)
        lengths = {name: re.findall(r"_cell_length_\w +(\S+)", archive.read(name).decode()) for name in names}
        formulas = {name: re.search(r"formula_sum +'(.+)'", archive.read(name).decode())[1] for name in names}
    for s in everything(tmp_path, "ase"):
        name = s.id.removesuffix(":0")
        np.testing.assert_allclose(np.linalg.norm(s.cell, axis=1), [float(v) for v in lengths[name]], rtol=1e-6)
        assert len(s.numbers) == sum(int(v) for v in re.findall(r"[A-Z][a-z]?(\d+)", formulas[name]))


def assert_forces_explain(structures, pairs, slope):
    """Check that dE = -F.dx of the mean force, to within `slope`, for the closest pairs of frames of one system."""
    systems = {}
    for s in structures:
        systems.setdefault(s.id.rpartition(":")[0], []).append(s)
    found = []
    for frames in systems.values():
        for k, a in enumerate(frames):
            for b in frames[:k]:
                move = a.positions - b.positions
                work = -0.5 * ((a.forces + b.forces) * move).sum()
                found.append((np.sqrt((move**2).sum(1).mean()), a.energy - b.energy, work))
    _, energy, work = np.array(sorted(found)[:pairs]).T
    assert (energy @ work) / (work @ work) == pytest.approx(1, abs=slope)
    assert energy @ work > 0.9 * np.linalg.norm(energy) * np.linalg.norm(work)
