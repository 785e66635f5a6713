"""Fine-tune on real data: 200 aspirin frames of rMD17 (150 train, 25 val, 25 test) with gradient forces.

    python benchmarks/finetune_aspirin.py rmd17_aspirin_train_01.npz OUT.json [--steps 150]

The demo teacher is the start, beside random weights of the same sizes with the same budget. Errors are of the test
frames, in meV and meV/A.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from ejmp.data import DatasetInfo, Statistics, read
from ejmp.model.checkpoint import load
from ejmp.provenance import provenance
from ejmp.train import presets
from ejmp.train.demo import demo_teacher
from ejmp.train.evaluate import evaluate
from ejmp.train.faults import session
from ejmp.train.loop import FINAL, Run, train
from ejmp.train.objective import Supervised
from ejmp.train.sources import DEMO_MOLECULES, TaskData, tasks_of
from ejmp.train.start import for_finetuning, new_model
from ejmp.train.task import Task

SIZES = {"train": 150, "val": 25, "test": 25}


class Frames:
    """A dataset of frames in memory."""

    def __init__(self, frames, split):
        self.frames = frames
        self.num_atoms = np.array([len(frame.numbers) for frame in frames])
        self.num_edges = self.num_atoms * DEMO_MOLECULES.max_neighbors
        count = {"name": "aspirin", "format": "rmd17", "split": split, "count": len(frames)}
        statistics = {
            "energy": Statistics(mean=_mean(frames), std=float(np.std([f.energy for f in frames])), unit="eV"),
            "forces": Statistics(mean=0.0, std=float(np.std(np.stack([f.forces for f in frames]))), unit="eV/A"),
        }
        self.info = DatasetInfo(**count, source="rMD17", licence="CC0", statistics=statistics)

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        return self.frames[index]


def _mean(frames):
    return float(np.mean([frame.energy for frame in frames]))


def splits_of(path):
    """Divide the frames of a file by RandomState(42), as rMD17's rule does; return them by split."""
    frames = list(read(path, format="rmd17"))
    order = np.random.RandomState(42).permutation(len(frames))
    ends = np.cumsum([0, *SIZES.values()])
    parts = zip(SIZES, ends[:-1], ends[1:], strict=True)
    return {name: Frames([frames[i] for i in order[a:b]], name) for name, a, b in parts}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("frames", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    splits = splits_of(options.frames)
    task = Task.from_info(splits["train"].info, forces="gradient", graph=DEMO_MOLECULES)
    source = TaskData(splits=splits, task=task)
    settings = dataclasses.replace(presets.demo("finetune"), steps=options.steps, validate_every=options.steps // 3)
    found = {}
    with session("cpu") as ranks, tempfile.TemporaryDirectory() as scratch:
        start = for_finetuning(load(demo_teacher()))
        models = {"demo teacher": start, "from scratch": new_model(start.config, [source], seed=0)}
        for name, model in models.items():
            before = evaluate(model, [source], ranks, split="test")["aspirin"]
            folder = Path(scratch, name.replace(" ", "-"))
            folder.mkdir()
            objective = Supervised(model, tasks_of([source]))
            train(Run(objective=objective, sources=[source], config=settings, directory=folder, ranks=ranks))
            after = evaluate(load(folder / FINAL), [source], ranks, split="test")["aspirin"]
            found[name] = {"before": before, "after": after}
            print(name, json.dumps(found[name]), flush=True)
    mean = {"energy_meV": 1000 * float(np.mean([abs(f.energy - task.mean) for f in splits["test"].frames]))}
    mean["forces_meV_per_A"] = 1000 * float(np.mean([np.abs(f.forces).mean() for f in splits["test"].frames]))
    result = {"settings": settings.to_dict(), "errors": found, "mean of the training frames": mean}
    options.output.write_text(json.dumps({**result, "machine": provenance(torch.device("cpu"))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
