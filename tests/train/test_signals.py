"""Trainings that signals end at any moment: no more is lost than since the last checkpoint, and no number changes."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import time

import pytest
from support.few import few

from ejmp.data.store.durable import hash_file
from ejmp.train import checkpoint
from ejmp.train.config import TrainConfig
from ejmp.train.faults import session
from ejmp.train.loop import FINAL, Run, train
from ejmp.train.objective import Supervised
from ejmp.train.sources import demo_mix, tasks_of
from ejmp.train.start import new_model

pytest.importorskip("deepspeed")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
CONFIG = TrainConfig(
    steps=12, batch_size=4, warmup_steps=2, validate_every=4, checkpoint_every=3, log_every=1, zero_stage=0, ema=0.9
)
PATIENCE = 30.0
"""Seconds within which a process ends that was told to."""
FORK = multiprocessing.get_context("fork")


def go(folder, sources, config):
    """Train, from the newest checkpoint if there is one; the body of a process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.environ["MASTER_PORT"] = str(20000 + os.getpid() % 12000)
    with session("cpu") as ranks:
        model = new_model(dataclasses.replace(config, num_tasks=4), sources, seed=0)
        objective = Supervised(model, tasks_of(sources))
        run = Run(objective=objective, sources=sources, config=CONFIG, directory=folder, ranks=ranks)
        train(run, resume=bool(checkpoint.steps(folder / "checkpoints")))


def started(folder, sources, config):
    process = FORK.Process(target=go, args=(folder, sources, config))
    process.start()
    return process


def last_step(folder):
    """The last step that the log has."""
    log = folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return max((line["step"] for line in lines if line["event"] == "train"), default=0)


def newest(folder):
    found = checkpoint.steps(folder / "checkpoints")
    return int(found[0].name.removeprefix("step-")) if found else 0


def result_of(folder):
    return [
        hash_file(folder / FINAL / "model.safetensors"),
        hash_file(checkpoint.steps(folder / "checkpoints")[0] / "ema.safetensors"),
    ]


def campaign(tmp_path, config, count):
    """End trainings by signals `count` times, each run until it is finished; return what the signals met."""
    sources = few(demo_mix())
    whole = tmp_path / "whole"
    whole.mkdir()
    begin = time.monotonic()
    process = started(whole, sources, config)
    process.join()
    length = time.monotonic() - begin
    assert process.exitcode == 0
    expected, met, run = result_of(whole), [], 0
    while len(met) < count:
        folder = tmp_path / str(run)
        folder.mkdir()
        while True:
            process = started(folder, sources, config)
            process.join(random.uniform(0, 1.2 * length))
            ended = process.exitcode is not None
            if not ended:
                number = random.choice(SIGNALS)
                os.kill(process.pid, number)
                process.join(PATIENCE)
                assert process.exitcode is not None, f"{number} does not end it"
                step, saved = last_step(folder), newest(folder)
                assert saved >= step - CONFIG.checkpoint_every, (number, step, saved)
                met.append((number, step, process.exitcode))
            if process.exitcode == 0 and newest(folder) == CONFIG.steps:
                break
            assert not ended, f"it failed: {process.exitcode}"
        assert result_of(folder) == expected
        run += 1
    return met


@pytest.mark.slow
def test_two_hundred_signals(tmp_path, tiny_config):
    met = campaign(tmp_path, tiny_config, 200)
    assert {number for number, _, _ in met} == set(SIGNALS)
    told = [(number, code) for number, _, code in met if number in (signal.SIGTERM, signal.SIGUSR1)]
    assert all(code in (0, -number) for number, code in told)  # saved, or it had not begun to train
