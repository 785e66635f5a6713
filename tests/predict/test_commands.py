"""`ejmp relax`, `md`, `predict` and `compare`: what they write, how an interrupted run goes on, what they refuse."""

import dataclasses
import json

import ase.io
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.collections import g2
from ase.constraints import FixAtoms

import ejmp
from ejmp import cli
from ejmp.predict import dynamics, files
from ejmp.predict.predictor import Predictor

UNCUT = ejmp.GraphSettings(cutoff=4.5, max_neighbors=100, tags="none")
TASK = ejmp.Task(name="case", head=1, mean=-3.0, std=0.05, force_std=0.07, forces="gradient", graph=UNCUT)


@pytest.fixture
def folder(tiny, tmp_path):
    """A folder with a model of two tasks' heads and one task, frames.extxyz (with labels), and crystal.extxyz."""
    model = tiny.on()
    model.tasks = [TASK]
    ejmp.save(model, tmp_path / "model")
    ejmp.save(ejmp.prune(model, blocks=1), tmp_path / "small")
    frames = []
    for number, name in enumerate(g2.names[:7]):
        atoms = g2[name]
        if number % 2:
            atoms.calc = SinglePointCalculator(atoms, energy=-5.0, forces=np.full((len(atoms), 3), 0.1))
        atoms.info["place"] = number
        frames.append(atoms)
    ase.io.write(tmp_path / "frames.extxyz", frames)
    crystal = bulk("NaCl", "rocksalt", a=5.6)
    crystal.rattle(0.1, seed=1)
    ase.io.write(tmp_path / "crystal.extxyz", crystal)
    return tmp_path


def run(*words):
    return cli.main([str(word) for word in words])


def test_relax(folder, capsys):
    output = folder / "relaxed.extxyz"
    words = ("relax", folder / "crystal.extxyz", "--model", folder / "model", "-o", output, "--device", "cpu")
    assert run(*words, "--cell", "--optimizer", "fire", "--steps", "4", "--fmax", "1e-9") == 1
    printed = capsys.readouterr().out
    assert "not relaxed after 4 steps" in printed
    before, after = ase.io.read(folder / "crystal.extxyz"), ase.io.read(output)
    energies = [float(line.split()[2]) for line in printed.splitlines() if line.startswith("step ")]
    assert len(energies) == 5
    assert after.get_potential_energy() == pytest.approx(energies[-1], abs=1e-5)
    assert energies[-1] < energies[0]
    assert after.get_volume() != pytest.approx(before.get_volume(), rel=1e-9)
    assert run(*words, "--fmax", "1e3", "--overwrite") == 0
    assert "relaxed" in capsys.readouterr().out
    assert np.allclose(ase.io.read(output).positions, before.positions)


@pytest.mark.parametrize(("ensemble", "ending"), [("nve", ".traj"), ("nvt", ".extxyz")])
def test_md(folder, ensemble, ending, capsys):
    output = folder / f"moved{ending}"
    words = ("md", folder / "frames.extxyz", "--model", folder / "model", "-o", output, "--ensemble", ensemble)
    assert run(*words, "--steps", "6", "--every", "3", "--timestep", "0.1", "--temperature", "50") == 0
    printed = capsys.readouterr().out
    frames = ase.io.read(output, index=":")
    assert len(frames) == 3
    totals = [float(line.split()[4]) for line in printed.splitlines() if " ps: " in line]
    assert np.allclose(totals, [atoms.get_total_energy() for atoms in frames], atol=1e-5)
    if ensemble == "nve":
        assert np.ptp(totals) < 1e-3
        drift = 1e3 * np.polyfit([0, 3e-4, 6e-4], totals, 1)[0] / len(frames[0])
        assert float(printed.split("drifts by ")[1].split()[0]) == pytest.approx(drift, abs=5)
    assert not np.allclose(frames[0].positions, frames[-1].positions)
    assert np.allclose(frames[0].get_momenta().sum(0), 0, atol=1e-6)


def test_velocities_have_the_temperature():
    atoms = bulk("Cu", cubic=True).repeat(6)
    dynamics._set_velocities(atoms, 400.0, np.random.default_rng(0))
    assert atoms.get_temperature() == pytest.approx(400.0, rel=0.05)
    atoms.set_constraint(FixAtoms([0, 1]))
    dynamics._set_velocities(atoms, 400.0, np.random.default_rng(0))
    assert not atoms.get_momenta()[:2].any()
    assert atoms.get_temperature() == pytest.approx(400.0, rel=0.05)


def predict_words(folder, *more):
    files_in = (folder / "frames.extxyz", folder / "crystal.extxyz")
    return ("predict", *files_in, "--model", folder / "model", "--stress", "-o", folder / "results.extxyz", *more)


def check_results(folder):
    inputs = [*ase.io.read(folder / "frames.extxyz", ":"), ase.io.read(folder / "crystal.extxyz")]
    found = ase.io.read(folder / "results.extxyz", ":")
    expected = Predictor(folder / "model", stress=True)(inputs)
    assert len(found) == len(inputs)
    for number, (atoms, start, prediction) in enumerate(zip(found, inputs, expected, strict=True)):
        assert atoms.get_potential_energy() == pytest.approx(prediction.energy, rel=1e-9)
        assert np.allclose(atoms.get_forces(), prediction.forces, atol=1e-7)
        assert np.allclose(atoms.positions, start.positions)
        assert atoms.info.get("place") == start.info.get("place")
        assert atoms.info["source"].endswith(f"frames.extxyz:{number}" if number < 7 else "crystal.extxyz:0")
        assert ("label_energy" in atoms.info) == ("label_forces" in atoms.arrays) == (number in {1, 3, 5})
    assert np.allclose(found[-1].get_stress(), expected[-1].stress, atol=1e-7)
    assert not list(folder.glob("results.extxyz.*"))


def test_predict(folder, capsys):
    assert run(*predict_words(folder, "--max-edges", "50")) == 0
    assert "8 structures" in capsys.readouterr().out
    check_results(folder)
    assert run(*predict_words(folder)) == 2
    assert "results.extxyz exists; --overwrite replaces it" in capsys.readouterr().err


@pytest.mark.parametrize("torn", [0, 1, 30])
def test_predict_goes_on(folder, torn, monkeypatch, capsys):
    """Interrupted after any frame, or within one (the last bytes are lost): nothing is lost, nothing comes twice."""
    append, written = files.ResumableFrames.append, []

    def interrupted(self, atoms):
        if len(written) == 4:
            raise KeyboardInterrupt
        append(self, atoms)
        written.append(atoms.info["source"])

    with monkeypatch.context() as patch:
        patch.setattr(files.ResumableFrames, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(*predict_words(folder))
    assert not (folder / "results.extxyz").exists()
    part = folder / "results.extxyz.part"
    part.write_bytes(part.read_bytes()[: -torn or None])

    def counted(self, atoms):
        written.append(atoms.info["source"])
        append(self, atoms)

    monkeypatch.setattr(files.ResumableFrames, "append", counted)
    assert run(*(word for word in predict_words(folder) if word != "--stress")) == 2
    assert "asked something else" in capsys.readouterr().err
    assert run(*predict_words(folder)) == 0
    assert len(written) == 8 + bool(torn)
    check_results(folder)


def test_two_runs_do_not_mix(folder, capsys):
    with files.ResumableFrames(folder / "results.extxyz", {}):
        assert run(*predict_words(folder)) == 2
    assert "another run is writing" in capsys.readouterr().err


def test_other_targets(tiny, folder):
    model = tiny.on()
    model.tasks = [ejmp.Task(name="qmof", target="gap", forces=None, unit="eV", graph=UNCUT)]
    ejmp.save(model, folder / "gaps")
    output = folder / "gaps.extxyz"
    assert run("predict", folder / "crystal.extxyz", "--model", folder / "gaps", "-o", output) == 0
    atoms = ase.io.read(output)
    (expected,) = Predictor(model)(ase.io.read(folder / "crystal.extxyz"))
    assert atoms.info["gap"] == pytest.approx(expected.energy, rel=1e-9)
    assert atoms.info["gap_unit"] == "eV"
    assert atoms.calc is None


def test_compare(folder, capsys):
    output = folder / "page.png"
    assert run("compare", folder / "small", folder / "model", folder / "frames.extxyz", "-o", output) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    rows = json.loads((folder / "page.json").read_text())["rows"]
    atoms = ase.io.read(folder / "frames.extxyz", ":")
    small, full = (Predictor(folder / name)(atoms) for name in ("small", "model"))
    error = [abs(a.energy - b.energy) for a, b in zip(small, full, strict=True)]
    assert rows[0]["energy_meV"] == pytest.approx(1e3 * np.mean(error), rel=1e-9)
    per_atom = np.array(error) / [len(a) for a in atoms]
    assert rows[0]["energy_meV_per_atom"] == pytest.approx(1e3 * np.mean(per_atom), rel=1e-9)
    labels = np.concatenate([small[i].forces for i in (1, 3, 5)]) - 0.1
    assert rows[1]["forces_meV_per_A"] == pytest.approx(1e3 * np.abs(labels).mean(), rel=1e-9)
    assert rows[2]["energy_meV"] == pytest.approx(1e3 * np.mean([abs(full[i].energy + 5) for i in (1, 3, 5)]), rel=1e-9)
    assert f"| {folder / 'small'} | labels |" in capsys.readouterr().out


def refused(capsys, text, *words):
    assert run(*words) == 2
    said = capsys.readouterr().err.strip()
    assert text in said
    assert "\n" not in said


def test_refusals(tiny, folder, capsys):
    frames, output = folder / "frames.extxyz", folder / "out.extxyz"
    more = ("--model", folder / "model", "-o", output)
    refused(capsys, "no such file", "relax", folder / "nothing.xyz", *more)
    (folder / "bad.xyz").write_text("3\n\nH 0 0\n")
    refused(capsys, "bad.xyz: ase.io cannot read it", "relax", folder / "bad.xyz", *more)
    refused(capsys, "--fmax: expected a positive number", "relax", frames, *more, "--fmax", "0")
    refused(capsys, "--cell: the structure is not periodic", "relax", frames, *more, "--cell")
    refused(capsys, "--timestep: expected a positive number", "md", frames, *more, "--timestep", "-1")
    refused(capsys, "is no folder", "md", frames, *more[:2], "-o", folder / "none" / "a.traj")
    refused(capsys, "ends in .traj", "md", frames, *more[:2], "-o", folder / "a.cif")
    refused(capsys, "max_edges: expected", "predict", frames, *more, "--max-edges", "0")
    refused(capsys, "task: expected one of case", "predict", frames, *more, "--task", "oc20")
    refused(capsys, "expected another model", "compare", folder / "model", folder / "model", frames, "-o", "a.png")
    wrong = molecule("H2O")
    wrong.positions[1] = wrong.positions[0]
    ase.io.write(folder / "wrong.extxyz", [molecule("H2O"), wrong])
    refused(capsys, "wrong.extxyz:1: structure 0: positions: atoms", "predict", folder / "wrong.extxyz", *more)
    unknown = ejmp.JMP(dataclasses.replace(tiny.config, blocks=1))
    ejmp.save(unknown, folder / "unknown")
    refused(capsys, "model.tasks", "predict", frames, "--model", folder / "unknown", "-o", folder / "other.extxyz")
