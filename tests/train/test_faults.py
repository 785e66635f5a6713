"""Mistakes of people and states of the machine are one line and exit status 2, never a trace."""

import dataclasses
import socket
import subprocess
import sys

import pytest
import torch
from support.inputs import ROOT, shared_file
from support.launching import environment

from ejmp.data import checking, convert, make_batch, open_store
from ejmp.train import faults
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


def test_the_structures_of_a_failed_step_are_named_with_their_dataset_and_the_likeliest_comes_first(tmp_path):
    """Case 19, let through by force: of 25 structures the one with two atoms 0.005 A apart is the first."""
    source = shared_file("cases/19-one-bad-structure-in-training/dup.xyz")
    with checking(allow_close=True):
        (folder,) = convert(source, tmp_path / "slabs", format="ase", split="train")
    tasks = Tasks([dataclasses.replace(pretrain_tasks()[0], name="oxides")])
    batch = make_batch(list(open_store(folder)), [0] * 25)
    named = Supervised(torch.nn.Module(), tasks).suspects(batch)
    assert named[0] == "oxides: dup.xyz:12 (two atoms 0.005 A apart)"
    assert len(named) == 25
    assert not any("apart" in name for name in named[1:])
