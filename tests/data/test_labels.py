"""Labels of files of a user's own: each is read right, or refused with file and frame; none is lost without a word."""

import gzip
import json
import re

import ase.db
import ase.io
import h5py
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.data_sources import oc_record, write_lmdb, write_qmof_json
from support.inputs import shared_file

from ejmp import cli
from ejmp.data import Format, Part, ReadOptions, Structure, convert, open_store, read

HARTREE, KCAL, BOHR = 27.211386245988, 0.0433641042418, 0.529177210544
EV = {"eV": 1, "meV": 1e-3, "kcal/mol": KCAL, "kJ/mol": KCAL / 4.184, "hartree": HARTREE, "rydberg": HARTREE / 2}
ANGSTROM = {"A": 1, "bohr": BOHR, "nm": 10, "pm": 0.01}
POSITIONS = np.array([[0, 0, 0], [0, 0, 1.1], [0, 1.3, 0.2]])
FORCES = np.array([[0.5, -0.25, 0.125], [-0.75, 0, 0.5], [0.25, 0.25, -0.625]])
ENERGY = -100.0
MANY = settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def case(name):
    return shared_file(f"cases/{name}")


def first(path, **options):
    return next(iter(read(path, format="ase", options=ReadOptions(**options))))


@pytest.mark.parametrize(
    ("name", "energy", "forces"),
    [
        ("Forces", "Energy", "Forces"),
        ("REF", "REF_energy", "REF_forces"),
        ("TotEnergy", "TotEnergy", "force"),
        ("dft_both", "dft_energy", "dft_forces"),
        ("dft_force", "energy", "dft_force"),
        ("force", "energy", "force"),
        ("forces", "energy", "forces"),
        ("lammps_mlip", "free_energy", "forces"),
    ],
)
def test_case_of_names_of_forces(name, energy, forces):
    """Issue 13, case 03: energy -100 eV and forces 0.5 eV/A, or a refusal that names the column and the flag."""
    path = case("03-extxyz-force-singular") / f"{name}.xyz"
    for k, s in enumerate(read(path, format="ase", options=ReadOptions(energy_key=energy, forces_key=forces))):
        assert s.energy == -100 - k
        np.testing.assert_array_equal(s.forces, np.full((6, 3), 0.5 + k))
        assert not s.targets
    if (energy, forces) in (("energy", "forces"), ("REF_energy", "REF_forces")):
        assert first(path).energy == -100
        return
    lost = f"--energy-key {energy}" if forces == "forces" else f"--forces-key {forces}"
    with pytest.raises(ValueError, match=rf"{name}\.xyz: frame 0: .*{lost}"):
        first(path)


def test_labels_left_out_on_purpose():
    path = case("03-extxyz-force-singular") / "Forces.xyz"
    s = first(path, forces_key="none")
    assert (s.energy, s.forces) == (-100, None)
    s = first(path, energy_key="none", forces_key="Forces")
    assert (s.energy, s.forces[0].tolist(), s.targets) == (None, [0.5] * 3, {})


@pytest.mark.parametrize(
    ("name", "energy", "force"),
    [
        ("md22_like_kcal", -25000 * KCAL, 0.5 * KCAL),
        ("sgdml_bytes", -25000 * KCAL, 0.5 * KCAL),
        ("rmd17_like", -25000 * KCAL, 0.5 * KCAL),
        ("sgdml_ev", -1096, 0.5),
    ],
)
def test_case_of_units_in_npz(name, energy, force):
    """Issue 13, case 22: an npz is in the unit that it states."""
    found = list(read(case("22-sgdml-npz-units") / f"{name}.npz"))
    assert len(found) == 4
    assert found[0].energy == pytest.approx(energy, rel=1e-12)
    np.testing.assert_allclose(found[0].forces, force, rtol=1e-12)


def test_case_of_npz_that_are_refused(tmp_path):
    folder = case("22-sgdml-npz-units")
    for name, message in (
        ("ai2bmd", "several molecules end to end are not read"),
        ("object", "R: Object arrays cannot be loaded: they are pickles"),
    ):
        for chosen in (None, "md22"):
            with pytest.raises(ValueError, match=rf"{name}\.npz: .*{message}"):
                list(read(folder / f"{name}.npz", format=chosen))
    with pytest.raises(ValueError, match="for a molecule of your own, say --split train, val or test"):
        convert(folder / "md22_like_kcal.npz", tmp_path / "a")
    with pytest.raises(ValueError, match=r"sgdml_ev\.npz: --unit-energy: kcal/mol was asked for, .*'eV'"):
        list(read(folder / "sgdml_ev.npz", options=ReadOptions(unit_energy="kcal/mol")))
    old = next(iter(read(folder / "rmd17_like.npz", options=ReadOptions(energy_key="old_energies", unit_energy="eV"))))
    assert old.energy == -25000.1


def test_case_of_a_target_from_a_database(tmp_path, capsys):
    """Issue 13, case 29: a database's own target, under a name that is asked for."""
    path = case("29-custom-target-from-db") / "train.db"
    assert first(path).targets == {"bandgap": 4.0, "homo": -7.0}
    command = ["data", "convert", str(path), str(tmp_path / "set"), "--split", "train", "--target", "bandgap=gap"]
    assert cli.main(command) == 0
    rows = list(ase.db.connect(path, use_lock_file=False).select())
    out, err = capsys.readouterr()
    assert "taken for ase: its contents are an ASE database" in err
    assert re.search(r"bandgap +structure +target gap +8\n", out)
    assert re.search(r"homo +structure +not read +8\n", out)
    assert [s.targets for s in open_store(tmp_path / "set" / "train")] == [{"gap": row.bandgap} for row in rows]
    assert cli.main(["data", "info", str(tmp_path / "set" / "train")]) == 0
    assert re.search(r"homo +structure +not read +8\n", capsys.readouterr().out)


def write_xyz(path, energy="energy", forces="forces", more="", frames=2, units=(1.0, 1.0)):
    """Write frames with labels of these names, in these units of energy (eV) and length (A)."""
    force = units[0] / units[1]
    columns = ":".join(f"{name}:R:{3 // len(forces.split(','))}" for name in forces.split(",")) if forces else ""
    lines = []
    for _ in range(frames):
        comment = f"Properties=species:S:1:pos:R:3{':' * bool(columns)}{columns}"
        lines += ["3", f"{comment} {f'{energy}={ENERGY / units[0]!r}' if energy else ''} {more}".strip()]
        for symbol, position, push in zip("OHH", POSITIONS / units[1], FORCES / force, strict=True):
            lines.append(" ".join([symbol, *map(repr, (*position.tolist(), *(push.tolist() if forces else ())))]))
    text = "\n".join(lines) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_rows(path, energy, forces, inside):
    """Write a database whose rows have labels of these names, the energy among the keys or the data."""
    path.unlink(missing_ok=True)
    with ase.db.connect(path, use_lock_file=False) as database:
        for _ in range(2):
            data = {forces: FORCES} if forces else {}
            data |= {energy: ENERGY} if energy and inside else {}
            keys = {energy: ENERGY} if energy and not inside else {}
            database.write(Atoms("OHH", POSITIONS), data=data, **keys)
    return path


def assert_right(s):
    assert s.energy == pytest.approx(ENERGY, rel=1e-12)
    np.testing.assert_allclose(s.forces, FORCES, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(s.positions, POSITIONS, rtol=1e-12)


def attempt(path):
    """Return the first structure, or None and why it is refused."""
    try:
        return first(path), ""
    except ValueError as error:
        return None, str(error)


ENERGIES = st.sampled_from(["energy", "Energy", "REF_energy", "TotEnergy", "dft_energy", "E", "free_energy", "e_tot"])
NAMES = [
    "forces",
    "REF_forces",
    "force",
    "Forces",
    "dft_force",
    "dft_forces",
    "F",
    "gradient",
    "DFT_FORCE",
    "xtb_forces",
]
COLUMNS = st.sampled_from([*NAMES, "fx,fy,fz", "force_x,force_y,force_z"])
ENDINGS = st.sampled_from([".extxyz", ".xyz.gz"])


@MANY
@given(energy=ENERGIES | st.none(), forces=COLUMNS | st.none(), ending=ENDINGS)
def test_no_name_of_a_column_is_silent(tmp_path_factory, energy, forces, ending):
    path = write_xyz(tmp_path_factory.mktemp("a") / f"a{ending}", energy, forces)
    found, refusal = attempt(path)
    if found is None:
        assert re.search(rf"a{re.escape(ending)}: frame 0: ", refusal)
        assert any(f"--{kind}-key {name}" in refusal for kind, name in (("energy", energy), ("forces", forces)))
    else:
        assert (found.forces is None) == (forces is None)
        assert found.energy == (ENERGY if energy in ("energy", "Energy", "REF_energy") else None)
        assert found.energy is not None or energy is None or found.targets == {energy: ENERGY} or forces is None
    s = first(path, energy_key=energy or "none", forces_key=forces or "none")
    assert s.energy == (None if energy is None else ENERGY)
    assert s.forces is None if forces is None else s.forces.tolist() == FORCES.tolist()
    for wrong in ({"energy_key": "nowhere"}, {"forces_key": "nowhere"}, {"targets": {"nowhere": "x"}}):
        with pytest.raises(ValueError, match=rf"a{re.escape(ending)}: frame 0: .*nowhere"):
            first(path, **{"energy_key": "none", "forces_key": "none", **wrong})


@settings(MANY, max_examples=60)
@given(energy=ENERGIES, forces=st.sampled_from(NAMES), inside=st.booleans())
def test_no_name_in_a_database_is_silent(tmp_path_factory, energy, forces, inside):
    inside = inside or energy in ("energy", "free_energy")  # which ASE keeps for the calculator
    path = write_rows(tmp_path_factory.mktemp("a") / "a.db", energy, forces, inside=inside)
    found, refusal = attempt(path)
    if found is None:
        assert re.search(rf"a\.db: frame 0: .*--(energy-key {energy}|forces-key {forces})", refusal)
    else:
        assert_right(found)
    assert_right(first(path, energy_key=energy, forces_key=forces))


SPELLINGS = {
    "eV": ("eV", "ev", "electronvolt"),
    "meV": ("meV",),
    "kcal/mol": ("kcal/mol", "Kcal/Mol", "kcal mol-1"),
    "kJ/mol": ("kJ/mol", "kj_per_mol"),
    "hartree": ("Hartree", "Ha", "a.u.", "Eh"),
    "rydberg": ("Ry", "rydberg"),
    "A": ("A", "Ang", "angstrom", "Angstrom"),
    "bohr": ("Bohr", "a0", "au"),
    "nm": ("nm",),
    "pm": ("pm",),
}
UNITS = st.tuples(st.sampled_from([*EV]), st.sampled_from([*ANGSTROM]))


@MANY
@given(UNITS, st.data())
def test_units_are_obeyed_or_refused(tmp_path_factory, units, data):
    """A file states its units, or flags do, or both; if both, they agree or the file is refused."""
    folder = tmp_path_factory.mktemp("a")
    asked = data.draw(st.tuples(st.sampled_from([None, *EV]), st.sampled_from([None, *ANGSTROM])))
    said = [data.draw(st.sampled_from(SPELLINGS[unit])) for unit in units]
    kind = data.draw(st.sampled_from(["xyz", "db", "npz"]))
    scale = EV[units[0]], ANGSTROM[units[1]]
    if kind == "xyz":
        path = write_xyz(folder / "a.xyz", more=f'energy_unit="{said[0]}" length_unit="{said[1]}"', units=scale)
    elif kind == "db":
        path = folder / "a.db"
        with ase.db.connect(path) as database:
            atoms = Atoms("OHH", POSITIONS / scale[1])
            database.write(atoms, data={"energy": ENERGY / scale[0], "forces": FORCES * scale[1] / scale[0]})
            per = f"{said[0]}/{said[1]}"
            database.metadata = {"_distance_unit": said[1], "_property_unit_dict": {"energy": said[0], "forces": per}}
    else:
        path, values = folder / "a.npz", {"z": np.array([8, 1, 1]), "E": np.array([ENERGY / scale[0]])}
        values |= {"R": POSITIONS[None] / scale[1], "F": FORCES[None] * scale[1] / scale[0]}
        np.savez(path, e_unit=np.array(said[0].encode()), r_unit=said[1], **values)
    options = ReadOptions(unit_energy=asked[0], unit_length=asked[1])
    if asked[0] in (None, units[0]) and asked[1] in (None, units[1]):
        assert_right(next(iter(read(path, options=options))))
    else:
        with pytest.raises(ValueError, match=rf"a\.{kind}: (frame 0: )?--unit-(energy|length): .* but the file says"):
            next(iter(read(path, options=options)))


@pytest.mark.parametrize("unit", EV)
@pytest.mark.parametrize("length", ANGSTROM)
def test_units_of_a_file_that_states_none(tmp_path, unit, length):
    path = write_xyz(tmp_path / "a.xyz", units=(EV[unit], ANGSTROM[length]))
    assert_right(first(path, unit_energy=unit, unit_length=length))


def test_unknown_units_are_refused(tmp_path):
    for more, message in (("e_unit=furlong", "expected a unit of energy, one of eV"), ("e_unit=MeV", "got 'MeV'")):
        with pytest.raises(ValueError, match=rf"a\.xyz: frame 0: .*{message}"):
            first(write_xyz(tmp_path / "a.xyz", more=more))
    assert_right(first(write_xyz(tmp_path / "a.xyz", more="e_unit=unknown")))
    with pytest.raises(ValueError, match="unit_energy: expected a unit of energy"):
        ReadOptions(unit_energy="furlong")


def test_an_energy_that_cannot_be_in_ev_is_said(tmp_path, capsys):
    """Water has -76.4 hartree: in kcal/mol the number is too low for eV, in eV it is not."""
    for energy, said in ((-47_900.0, True), (-2079.0, False), (-12.0, False)):
        (tmp_path / "a.xyz").write_text(f"3\nenergy={energy}\nO 0 0 0\nH 0 0 1\nH 0 1 0\n")
        assert first(tmp_path / "a.xyz").energy == energy
        assert ("is too low for eV" in capsys.readouterr().err) == said


def test_two_calculations_in_one_file(tmp_path):
    path = write_xyz(tmp_path / "a.xyz", forces="REF_forces", more="REF_energy=-7")
    with pytest.raises(ValueError, match="both energy and REF_energy are there, with REF_forces: say --energy-key"):
        first(path)
    assert first(path, energy_key="REF_energy").energy == -7


def test_frames_of_differing_arrays(tmp_path):
    """The frame is named in which labels would be lost, and the table counts each array."""
    good, bad = write_xyz(tmp_path / "g.xyz"), write_xyz(tmp_path / "b.xyz", forces="force", frames=1)
    (tmp_path / "a.xyz").write_text(good.read_text() + bad.read_text())
    with pytest.raises(ValueError, match=r"a\.xyz: frame 2: no forces are read, but there is force \[n, 3\]"):
        list(read(tmp_path / "a.xyz", format="ase"))
    plain = write_xyz(tmp_path / "p.xyz", forces="", more="gap=1.5 name=x", frames=1)
    (tmp_path / "a.xyz").write_text(good.read_text() + plain.read_text())
    (folder,) = convert(tmp_path / "a.xyz", tmp_path / "set", split="train")
    table = [(row.array, row.per, row.label, row.structures) for row in open_store(folder).info.labels]
    assert table == [
        ("energy", "structure", "energy", 3),
        ("gap", "structure", "target gap", 1),
        ("forces [n, 3]", "atom", "forces", 2),
        ("name", "structure", "not read", 1),
    ]


def test_calculators_results_can_be_targets(tmp_path):
    atoms = Atoms("OHH", POSITIONS)
    atoms.calc = SinglePointCalculator(atoms, energy=ENERGY, forces=FORCES, free_energy=-99.0, magmom=2.0)
    for name in ("a.traj", "a.extxyz", "a.db"):
        ase.io.write(tmp_path / name, atoms)
        s = first(tmp_path / name, targets={"magmom": "moment", "free_energy": "free_energy"})
        assert_right(s)
        assert s.targets == {"moment": 2.0, "free_energy": -99.0}
        assert first(tmp_path / name).targets == {}


def test_options_that_a_format_does_not_take(tmp_path):
    part = Part(name="all", count=1, split="train")
    made = Format(parts=lambda _: [part], read=lambda *_: iter(()))
    for options, flag in (({"forces_key": "F"}, "--forces-key"), ({"targets": {"a": "b"}}, "--target")):
        message = f"{flag}: the format .* has labels and units of its own; those that take it are rmd17, md22, ase"
        with pytest.raises(ValueError, match=message):
            read(tmp_path, format="spice", options=ReadOptions(**options))
        with pytest.raises(ValueError, match=message):
            convert("x", tmp_path / "a", format=made, options=ReadOptions(**options))
    for options, message in (
        ({"tags": "yes"}, "tags: expected oc20, none or infer, got 'yes'"),
        ({"on_error": "ignore"}, 'on_error: expected "raise" or "skip"'),
        ({"targets": {"a": "x", "b": "x"}}, "targets: expected a name of its own"),
        ({"targets": {"a": "energy"}}, "targets: expected a name of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            ReadOptions(**options)


def test_other_options_make_another_conversion(tmp_path):
    path = write_xyz(tmp_path / "a.xyz")
    convert(path, tmp_path / "set", split="train")
    with pytest.raises(ValueError, match="dest holds another conversion"):
        convert(path, tmp_path / "set", split="train", options=ReadOptions(unit_energy="hartree"))


def table_of(source, dest, name):
    """Convert a source and return what became of each of its arrays."""
    (folder, *_) = convert(source, dest, format=name, split="train")
    return {row.array: (row.per, row.label) for row in open_store(folder).info.labels}


def test_every_array_of_an_hdf5_file_is_in_the_table(tmp_path):
    source = shared_file("data/ani1x/ani1x_subset.h5")
    found = table_of(source, tmp_path / "ani", "ani1x")
    with h5py.File(source) as file:
        names = {name for group in file.values() for name in group}
    assert found.keys() == names - {"atomic_numbers", "coordinates"}
    assert found.pop("wb97x_dz.energy") == ("structure", "energy")
    assert found.pop("wb97x_dz.forces") == ("atom", "forces")
    assert {label for _, label in found.values()} <= {"not read"}


def test_every_field_of_an_oc_record_is_in_the_table(tmp_path):
    more = {"distances": torch.ones(7), "charges": torch.ones(5)}
    source = write_lmdb(tmp_path / "data.0000.lmdb", [oc_record(k, **more) for k in range(3)])
    assert table_of(source, tmp_path / "oc", "oc20") == {
        "y": ("structure", "energy"),
        "force": ("atom", "forces"),
        "tags": ("atom", "tags"),
        "fixed": ("atom", "fixed"),
        "distances": ("structure", "not read"),
        "charges": ("atom", "not read"),
    }


def test_every_label_of_qm9_and_qmof_is_in_the_table(tmp_path):
    found = table_of(shared_file("data/qm9"), tmp_path / "qm9", "qm9")
    assert found["Mulliken charges"] == ("atom", "not read")
    assert found["line 2"] == ("structure", "energy and 19 targets")
    folder = tmp_path / "frameworks"
    folder.mkdir()
    labels = json.loads((write_qmof_json(folder) / "qmof.json").read_text())
    for record in labels:
        record["outputs"]["hse06"] = {"bandgap": 2.0}
    (folder / "qmof.json").write_text(json.dumps(labels))
    assert table_of(folder, tmp_path / "qmof", "qmof") == {
        "outputs.pbe.bandgap": ("structure", "target bandgap"),
        "outputs.hse06.bandgap": ("structure", "not read"),
    }


def test_a_format_of_ones_own_passes_the_same_checks(tmp_path):
    """Two atoms at one place, from a reader that checks nothing."""
    same = Structure(numbers=[6, 6], positions=np.zeros((2, 3)), energy=0.0, id="twin")
    own = Format(parts=lambda _: [Part(name="all", count=2)], read=lambda *_: iter([same, same]))
    with pytest.raises(ValueError, match=r"own: all, structure 0 \(twin\): positions: atoms 0 and 1"):
        convert(tmp_path / "own", tmp_path / "store", format=own, split="train")
