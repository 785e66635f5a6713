"""The demo teacher: small enough to ship, as good as its recipe says, worth pruning, and made again by its command."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.few import few

import ejmp
from ejmp.data import DEMO_MIX, demo
from ejmp.data.store.durable import hash_file
from ejmp.train import make_teacher, presets
from ejmp.train.config import TrainConfig
from ejmp.train.demo import RECIPE, demo_config, demo_teacher
from ejmp.train.evaluate import evaluate
from ejmp.train.sources import demo_mix, with_tasks_of

pytest.importorskip("deepspeed")
MAX_BYTES = 2_000_000
FORCES = "forces_meV_per_A"


@pytest.fixture(scope="module")
def recipe():
    return json.loads((demo_teacher() / RECIPE).read_text())


@pytest.fixture(scope="module")
def errors(ranks):
    """Validation errors of the forces of the teacher, and of its first four blocks, by dataset."""
    teacher = ejmp.load(demo_teacher())
    sources = with_tasks_of(demo_teacher(), demo_mix(), teacher)
    found = {}
    for model in (teacher, ejmp.prune(teacher, blocks=4)):
        rows = evaluate(model, sources, ranks)
        found[model.config.blocks] = {name: row[FORCES] for name, row in rows.items()}
    return found


def test_it_is_small_and_says_how_it_was_made(recipe):
    folder = demo_teacher()
    weights = load_file(folder / "model.safetensors")
    assert sum(file.stat().st_size for file in folder.iterdir()) <= MAX_BYTES
    assert {value.dtype for value in weights.values() if value.numel() > 1} == {torch.float16}
    assert recipe["hash"] == hash_file(folder / "model.safetensors")
    assert TrainConfig.from_dict(recipe["settings"]) == presets.teacher()
    assert recipe["machine"]["commit"]
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert events[-1]["step"] == recipe["settings"]["steps"]
    model = ejmp.load(folder)
    assert model.dtype == torch.float32
    assert dataclasses.replace(model.config, num_tasks=4) == dataclasses.replace(demo_config(), num_tasks=4)
    assert [task.name for task in model.tasks] == list(DEMO_MIX)


def test_its_errors_are_those_it_says(errors, recipe):
    for name, value in errors[6].items():
        assert value == pytest.approx(recipe["validation"][name][FORCES], rel=1e-3)


def test_it_has_learnt_and_blocks_matter(errors):
    for name in DEMO_MIX:
        free = [item.forces if item.fixed is None else item.forces[~item.fixed] for item in demo(name, "val")]
        zero = 1000 * np.abs(np.concatenate(free)).mean()
        assert errors[6][name] < 0.5 * zero
        assert errors[4][name] > (1.15 if name.startswith("oc") else 1.7) * errors[6][name]


def test_it_is_made_again_by_its_command(tmp_path, ranks, monkeypatch):
    """The same steps give the same bytes twice; the recipe has their hash."""
    monkeypatch.setattr(make_teacher, "demo_mix", lambda: few(demo_mix()))
    monkeypatch.setattr(make_teacher, "demo_config", lambda: demo_config(blocks=2))  # a third of the time
    config = dataclasses.replace(
        presets.teacher(), steps=4, validate_every=2, checkpoint_every=2, batch_size=4, zero_stage=0
    )
    hashes = set()
    for name in ("one", "two"):
        errors = make_teacher.make_teacher(tmp_path / name, config, ranks)
        recipe = json.loads((tmp_path / name / "teacher" / RECIPE).read_text())
        assert recipe["validation"] == errors
        assert recipe["settings"]["steps"] == 4
        hashes.add(recipe["hash"])
        assert demo_teacher(tmp_path / name / "teacher")
    assert len(hashes) == 1


def test_the_command_explains_itself():
    command = [sys.executable, "-m", "ejmp.train.make_teacher", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--steps" in done.stdout
    assert "Make the demo teacher again" in done.stdout
