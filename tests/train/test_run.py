"""Whole runs on a few demo structures: training, resuming, stopping, distilling, and the commands of launch/."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.few import few
from support.launching import environment

import ejmp
from ejmp.catalog import CATALOG
from ejmp.compress.config import DistillConfig
from ejmp.data import InOrder, Loader, make_batch
from ejmp.data.store.durable import hash_file
from ejmp.lock import locked
from ejmp.model.checkpoint import load, save
from ejmp.train import faults
from ejmp.train import main as launch
from ejmp.train.commands import fastest_precision
from ejmp.train.config import TrainConfig
from ejmp.train.demo import demo_config, demo_teacher
from ejmp.train.evaluate import evaluate, score, table
from ejmp.train.loop import FINAL, LOCK, Run, train
from ejmp.train.objective import Distillation, Supervised, freeze_blocks, predict
from ejmp.train.sources import TaskData, at_most, demo_downstream, demo_mix, tasks_of, with_graph, with_tasks_of
from ejmp.train.start import for_finetuning, new_model
from ejmp.train.task import Tasks, pretrain_tasks

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[2]
SMALL = dataclasses.replace(
    demo_config(blocks=3),
    emb_size_atom=16, emb_size_edge=16, emb_size_trip_in=8, emb_size_trip_out=8, emb_size_quad_in=4,
    emb_size_quad_out=4, emb_size_pair_in=4, emb_size_pair_out=4, emb_size_rbf=4, emb_size_cbf=4, emb_size_sbf=4,
    num_radial=16,
)  # fmt: skip
SHORT = ejmp.GraphSettings(cutoff=6.0, max_neighbors=12)
CONFIG = TrainConfig(
    steps=6, batch_size=4, lr=3e-3, warmup_steps=2, validate_every=3, checkpoint_every=2, log_every=1, zero_stage=0
)


@pytest.fixture(scope="module")
def sources():
    return few(demo_mix())


@pytest.fixture(scope="module")
def teacher(sources):
    return new_model(SMALL, sources, seed=3)


def run_of(folder, ranks, sources, model, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    folder.mkdir(exist_ok=True)
    objective = Supervised(model, tasks_of(sources))
    return Run(objective=objective, sources=sources, config=config, directory=folder, ranks=ranks)


def lines(folder, event):
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in found if line["event"] == event]


def test_stopped_and_resumed_is_bit_identical(tmp_path, ranks, sources, teacher, monkeypatch):
    whole = train(run_of(tmp_path / "whole", ranks, sources, ejmp.prune(teacher, blocks=2)))
    assert whole.finished
    assert whole.step == 6
    assert score(whole.after) < score(whole.before)

    forward = Supervised.forward
    calls = []

    def interrupted(self, batch):
        calls.append(batch.position)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch)

    monkeypatch.setattr(Supervised, "forward", interrupted)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    first = train(run_of(tmp_path / "parts", ranks, sources, ejmp.prune(teacher, blocks=2)))
    assert not first.finished
    assert first.step == 3
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    second = train(run_of(tmp_path / "parts", ranks, sources, ejmp.prune(teacher, blocks=2)), resume=True)
    assert second.finished
    assert calls == [4, 8, 12, 16, 20, 24]  # no sample lost or repeated
    assert second.after == whole.after
    paths = [folder / FINAL / "model.safetensors" for folder in (tmp_path / "whole", tmp_path / "parts")]
    assert hash_file(paths[0]) == hash_file(paths[1])
    newest = [max((tmp_path / name / "checkpoints").glob("step-*")) for name in ("whole", "parts")]
    for file in ("model", "optimizer", "ema"):
        assert (newest[0] / f"{file}.safetensors").read_bytes() == (newest[1] / f"{file}.safetensors").read_bytes()


def test_what_a_run_leaves(tmp_path, ranks, sources, teacher):
    folder = tmp_path / "run"
    run = run_of(folder, ranks, sources, ejmp.prune(teacher, blocks=1), keep_checkpoints=1)
    result = train(run)
    assert json.loads((folder / "run.json").read_text())["config"] == json.loads(json.dumps(run.config.to_dict()))
    assert json.loads((folder / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 0
    assert [line["step"] for line in lines(folder, "train")] == [1, 2, 3, 4, 5, 6]
    assert lines(folder, "train")[0]["lr"] == pytest.approx(0.2 * 3e-3)
    assert [line["step"] for line in lines(folder, "validation")] == [0, 3, 6]
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-00000006"]
    model = load(folder / FINAL)
    assert model.config.kept_blocks == (0,)
    assert evaluate(model, sources, ranks) == result.after
    assert model.tasks == tuple(tasks_of(sources))
    with pytest.raises(ValueError, match="holds a run already"):
        train(run)
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        train(dataclasses.replace(run, directory=tmp_path / "other"), resume=True)


def test_early_stop(tmp_path, ranks, sources, teacher):
    run = run_of(
        tmp_path / "run", ranks, sources, ejmp.prune(teacher, blocks=1), early_stop=1, validate_every=1, lr=0.5
    )
    result = train(run)
    assert result.finished
    assert result.step < 6


def test_training_time_and_epochs(tmp_path, ranks, sources, teacher, monkeypatch):
    """A run ends when its time is up, validated and saved; more time lets it go on, without the seconds it has had."""
    now = itertools.count(0, 10)
    monkeypatch.setattr("ejmp.train.loop.time.perf_counter", lambda: float(next(now)))
    changes = {"epochs": 2, "max_seconds": 30.0, "val_structures": 3, "early_stop": None}
    run = run_of(tmp_path / "run", ranks, sources, ejmp.prune(teacher, blocks=1), **changes)
    result = train(run)
    assert result.finished
    assert 1 <= result.step < 6
    steps = json.loads((tmp_path / "run" / "run.json").read_text())["config"]["steps"]
    assert steps == 2 * 8  # 4 datasets of 8 structures in steps of 4
    chosen = [at_most(source, "val", 3, seed=0) for source in sources]
    assert evaluate(load(tmp_path / "run" / FINAL), chosen, ranks) == result.after
    again = train(run_of(tmp_path / "run", ranks, sources, ejmp.prune(teacher, blocks=1), **changes), resume=True)
    assert again.step == result.step
    more = {**changes, "max_seconds": 60.0}
    later = train(run_of(tmp_path / "run", ranks, sources, ejmp.prune(teacher, blocks=1), **more), resume=True)
    assert result.step < later.step <= 2 * result.step + 1


def test_going_on_otherwise(tmp_path, ranks, sources, teacher):
    """Other settings, data or code are named; --force takes them, and what changes no number needs no force."""
    run = run_of(tmp_path / "run", ranks, sources, ejmp.prune(teacher, blocks=1), epochs=None)
    train(run)
    noted = (tmp_path / "run" / "run.json").read_text()
    longer = dataclasses.replace(run, config=dataclasses.replace(run.config, steps=8, log_every=2))
    for changed, problem in (
        (longer, "steps is 6 there and 8 here. --force"),
        (dataclasses.replace(run, sources=sources[::-1]), "datasets is .* there and .* here"),
        (dataclasses.replace(run, sources=[few(sources[:1], 4)[0], *sources[1:]]), "structures is .* 8"),
    ):
        with pytest.raises(ValueError, match=f"was begun otherwise: {problem}"):
            train(changed, resume=True)
    assert (tmp_path / "run" / "run.json").read_text() == noted
    (tmp_path / "run" / "run.json").write_text(noted.replace(json.loads(noted)["machine"]["commit"], "abc1234"))
    with pytest.raises(ValueError, match="was begun otherwise: commit is abc1234 there and "):
        train(run, resume=True)
    assert train(dataclasses.replace(longer, force=True), resume=True).step == 8
    assert train(dataclasses.replace(longer, config=dataclasses.replace(longer.config, log_every=1)), resume=True)


def test_two_trainings_in_one_folder(tmp_path, ranks, sources, teacher):
    run = run_of(tmp_path / "run", ranks, sources, ejmp.prune(teacher, blocks=1))
    with locked(tmp_path / "run" / LOCK, wait=False), pytest.raises(ValueError, match="another process trains in"):
        train(run)
    assert train(run).finished


def test_evaluation_by_hand(ranks, sources, teacher):
    """Errors are those of predictions for one structure at a time, in eV and eV/A, of free atoms only."""
    slabs = sources[0]
    errors = evaluate(teacher, [slabs], ranks, batch_size=3)["oc20"]
    energy, forces = [], []
    for i in range(8):
        structure = slabs.split("val")[i]
        with torch.no_grad():
            out = teacher(ejmp.build_graph(structure, settings=slabs.task.graph))
        task = slabs.task
        reference = sum(task.linear_reference[z] for z in structure.numbers.tolist())
        energy.append(abs(float(out.energy[0, 0]) * task.std + task.mean + reference - structure.energy))
        free = ~structure.fixed
        forces.append(np.abs(out.forces[:, 0].numpy() * task.force_std - structure.forces)[free])
    assert errors["energy_meV"] == pytest.approx(1000 * np.mean(energy), rel=1e-5)
    assert errors["forces_meV_per_A"] == pytest.approx(1000 * np.concatenate(forces).mean(), rel=1e-5)
    assert "| oc20 forces_meV_per_A |" in table({"model": {"oc20": errors}})


def test_gradient_forces_follow_the_energy(teacher):
    (source,) = few([demo_downstream("rmd17")])
    model = for_finetuning(teacher).double()
    tasks = tasks_of([source])
    uncut = dataclasses.replace(source.task.graph, max_neighbors=100)

    def energy_at(structure):
        batch = make_batch([structure], [0], settings=uncut, dtype=torch.float64)
        energy, forces = predict(model, batch, tasks)
        return tasks.energy(energy[:, 0], batch).item(), tasks.forces(forces, batch)

    structure = source.split("train")[0]
    _, forces = energy_at(structure)
    moved = []
    for sign in (1, -1):
        positions = structure.positions.copy()
        positions[4, 1] += sign * 1e-4
        moved.append(energy_at(dataclasses.replace(structure, positions=positions))[0])
    assert float(forces[4, 1]) == pytest.approx(-(moved[0] - moved[1]) / 2e-4, rel=1e-3)
    for name, value in model.state_dict().items():
        if not name.startswith("output."):
            assert torch.equal(value.float(), teacher.state_dict()[name])


def test_distillation_learns_from_the_teacher_alone(tmp_path, ranks, sources, teacher):
    student = ejmp.prune(teacher, blocks=2)
    frozen = {name: value.clone() for name, value in teacher.state_dict().items()}
    objective = Distillation(student, teacher, tasks_of(sources), DistillConfig())
    config = dataclasses.replace(CONFIG, steps=30, lr=3e-3, validate_every=30, checkpoint_every=30)
    train(Run(objective=objective, sources=sources, config=config, directory=tmp_path, ranks=ranks))
    losses = [line["loss"] for line in lines(tmp_path, "train")]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert {"kd_forces", "kd_node", "kd_edge"} <= set(lines(tmp_path, "train")[0])
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_frozen_blocks_are_run_once(tmp_path, ranks, sources, teacher):
    student = ejmp.prune(teacher, blocks=2)
    tasks = tasks_of(sources)
    assert Distillation(student, teacher, tasks, DistillConfig()).shared is None
    freeze_blocks(student)
    objective = Distillation(student, teacher, tasks, DistillConfig())
    assert objective.shared == [0, 1, 2]
    batch = first_batch(sources)
    losses, gradients = [], []
    for shared in (objective.shared, None):
        objective.shared = shared
        student.zero_grad()
        loss = objective(batch).total
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)
    objective = Distillation(student, teacher, tasks, DistillConfig())
    config = dataclasses.replace(CONFIG, steps=3)
    train(Run(objective=objective, sources=sources, config=config, directory=tmp_path, ranks=ranks))
    changed = {n for n, value in student.state_dict().items() if not torch.equal(value, teacher.state_dict()[n])}
    assert {name.split(".")[0 if name.startswith("output") else 1] for name in changed} == {
        "output", "out_mlp_E", "out_mlp_F",
    }  # fmt: skip
    assert (
        Distillation(ejmp.prune(teacher, keep=(0, 2)).requires_grad_(False), teacher, tasks, DistillConfig()).shared
        is None
    )


def first_batch(sources):
    datasets = [source.split("train") for source in sources]
    sampler = InOrder(sizes=[len(dataset) for dataset in datasets], batch_size=8)
    return next(Loader(datasets=datasets, sampler=sampler, settings=SHORT).batches())


def test_edge_dropout(sources, teacher):
    batch = first_batch(sources)
    tasks = Tasks([dataclasses.replace(task, graph=SHORT) for task in tasks_of(sources)])
    totals = [
        Supervised(ejmp.prune(teacher, blocks=3), tasks, edge_dropout=share)(batch).total.item() for share in (0, 0.3)
    ]
    assert totals[0] != totals[1]
    assert all(np.isfinite(totals))


def test_tasks_of_a_saved_model(tmp_path, sources, teacher):
    model = ejmp.prune(teacher, blocks=3)
    model.tasks = [dataclasses.replace(s.task, mean=7.0, graph=SHORT) for s in sources]
    save(model, tmp_path / "model")
    found = with_tasks_of(tmp_path / "model", sources, load(tmp_path / "model"))
    assert [source.task for source in found] == list(model.tasks)
    with pytest.raises(ValueError, match="no head for rmd17, only for oc20, oc22"):
        with_tasks_of(tmp_path / "model", [demo_downstream("rmd17")], model)
    model.tasks = pretrain_tasks()
    published = with_tasks_of(tmp_path, sources, model)
    assert published[1].task.std == 25.229595396538468
    assert published[1].task.linear_reference == sources[1].task.linear_reference
    model.tasks = ()
    save(model, tmp_path / "model", overwrite=True)
    with pytest.raises(ValueError, match="does not say what its heads predict"):
        with_tasks_of(tmp_path / "model", sources, load(tmp_path / "model"))
    (tmp_path / "model" / "tasks.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"tasks.json: not a list of tasks"):
        load(tmp_path / "model")


def test_graphs_of_training(sources, teacher):
    """They are the start model's, or the catalogue's of the name, or given; never guessed."""
    qm9 = TaskData(splits={}, task=ejmp.Task(name="qm9"))
    mine = TaskData(splits={}, task=ejmp.Task(name="mine"))
    demo, one = ejmp.GraphSettings(cutoff=5.0, max_neighbors=14), ejmp.prune(teacher, blocks=1)
    one.tasks = [dataclasses.replace(s.task, graph=demo) for s in sources]
    assert with_graph(mine, start=one).task.graph == with_graph(qm9, start=one).task.graph == demo
    assert with_graph(qm9).task.graph == CATALOG["qm9"].graph
    one.tasks = pretrain_tasks()  # graphs of two kinds
    assert with_graph(qm9, start=one, max_neighbors=20).task.graph == ejmp.GraphSettings(
        cutoff=CATALOG["qm9"].graph.cutoff, max_neighbors=20, tags="none"
    )
    given = with_graph(mine, start=one, cutoff=4.0, max_neighbors=9).task.graph
    assert given == ejmp.GraphSettings(cutoff=4.0, max_neighbors=9, tags="none")
    periodic, molecules = sources[0].splits, sources[2].splits  # oc20 and ani1x
    for splits, expected in ((periodic, CATALOG["oc20"].graph), (molecules, CATALOG["ani1x"].graph)):
        found = with_graph(TaskData(splits=splits, task=mine.task), start=one).task.graph
        assert found == dataclasses.replace(expected, tags="none")
    for start in (None, one):
        with pytest.raises(ValueError, match=r"graphs of mine is not known.*say --cutoff and --max-neighbors"):
            with_graph(mine, start=start, cutoff=4.0)


def test_damaged_teacher(tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(demo_teacher(), folder)
    assert demo_teacher(folder) == folder
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"x")
    with pytest.raises(ValueError, match="is damaged"):
        demo_teacher(folder)
    (folder / "recipe.json").unlink()
    with pytest.raises(ValueError, match="is not whole"):
        demo_teacher(folder)


@pytest.mark.parametrize("command", ["pretrain", "distill", "finetune", "evaluate"])
def test_help_is_quick(command):
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        script = [sys.executable, "-X", "importtime", ROOT / f"launch/{command}.py", "--help"]
        done = subprocess.run(script, capture_output=True, text=True, check=True, env=environment())
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2
    assert command in done.stdout
    assert "ejmp.train.flags" in done.stderr
    assert "torch" not in done.stderr


def test_precision_of_the_teacher(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert fastest_precision(cpu, "fp32") == "fp32"
    for capability, expected in (((7, 0), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, found=capability: found)
        assert fastest_precision(gpu, "fp32") == expected


def test_bad_flags(capsys, tmp_path, ranks, monkeypatch):
    monkeypatch.setattr(faults, "session", lambda _device: contextlib.nullcontext(ranks))
    assert launch.main("distill", ["--terms", "nodes=1", "--teacher", str(tmp_path), "--blocks", "2"]) == 2
    assert launch.main("evaluate", [str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        launch.main("distill", ["--stepz", "3"])
    assert launch.main("pretrain", ["--data", "oc20"]) == 2
    assert "data: expected NAME=FOLDER" in capsys.readouterr().err


def test_deepspeed_launcher_on_two_ranks(tmp_path, teacher):
    """README's deepspeed launch/distill.py --blocks 4, here with 2 of 3 blocks and few steps."""
    save(teacher, tmp_path / "teacher")
    command = [
        Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", "29611",
        ROOT / "launch/distill.py", "--teacher", tmp_path / "teacher", "--blocks", "2", "--run", tmp_path / "run",
        "--steps", "3", "--batch-size", "2", "--log-every", "1", "--validate-every", "3", "--zero-stage", "1",
        "--teacher-precision", "bf16",
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "blocks 0,1: BR+KD" in done.stdout
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == [1, 2, 3]
    assert load(tmp_path / "run" / FINAL).config.kept_blocks == (0, 1)
