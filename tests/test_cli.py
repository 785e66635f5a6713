"""Every verb of `ejmp`, started the way a user does, with the smallest work it can be given."""

import argparse
import dataclasses
import json
import subprocess
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase.build import molecule
from support.inputs import environment
from support.track_cases import give_extension, record

import ejmp
from ejmp import cli
from ejmp.data import Structure, open_store
from ejmp.data.store.conversion import convert
from ejmp.train import main as training_main
from ejmp.train.config import TrainConfig
from ejmp.train.demo import demo_config
from ejmp.train.flags import COMMANDS
from ejmp.train.recipes import pretraining_data
from ejmp.train.sources import from_stores, tasks_of, with_graph

ROOT = Path(__file__).parents[1]
RUN = ("--device", "cpu", "--steps", "2", "--batch-size", "2", "--validate-every", "2", "--log-every", "1")
STARTED = set()
"""Verbs that a test of this file has run."""


def ejmp_command(*arguments, status=0):
    """Run `ejmp ARGUMENTS` in a process of its own that ends with a status, and return what it printed."""
    words = [str(argument) for argument in arguments]
    depth = {"config": 2, "data": 2, "bench": 3 if words[1:2] == ["history"] else 2 if words[1:2] == ["compare"] else 1}
    STARTED.add(" ".join(words[: depth.get(words[0], 1)]))
    variables = environment(DS_ACCELERATOR="cpu")
    done = subprocess.run(["ejmp", *words], capture_output=True, text=True, timeout=300, env=variables, check=False)  # noqa: S607
    assert done.returncode == status, done.stderr[-3000:]
    return done.stdout + done.stderr


def methanols(count, seed):
    """Shaken methanol molecules with random energies and forces."""
    random = np.random.default_rng(seed)
    for number in range(count):
        atoms = molecule("CH3OH")
        atoms.positions += random.normal(scale=0.05, size=(6, 3))
        yield Structure(
            numbers=atoms.numbers,
            positions=atoms.positions,
            energy=random.normal() - 2000,
            forces=random.normal(size=(6, 3)),
            id=f"{seed}-{number}",
        )


def write_xyz(path, structures):
    frames = []
    for structure in structures:
        atoms = ase.Atoms(structure.numbers, structure.positions)
        atoms.calc = ase.calculators.singlepoint.SinglePointCalculator(
            atoms, energy=structure.energy, forces=structure.forces
        )
        frames.append(atoms)
    ase.io.write(path, frames)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with methanol.xyz, record stores methanol/{train,val,test}, and a model of two blocks for them."""
    folder = tmp_path_factory.mktemp("verbs")
    for seed, (split, count) in enumerate({"train": 8, "val": 4, "test": 4}.items()):
        write_xyz(folder / f"{split}.xyz", methanols(count, seed))
        convert(folder / f"{split}.xyz", folder / "methanol", format="ase", split=split)
    write_xyz(folder / "methanol.xyz", methanols(1, 9))
    torch.manual_seed(0)
    sizes = {name: 8 for name in vars(demo_config()) if name.startswith("emb_size")}
    model = ejmp.JMP(dataclasses.replace(demo_config(blocks=2), num_tasks=1, num_radial=8, **sizes))
    (stores,) = from_stores(f"methanol={folder / 'methanol'}")
    model.tasks = tasks_of([with_graph(pretraining_data(stores, 0), cutoff=12.0, max_neighbors=30)])
    ejmp.save(model, folder / "model")
    return folder


@pytest.fixture
def data(folder):
    return f"methanol={folder / 'methanol'}"


def test_doctor():
    assert "reference" in ejmp_command("doctor")


def test_config_show():
    assert "small = true" in ejmp_command("config", "show", "bench", "--small")


def test_bench_and_report(folder, tmp_path):
    work = (
        "--structures",
        folder / "methanol.xyz",
        "--small",
        "--blocks",
        "1",
        "--precision",
        "fp32",
        "--device",
        "cpu",
    )
    result = tmp_path / "bench.json"
    printed = ejmp_command("bench", *work, "--seconds", "0", "--output", result)
    shown = ejmp_command("report", result, "--output", tmp_path / "again.png")
    assert "| precision | blocks |" in shown
    assert shown.splitlines()[0] in printed
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")


def test_bench_compare_and_history(tmp_path, monkeypatch):
    """This checkout against itself, without timing; a history of one record and its page."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    give_extension(ROOT)
    result, history = tmp_path / "track.json", ("--folder", tmp_path / "history")
    asked = ("bench", "compare", ROOT, ROOT, "--only", "pair/*", "--exact-only", "--output", result)
    assert "4 benchmarks are right; nothing was timed" in ejmp_command(*asked)
    assert json.loads(result.read_text())["status"] == 0
    line = tmp_path / "lines.jsonl"
    line.write_text(json.dumps(record().to_dict()) + "\n{\n")
    assert "1 records of" in ejmp_command("bench", "history", "add", line, *history)
    assert "pair/forward" in ejmp_command("bench", "history", "show", *history)
    assert "of which 1 have fewer than 6 records" in ejmp_command("bench", "history", "check", *history)
    ejmp_command("bench", "history", "report", *history, "--output", tmp_path / "page.html")
    assert "pair/forward" in (tmp_path / "page.html").read_text()


def test_bench_bisect(capsys):
    """There is nothing between a commit and itself; searches are tested in tests/track."""
    STARTED.add("bench bisect")
    assert cli.main(["bench", "bisect", "pair/forward", "HEAD", "HEAD"]) == 2
    assert "ejmp bench: HEAD..HEAD: expected commits in between, got none" in capsys.readouterr().err


def test_profile_and_report(folder, tmp_path, capsys):
    work = ("--structures", folder / "methanol.xyz", "--small", "--blocks", "1", "--device", "cpu", "--no-fvcore")
    result = tmp_path / "profile.json"
    printed = ejmp_command("profile", *work, "--rounds", "1", "--output", result, "--trace", tmp_path / "trace.json")
    assert '"ejmp::' in (tmp_path / "trace.json").read_text()
    assert cli.main(["report", str(result)]) == 0
    assert capsys.readouterr().out.strip() in printed
    assert cli.main(["report", str(result), "--output", "never.png"]) == 2
    assert "no picture of a profile" in capsys.readouterr().err


def test_data(folder, tmp_path):
    dest = tmp_path / "methanol"
    made = ("data", "convert", folder / "train.xyz", dest, "--format", "ase", "--split", "train", "--licence", "CC0")
    assert f"{dest / 'train'}: 8 structures" in ejmp_command(*made)
    assert "8 structures, 48 atoms" in ejmp_command("data", "info", dest / "train")
    assert "0 problems" in ejmp_command("data", "verify", dest / "train")
    assert "energy: mean" in ejmp_command("data", "stats", dest / "train")


def test_data_fetch(tmp_path):
    """A file that is there already, and has no published hash, is kept: no network is needed."""
    (tmp_path / "qmof.zip").write_bytes(b"here")
    assert str(tmp_path / "qmof.zip") in ejmp_command("data", "fetch", "qmof", tmp_path)


def test_prune(folder, data, tmp_path):
    assert "blocks 1" in ejmp_command("prune", folder / "model", tmp_path / "small", "--keep", "1")
    assert ejmp.load(tmp_path / "small").config.kept_blocks == (1,)
    assert "bits per parameter" in ejmp_command("quantize", tmp_path / "small", tmp_path / "bytes")
    asked = ("--edge-channels", "6", "--residuals", "concat=0", "--data", data, "--structures", "8")
    assert "6 channels of edges" in ejmp_command("prune", folder / "model", tmp_path / "narrow", *asked)


def test_pareto(folder, data, tmp_path):
    pytest.importorskip("deepspeed")
    sizes = ("--blocks", "2,1", "--channels", "8,6", "--steps", "0,2", "--precisions", "fp32,bf16", "--seconds", "0.1")
    asked = ("--data", data, "--run", tmp_path / "front", *sizes, "--within", "1000", "--picture", tmp_path / "f.png")
    assert "the fastest within 1000%" in ejmp_command("pareto", folder / "model", *asked)
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_export(folder, tmp_path):
    """As a bundle; packages take minutes to compile, and are made by tests/test_export.py with `make slow`."""
    assert "safetensors" in ejmp_command("export", folder / "model", tmp_path / "bundle")
    assert ejmp.load(tmp_path / "bundle").tasks == ejmp.load(folder / "model").tasks


def test_relevance_and_report(folder, data, tmp_path, capsys):
    assert "| removal |" in ejmp_command("search", folder / "model", "--data", data, "--structures", "2")
    result = tmp_path / "relevance.json"
    asked = ("relevance", folder / "model", "--data", data, "--structures", "2", "--labels")
    printed = ejmp_command(*asked, "--output", result)
    assert cli.main(["report", str(result), "--output", str(tmp_path / "picture.png")]) == 0
    table = "\n".join(line for line in printed.splitlines() if line.startswith("|"))
    assert "| methanol | energy |" in table
    assert table in capsys.readouterr().out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_report_refuses_other_files(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert cli.main(["report", str(tmp_path / "other.json")]) == 2
    assert "expected a result of bench, profile or relevance" in capsys.readouterr().err


def test_pretrain(data, tmp_path):
    pytest.importorskip("deepspeed")
    graphs = ("--cutoff", "5", "--max-neighbors", "12")
    printed = ejmp_command("pretrain", "--data", data, "--blocks", "1", *graphs, "--run", tmp_path / "run", *RUN)
    assert "| trained |" in printed
    model = ejmp.load(tmp_path / "run" / "final")
    assert model.config.blocks == 1
    assert model.task("methanol").graph == ejmp.GraphSettings(cutoff=5.0, max_neighbors=12, tags="none")


def test_distill(folder, data, tmp_path):
    pytest.importorskip("deepspeed")
    student = ("--teacher", folder / "model", "--blocks", "1", "--synthetic", "2", "--temperature", "50")
    printed = ejmp_command("distill", "--data", data, *student, "--run", tmp_path / "run", *RUN)
    assert "blocks 0: BR+KD" in printed
    student = ejmp.load(tmp_path / "run" / "final")
    assert student.config.kept_blocks == (0,)
    assert student.tasks == ejmp.load(folder / "model").tasks


def test_finetune(folder, data, tmp_path):
    pytest.importorskip("deepspeed")
    printed = ejmp_command("finetune", "--data", data, "--start", folder / "model", "--run", tmp_path / "run", *RUN)
    assert "after, on the test split" in printed
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert settings["validate_every"] == 2  # as RUN says
    assert (settings["warmup_steps"], settings["cosine_steps"]) == (20, 108)  # 5 of JMP's 32 epochs, and 27, of 4 steps
    assert "the run ends after 2 steps inside the warm-up" in printed
    model, start = ejmp.load(tmp_path / "run" / "final"), ejmp.load(folder / "model")
    assert not model.config.direct_forces
    assert model.task().forces == "gradient"
    assert model.task().graph == start.task().graph
    assert_calculator_errors(tmp_path / "run" / "final", folder, data, tmp_path / "errors.json")


def assert_calculator_errors(model, folder, data, output):
    """The calculator on a trained model has the errors that `ejmp evaluate` says it has."""
    ejmp_command("evaluate", model, "--data", data, "--device", "cpu", "--split", "test", "--output", output)
    errors = json.loads(output.read_text())[str(model)]["methanol"]
    calculator, energy, forces = ejmp.Calculator(model), [], []
    for labelled in ase.io.read(folder / "test.xyz", ":"):
        atoms = ase.Atoms(labelled.numbers, labelled.positions, calculator=calculator)
        energy.append(abs(atoms.get_potential_energy() - labelled.get_potential_energy()))
        forces.append(np.abs(atoms.get_forces() - labelled.get_forces()).mean())
    assert 1000 * np.mean(energy) == pytest.approx(errors["energy_meV"], rel=1e-4)
    assert 1000 * np.mean(forces) == pytest.approx(errors["forces_meV_per_A"], rel=1e-4)


def test_finetune_own_frames(folder, tmp_path):
    """One line makes of a file a model with its page: the frames are converted, divided, and trained on."""
    pytest.importorskip("deepspeed")
    frames, run = tmp_path / "my frames.xyz", tmp_path / "run"
    write_xyz(frames, methanols(12, 3))
    printed = ejmp_command("finetune", frames, "--start", folder / "model", "--run", run, *RUN)
    assert f"its page: {run / 'page.html'}" in printed
    stores = {split: open_store(run / "data" / split) for split in ("train", "val", "test")}
    assert {split: len(store) for split, store in stores.items()} == {"train": 10, "val": 1, "test": 1}
    assert len({store[i].id for store in stores.values() for i in range(len(store))}) == 12
    assert ejmp.load(run / "final").task("my_frames").graph == ejmp.load(folder / "model").task().graph
    page = (run / "page.html").read_text()
    assert '<th scope="col">after, on the test split</th>' in page
    assert str(run / "final") in page


def test_finetune_own_frames_is_told_of_their_labels(folder, tmp_path):
    """Forces of another name are refused without the flag; a wrong name is refused with those that are there."""
    labelled = ase.io.read(folder / "train.xyz", ":") + ase.io.read(folder / "val.xyz", ":")
    frames = [atoms.copy() for atoms in labelled]
    for atoms in frames:
        atoms.info["energy"], atoms.arrays["dft_force"] = -2000.0, np.arange(18.0).reshape(6, 3)
    ase.io.write(tmp_path / "own.xyz", frames)
    asked = ("finetune", tmp_path / "own.xyz", "--start", folder / "model", "--run", tmp_path / "run", *RUN)
    assert "say --forces-key dft_force" in ejmp_command(*asked, status=2)
    assert "no 'dft_energy'; there is" in ejmp_command(*asked, "--energy-key", "dft_energy", status=2)
    printed = ejmp_command(*asked, "--forces-key", "dft_force", "--unit-energy", "kcal/mol", "--steps", "1")
    assert "the model:" in printed
    first = open_store(tmp_path / "run" / "data" / "train")[0]
    assert first.energy == pytest.approx(-2000 * 0.0433641, rel=1e-5)
    np.testing.assert_allclose(first.forces, 0.0433641 * np.arange(18.0).reshape(6, 3), rtol=1e-5)
    assert "are for a file or folder of your own" in ejmp_command("finetune", "--forces-key", "f", status=2)


def test_a_target_of_ones_own_is_known_to_every_verb_after(folder, tmp_path):
    """What `finetune --target gap` trained, `evaluate` and `relevance` (on its branch "energy") take from the task."""
    labelled = ase.io.read(folder / "train.xyz", ":") + ase.io.read(folder / "val.xyz", ":")
    frames = [ase.Atoms(atoms.numbers, atoms.positions) for atoms in labelled]
    for number, atoms in enumerate(frames):
        atoms.info["gap"] = 2.0 + 0.25 * number
    ase.io.write(tmp_path / "own.xyz", frames)
    run, output = tmp_path / "run", tmp_path / "errors.json"
    asked = ("--target", "gap", "--start", folder / "model", "--run", run, *RUN)
    assert "gap" in ejmp_command("finetune", tmp_path / "own.xyz", *asked)
    model, stores = ejmp.load(run / "final"), f"own={run / 'data'}"
    ejmp_command("evaluate", run / "final", "--data", stores, "--split", "train", "--output", output)
    truth = list(open_store(run / "data" / "train"))
    found = ejmp.Predictor(run / "final")([ase.Atoms(s.numbers, s.positions) for s in truth])
    error = np.mean([abs(one.energy - s.targets["gap"]) for one, s in zip(found, truth, strict=True)])
    (errors,) = json.loads(output.read_text())[str(run / "final")].values()
    assert errors == {"gap": pytest.approx(error, rel=1e-4)}
    assert model.task().target == "gap"
    asked = ("--data", stores, "--labels", "--structures", "2")
    assert "| own | energy |" in ejmp_command("relevance", run / "final", *asked)


def test_evaluate(folder, data, tmp_path):
    """A pruned model that keeps all blocks has the errors of the model it was made from, in the same units."""
    model, pruned, output = folder / "model", tmp_path / "pruned", tmp_path / "errors.json"
    ejmp.save(ejmp.prune(ejmp.load(model), blocks=2), pruned)
    asked = ("--data", data, "--device", "cpu", "--split", "test", "--output", output)
    printed = ejmp_command("evaluate", model, pruned, *asked)
    assert "| methanol energy_meV |" in printed
    errors = json.loads(output.read_text())
    assert set(errors[str(model)]["methanol"]) >= {"energy_meV", "forces_meV_per_A"}
    assert errors[str(pruned)] == errors[str(model)]


def test_predict(folder, tmp_path):
    asked = ("predict", folder / "val.xyz", folder / "test.xyz", "--model", folder / "model", "--device", "cpu")
    assert "8 structures" in ejmp_command(*asked, "-o", tmp_path / "results.extxyz")
    assert len(ase.io.read(tmp_path / "results.extxyz", ":")) == 8


def test_relax(folder, tmp_path):
    asked = ("relax", folder / "methanol.xyz", "--model", folder / "model", "--fmax", "1e3", "--device", "cpu")
    assert "relaxed" in ejmp_command(*asked, "-o", tmp_path / "relaxed.extxyz")
    assert len(ase.io.read(tmp_path / "relaxed.extxyz")) == 6


def test_md(folder, tmp_path):
    asked = ("md", folder / "methanol.xyz", "--model", folder / "model", "--steps", "2", "--every", "1")
    assert "total energy drifts by" in ejmp_command(*asked, "--device", "cpu", "-o", tmp_path / "moved.traj")
    assert len(ase.io.read(tmp_path / "moved.traj", ":")) == 3


def test_compare(folder, tmp_path):
    ejmp.save(ejmp.prune(ejmp.load(folder / "model"), blocks=1), tmp_path / "small")
    asked = ("compare", tmp_path / "small", folder / "model", folder / "val.xyz", "--device", "cpu")
    assert "| labels |" in ejmp_command(*asked, "-o", tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_reproduce(tmp_path):
    asked = ("--run", tmp_path / "study", "--dry-run", "--seeds", "2", "--distill-steps", "7")
    assert "| kd-2-seed1 | distill | 7 |" in ejmp_command("reproduce", "table1", *asked)
    assert not (tmp_path / "study").exists()


def verbs(parser):
    """Yield the verbs of a parser, and those below them with the words before."""
    for action in parser._subparsers._group_actions:
        for name, sub in action.choices.items():
            below = sub._subparsers._group_actions[0] if sub._subparsers else None
            if below is None or not below.required:
                yield name
            if below is not None:
                yield from (f"{name} {verb}" for verb in verbs(sub))


def test_no_verb_was_forgotten():
    """Runs last: what the tests above have started is all that the parser knows."""
    pytest.importorskip("deepspeed")
    known = set(verbs(cli.make_parser()))
    if {"doctor", "evaluate"} <= STARTED:  # not when a single test was asked for
        assert known == STARTED
    assert known >= {"bench", "data convert", "prune", "relevance", "finetune", "evaluate", "report", "doctor"}


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_are_those_of_the_launch_scripts(name, capsys):
    """`ejmp finetune` and launch/finetune.py take the same flags."""
    texts = []
    for start, arguments in ((cli.main, ([name, "--help"],)), (training_main.main, (name, ["--help"]))):
        with pytest.raises(SystemExit):
            start(*arguments)
        texts.append(capsys.readouterr().out.partition("options:")[2])
    assert "--device" in texts[0]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_requests_are_made_of_flags(name):
    parser = argparse.ArgumentParser()
    COMMANDS[name].add_flags(parser)
    words = {"distill": ["--blocks", "2"]}.get(name, [])
    request = COMMANDS[name].request(parser.parse_args(["--device", "cpu", *words]))
    assert request.device == "cpu"
    assert request.data is None
    if name != "evaluate":
        assert request.run.directory == Path("runs", name)
        assert isinstance(request.run.config, TrainConfig)
