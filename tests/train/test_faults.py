"""Mistakes of people and states of the machine are one line and exit status 2, never a trace."""

import dataclasses
import socket
import subprocess
import sys

import ase.build
import pytest
import torch
from support.inputs import ROOT
from support.launching import environment

from ejmp.data import Structure, make_batch
from ejmp.train import faults
from ejmp.train.loop import finish_save
from ejmp.train.objective import Supervised
from ejmp.train.task import Tasks, pretrain_tasks

FULL = "/dev/full"
"""A device of Linux on which every write fails as it does on a full disk."""


def command(*arguments, **more):
    """Start a training command of two steps as a person would, with variables of the environment."""
    line = [sys.executable, str(ROOT / "launch/finetune.py"), "--demo", "rmd17", "--steps", "2", *map(str, arguments)]
    return subprocess.run(line, env=environment(**more), capture_output=True, text=True, timeout=200, check=False)


def test_a_taken_port_is_named_with_the_flag_that_changes_it(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        found = command("--run", tmp_path / "run", MASTER_PORT=str(port), **place)
    assert found.returncode == 2, found.stderr
    assert f"port {port} is taken" in found.stderr
    assert "--master_port" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_disk_that_is_full_in_training(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").symlink_to(FULL)
    found = command("--run", run)
    assert found.returncode == 2, found.stderr
    assert "No space left on device" in found.stderr
    assert faults.KEPT in found.stderr
    assert "Traceback" not in found.stderr


def test_what_torch_says_of_a_full_disk_is_translated():
    with pytest.raises(RuntimeError) as found:
        torch.save(torch.zeros(1 << 20), FULL)
    assert "the disk is full" in str(faults.in_words(found.value))
    assert faults.in_words(RuntimeError("expected scalar type Float")) is None
    assert faults.in_words(ValueError()) is None


def test_the_structures_of_a_failed_step_are_named_with_their_dataset_and_the_likeliest_comes_first():
    """Of the graphs that can be built of two atoms nearly on one spot, losses may be infinite."""
    good, bad = (ase.build.molecule("CH3OH") for _ in range(2))
    bad.positions[1] = bad.positions[0] + [0.03, 0, 0.04]
    structures = [
        Structure(numbers=a.numbers, positions=a.positions, id=f"a.xyz:{k}") for k, a in enumerate([good, bad])
    ]
    tasks = Tasks(
        [dataclasses.replace(task, name=name) for task, name in zip(pretrain_tasks(), ("oxides", "mine"), strict=False)]
    )
    named = Supervised(torch.nn.Module(), tasks).suspects(make_batch(structures, [0, 1]))
    assert named == ("mine: a.xyz:1 (two atoms 0.05 A apart)", "oxides: a.xyz:0")


@pytest.mark.parametrize("new", [True, False])
def test_a_model_whose_save_was_killed_is_whole_again(tmp_path, new):
    """The old model is aside and the new one in its place, or not yet; the folder it was written to is left."""
    for name in ("final.old", *(["final"] if new else []), ".final.abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    finish_save(tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "config.json").read_text() == ("final" if new else "final.old")


SESSIONS = """
import os
from ejmp.train.faults import session
before = dict(os.environ)
for _ in range(2):
    with session("cpu"):
        assert os.environ["RANK"] == "0"
    assert dict(os.environ) == before
"""


def test_a_session_leaves_the_environment_as_it_was():
    """Or else what a process starts after it would take itself for one of its ranks."""
    subprocess.run([sys.executable, "-c", SESSIONS], cwd=ROOT, env=environment(), check=True)
