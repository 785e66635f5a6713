"""The whole GPU campaign with stand-ins for its steps: their order and limits, and what is left when it is killed."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_campaign
import gpu_step
import pytest

ROOT = Path(__file__).parents[2]
STEP = """
import argparse, sys, time
from pathlib import Path
import torch
from gpu_setting import Setting
from gpu_step import Step

parser = argparse.ArgumentParser()
parser.add_argument("name")
parser.add_argument("--out", type=Path)
parser.add_argument("--seconds", type=float)
options = parser.parse_args()
step = Step(options.name, Setting(device=torch.device("cpu"), dry=True, out=options.out, seconds=options.seconds))
for number in range(3):
    step.add({"what": f"row {number}"})
    time.sleep(0.2)
if options.name == "ops":
    time.sleep(60)
"""
"""A step of three rows; "ops" hangs after them."""
CAMPAIGN = """
import argparse, sys
from pathlib import Path
import gpu_campaign

step, out, *names = sys.argv[1:]
gpu_campaign.__file__ = step
gpu_campaign.HARD = 12
sys.exit(gpu_campaign.one_by_one(names, argparse.Namespace(steps=names, seconds=None), Path(out)))
"""


def start(folder, *names):
    """Start a campaign of some steps in a process group of its own."""
    (folder / "step.py").write_text(STEP)
    command = [sys.executable, "-c", CAMPAIGN, folder / "step.py", folder / "out", *names]
    env = gpu_campaign.environment(OMP_NUM_THREADS="1")
    return subprocess.Popen(list(map(str, command)), env=env, start_new_session=True, stdout=subprocess.DEVNULL)


def rows(folder):
    """Return the number of rows of each step that is on disk."""
    return {name: len(step["rows"]) for name, step in gpu_step.read_steps(folder / "out").items()}


@pytest.mark.parametrize("line", [1, 3, 5])
def test_what_was_measured_survives_a_kill_at_any_line(tmp_path, line):
    with start(tmp_path, "ceilings", "chain") as process:
        deadline = time.monotonic() + 60
        while sum(rows(tmp_path).values()) < line and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    left = rows(tmp_path)
    assert line <= sum(left.values()) < 6
    assert left["ceilings"] == min(3, sum(left.values()))
    assert start(tmp_path, "chain").wait(timeout=60) == 0  # one step again: the others stay
    assert rows(tmp_path) == left | {"chain": 3}
    assert not json.loads((tmp_path / "out" / gpu_step.FILE).read_text()).keys() - {"benchmark", "format", "steps"}


def test_a_step_that_hangs_is_ended_and_the_next_one_runs(tmp_path):
    assert start(tmp_path, "ops", "chain").wait(timeout=90) == 1
    assert rows(tmp_path) == {"ops": 3, "chain": 3}


@pytest.mark.parametrize("each", [1.0, 100.0])
def test_steps_come_in_order_and_share_the_time(tmp_path, monkeypatch, each):
    """A clock that advances by so much in each step; late ones still get a second to say that there is no time."""
    asked, clock = [], [0.0]

    def run(command, **options):
        asked.append((command[2], float(command[-1]), options["timeout"]))
        clock[0] += each
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu_campaign.subprocess, "run", run)
    monkeypatch.setattr(gpu_campaign.time, "perf_counter", lambda: clock[0])
    options = argparse.Namespace(steps=["all"], seconds=None)
    assert gpu_campaign.one_by_one(list(gpu_campaign.SECONDS), options, tmp_path) == 0
    assert [name for name, *_ in asked] == list(gpu_campaign.SECONDS)
    for number, (name, seconds, hard) in enumerate(asked):
        left = gpu_campaign.TOTAL - number * each
        assert seconds == pytest.approx(max(1.0, min(gpu_campaign.SECONDS[name], left)), abs=0.5)
        assert hard == gpu_campaign.HARD
