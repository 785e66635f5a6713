"""Checkpoints: a resumed run ends with the same bits, a damaged checkpoint is refused, any number of ranks goes on."""

import dataclasses
import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import train_script
from support.launching import launch, results

import ejmp
from ejmp.train import checkpoint, randomness

NAMES = [f"{stage}{noise}" for stage in (0, 1, 2) for noise in (False, True)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run 1 and 2 processes, resume both, then go on from the checkpoints of 1 process with 2 and with 1."""
    folder, seen = tmp_path_factory.mktemp("runs"), {}
    for what, world_size in [("saves", 1), ("saves", 2), ("resumes", 1), ("resumes", 2)]:
        out = tmp_path_factory.mktemp("out")
        seen[what, world_size] = results(launch(world_size, f"checkpoint_{what}", out, folder), out, world_size)
    shutil.copytree(folder, folder.with_name("before"))
    for world_size in (2, 1):
        out = tmp_path_factory.mktemp("out")
        seen["changes", world_size] = results(launch(world_size, "checkpoint_changes", out, folder), out, world_size)
    seen["folder"] = folder.with_name("before")
    return seen


@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_is_bit_identical(runs, world_size):
    pairs = zip(runs["saves", world_size], runs["resumes", world_size], strict=True)
    for rank, (whole, resumed) in enumerate(pairs):
        for name in NAMES:
            assert resumed[name][0] == whole[name][0], (rank, name)
            assert resumed[name][1] == whole[name][1]
        assert whole["1True"][0][3] == {"loss_scale": 1024.0, "good_steps": 9, "skipped": 5, "skipped_in_row": 0}
        assert whole["1True"][0][0] != whole["1False"][0][0]  # the noise is part of it
    assert runs["saves", 2][0]["1True"][0][2] != runs["saves", 2][1]["1True"][0][2]


def test_the_newest_and_the_best_are_kept(runs):
    for world_size in (1, 2):
        run = runs["folder"] / f"kept{world_size}"
        kept = ["best.json", "step-00000002", "step-00000004", "step-00000005"]
        assert runs["saves", world_size][0]["kept"] == kept
        assert checkpoint.best(run).name == "step-00000002"
        assert checkpoint.latest(run).name == "step-00000005"
        assert json.loads((run / "step-00000004" / "state.json").read_text())["state"] == {"again": "yes"}
        for path in checkpoint.steps(run):
            checkpoint.check_checkpoint(path)
    assert checkpoint.best(runs["folder"]) is None


def test_a_checkpoint_of_another_model_is_refused(runs):
    config = dataclasses.replace(train_script.small_jmp().config, num_tasks=2)
    other = SimpleNamespace(objective=SimpleNamespace(model=ejmp.JMP(config, backend="reference")))
    with pytest.raises(ValueError, match=r"expected a model with JMPConfig\(.*num_tasks=2.*, got JMPConfig\("):
        checkpoint.load(other, checkpoint.latest(runs["folder"] / "1False1"))


def test_ema_and_state_come_back(runs):
    path = checkpoint.latest(runs["folder"] / "2False2")
    weights = dict(ejmp.load(path, backend="reference").named_parameters())
    for result in runs["resumes", 2]:
        _, _, averages, state = result["2False"]
        assert state == {"position": 12}
        assert averages == train_script.as_lists(weights)  # rank 0's


def test_other_numbers_of_ranks_and_stages_go_on(runs):
    """Going on with 2 processes and then with 1, at another stage, gives the losses of 1 process throughout."""
    for stage in (0, 1, 2):
        (whole,) = runs["saves", 1]
        _, losses, weights = whole[f"{stage}False"]
        seen = [runs["changes", 2][0][str(stage)], runs["changes", 2][1][str(stage)], runs["changes", 1][0][str(stage)]]
        assert seen[0][0] == pytest.approx(losses[:3], rel=1e-5)
        assert seen[1] == seen[0]
        assert seen[2][0] == pytest.approx(losses[3:], rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(torch.tensor(seen[2][1][name]), torch.tensor(value), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_is_a_model(runs):
    path = checkpoint.latest(runs["folder"] / "2False2")
    model = ejmp.load(path, backend="reference")
    moments = load_file(path / "optimizer.safetensors")
    names = dict(model.named_parameters())
    assert set(moments) == {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in names}
    assert all(moments[name].shape == names[name.split(".", 1)[1]].shape for name in moments)
    state = json.loads((path / "state.json").read_text())
    assert (state["step"], state["optimizer_steps"], state["world_size"]) == (3, 3, 2)


def damage(path, how):
    file = path / ("manifest.json" if how == "manifest" else "optimizer.safetensors")
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "manifest":
        file.write_text(file.read_text()[:40])
    else:
        file.unlink()


@pytest.mark.parametrize("how", ["cut", "flip", "manifest", "missing"])
def test_damage_falls_back_to_an_older_one(runs, tmp_path, caplog, how):
    old = checkpoint.latest(runs["folder"] / "1False1")
    for step in (5, 7, 100_000_000):
        shutil.copytree(old, tmp_path / f"step-{step:08d}")
    (tmp_path / ".step-00000009.new").mkdir()
    (tmp_path / "step-9").mkdir()
    assert checkpoint.latest(tmp_path).name == "step-100000000"
    damage(tmp_path / "step-100000000", how)
    assert checkpoint.latest(tmp_path).name == "step-00000007"
    assert "step-100000000" in caplog.text
    damage(tmp_path / "step-00000007", how)
    shutil.rmtree(tmp_path / "step-00000005")
    with pytest.raises(ValueError, match="none of 2 checkpoints is whole"):
        checkpoint.latest(tmp_path)


def test_a_damaged_checkpoint_does_not_displace_a_whole_one(runs, tmp_path, monkeypatch):
    """Of 5 and 7, of which 7 is damaged, a run goes on from 5 and saves 9; then 9 is damaged, and 5 must be there."""
    monkeypatch.setattr(checkpoint, "load", lambda _engine, path: path)
    monkeypatch.setattr(checkpoint, "broadcast", lambda value: value)
    engine = SimpleNamespace(ranks=SimpleNamespace(rank=0))
    old = checkpoint.latest(runs["folder"] / "1False1")
    for step in (5, 7):
        shutil.copytree(old, tmp_path / f"step-{step:08d}")
    for _ in range(2):  # the second time what was set aside before is in the way
        damage(tmp_path / "step-00000007", "flip")
        assert checkpoint.resume(engine, tmp_path).name == "step-00000005"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000007.damaged"]
        shutil.copytree(old, tmp_path / "step-00000007")
    shutil.rmtree(tmp_path / "step-00000007")
    shutil.copytree(old, tmp_path / "step-00000009")
    checkpoint._remove_old(tmp_path, 9, keep=2)
    damage(tmp_path / "step-00000009", "missing")
    assert checkpoint.resume(engine, tmp_path).name == "step-00000005"


def test_nothing_to_resume_from_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "never"):
        with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
            checkpoint.latest(path)


def test_a_replacement_that_was_cut_off_is_undone(runs, tmp_path):
    old = checkpoint.latest(runs["folder"] / "1False1")
    shutil.copytree(old, tmp_path / ".step-00000003.replaced")
    (tmp_path / ".step-00000003.new").mkdir()
    assert checkpoint.latest(tmp_path).name == "step-00000003"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_random_state_goes_through_json():
    def draw():
        return [random.gauss(0, 1), np.random.normal(), torch.randn(3).tolist(), random.random(), np.random.random()]

    randomness.seed_all(1, 2)
    draw()
    state = json.loads(json.dumps(randomness.random_state()))
    expected = draw()
    randomness.seed_all(5)
    assert draw() != expected
    randomness.set_random_state(state)
    assert draw() == expected
