"""Long runs: memory, open files and threads stay as they are, however often something is done."""

import dataclasses
import gc
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from support.data_store import make_format
from support.few import few
from support.inputs import require_native

import ejmp
from ejmp.data import convert, open_store
from ejmp.train.config import TrainConfig
from ejmp.train.loop import Run, train
from ejmp.train.objective import Supervised
from ejmp.train.sources import demo_mix, tasks_of
from ejmp.train.start import new_model

pytestmark = pytest.mark.slow
POINTS = 40
"""How often is looked."""
MOST_MIB = 8.0
"""Growth of memory, from the second quarter of the points to the last, that counts as none."""


class Watch:
    """Looks at this process a number of times while something is done again and again."""

    def __init__(self, times):
        self.every, self.done, self.seen = max(1, times // POINTS), 0, []

    def step(self):
        self.done += 1
        if self.done % self.every == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files = sum(1 for _ in Path("/proc/self/fd").iterdir())
            self.seen.append((pages * 4096 / 2**20, files, threading.active_count()))

    def check(self, what):
        mib, files, threads = np.array(self.seen).T
        quarter = len(mib) // 4
        growth = np.median(mib[-quarter:]) - np.median(mib[quarter : 2 * quarter])
        slope = 1024 * np.polyfit(np.arange(quarter, len(mib)) * self.every, mib[quarter:], 1)[0]
        text = f"{mib[-1]:.0f} MiB, {slope:+.3f} KiB each, {growth:+.1f} MiB in the last half"
        sys.stdout.write(f"\n{what}: {self.done} times, {text}\n")
        assert growth < MOST_MIB
        assert len(set(files[quarter:])) == 1
        assert len(set(threads[quarter:])) == 1


def molecule(size, seed):
    """Atoms on a grid of 1.2 A, moved a little."""
    generator = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(4)] * 3), axis=-1).reshape(-1, 3)[:size]
    positions = 1.2 * grid + generator.normal(0, 0.05, (size, 3))
    return ejmp.Structure(numbers=generator.choice([1, 6, 7, 8], size), positions=positions)


def test_ten_thousand_passes_of_changing_size(tiny_config):
    require_native()
    torch.manual_seed(0)
    model = ejmp.JMP(tiny_config, backend="native").eval()
    watch = Watch(10_000)
    with torch.no_grad():
        for i in range(10_000):
            model(ejmp.build_graph([molecule(2 + i * 7 % 30, i)], 6.0, 12))
            watch.step()
    watch.check("forward pass")


def test_five_thousand_training_steps(tmp_path, ranks, tiny_config, monkeypatch):
    sources = few(demo_mix())
    config = TrainConfig(
        steps=5000, batch_size=2, warmup_steps=10, validate_every=500, checkpoint_every=500, log_every=100, zero_stage=0
    )
    model = new_model(dataclasses.replace(tiny_config, num_tasks=4), sources, seed=0)
    watch, forward = Watch(5000), Supervised.forward

    def watched(self, batch):
        watch.step()
        return forward(self, batch)

    monkeypatch.setattr(Supervised, "forward", watched)
    objective = Supervised(model, tasks_of(sources))
    assert train(Run(objective=objective, sources=sources, config=config, directory=tmp_path, ranks=ranks)).finished
    watch.check("training step")


def test_ten_thousand_opened_stores(tmp_path):
    convert("nowhere", tmp_path / "set", format=make_format(), shard_size=30)
    watch = Watch(10_000)
    for i in range(10_000):
        store = open_store(tmp_path / "set" / "train")
        assert len(store[i % len(store)].numbers)
        del store
        watch.step()
    watch.check("opened store")


def test_a_hundred_conversions(tmp_path):
    watch = Watch(100)
    for _ in range(100):
        convert("nowhere", tmp_path / "set", format=make_format(), shard_size=30)
        shutil.rmtree(tmp_path / "set")
        watch.step()
    watch.check("conversion")
