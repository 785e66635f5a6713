"""Does a student that learns rows of its teacher's Hessian predict better forces, at the same processor time?

    python benchmarks/hessian_aspirin.py rmd17_aspirin_train_01.npz FOLDER OUT.json [--seen 25] [--seconds 200]

The teacher is the demo teacher fine-tuned on 150 real aspirin frames of rMD17. Students are its first two blocks, which
see some of these frames only: their labels alone, labels and the teacher's forces (force distillation), and rows of the
Hessian as well, one per step and frame. How many steps each takes is chosen by the processor time of its own step, so
that all have the same. Errors are of 25 other frames, in meV/A. Finished runs in FOLDER are not repeated.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from finetune_aspirin import Frames, splits_of

from ejmp.compress.config import parse_terms
from ejmp.compress.pruning import prune
from ejmp.data import MixSampler
from ejmp.model.checkpoint import load
from ejmp.provenance import provenance
from ejmp.train import presets
from ejmp.train.config import TrainConfig
from ejmp.train.demo import demo_teacher
from ejmp.train.distributed import Ranks
from ejmp.train.evaluate import evaluate
from ejmp.train.faults import session
from ejmp.train.loop import FINAL, Run, train
from ejmp.train.objective import Distillation, Objective, Supervised
from ejmp.train.sources import DEMO_MOLECULES, TaskData, loader_of, tasks_of
from ejmp.train.start import for_finetuning
from ejmp.train.task import Task

WAYS = {
    "labels": None,
    "forces": "labels=1,forces=1",
    "rows of the Hessian, weight 0.1": "labels=1,forces=1,hessian=0.1",
    "rows of the Hessian, weight 30": "labels=1,forces=1,hessian=30",
}
"""What the students learn: distillation terms; None: labels alone."""
BLOCKS = 2


def settings(steps: int, seed: int) -> TrainConfig:
    """Return the settings of a run of so many steps."""
    ends = {"steps": steps, "validate_every": max(1, steps // 3), "checkpoint_every": max(1, steps // 2)}
    return dataclasses.replace(presets.demo("finetune"), seed=seed, cosine_end=0.02, **ends)


def trained(objective: Objective, source: TaskData, config: TrainConfig, folder: Path, ranks: Ranks) -> float:
    """Train, or take what is there, and return the error of forces on the test frames, meV/A."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "done").exists():
        run = Run(
            objective=objective, sources=[source], config=config, directory=folder, ranks=ranks, force=True,
            validate_first=False,
        )  # fmt: skip
        if not train(run, resume=None).finished:
            raise SystemExit("stopped; the same command goes on")
        (folder / "done").touch()
    return evaluate(load(folder / FINAL), [source], ranks, split="test")[source.name]["forces_meV_per_A"]


def step_seconds(objective: Objective, source: TaskData) -> float:
    """Return the processor time of a step: the shortest of five, after one, because others on the machine only add."""
    sampler = MixSampler(sizes=[len(source.split("train"))], batch_size=8, seed=0)
    times = []
    for batch in loader_of([source], "train", sampler).batches(0, 48):
        before = time.process_time()
        objective(batch).total.backward()
        times.append(time.process_time() - before)
    objective.model.zero_grad()
    return min(times[1:])


def main() -> None:
    """Fine-tune the teacher, train the students, write the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frames", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=200.0, help="processor time of a student (default: 200)")
    parser.add_argument("--seen", type=int, default=25, help="frames that students see, of 150 (default: 25)")
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    parser.add_argument("--teacher-steps", type=int, default=3000, help="default: 3000")
    options = parser.parse_args()
    splits = splits_of(options.frames)
    task = Task.from_info(splits["train"].info, forces="gradient", graph=DEMO_MOLECULES)
    source = TaskData(splits=splits, task=task)
    found = {"teacher": 0.0, "start": 0.0, "steps": {}, "step_seconds": {}, "errors": {}}
    with session("cpu") as ranks:
        start = Supervised(for_finetuning(load(demo_teacher())), tasks_of([source]))
        folder = options.folder / "teacher"
        found["teacher"] = trained(start, source, settings(options.teacher_steps, 0), folder, ranks)
        teacher = load(folder / FINAL)
        found["start"] = evaluate(prune(teacher, blocks=BLOCKS), [source], ranks, split="test")[source.name]
        train_frames = Frames(splits["train"].frames[: options.seen], "train")
        source = TaskData(splits={**splits, "train": train_frames}, task=task)
        for seed in range(options.seeds):
            for way, terms in WAYS.items():
                student, tasks = prune(teacher, blocks=BLOCKS), tasks_of([source])
                if terms is None:
                    objective: Objective = Supervised(student, tasks)
                else:
                    objective = Distillation(student, load(folder / FINAL), tasks, parse_terms(terms))
                if way not in found["steps"]:
                    found["step_seconds"][way] = step_seconds(objective, source)
                    found["steps"][way] = round(options.seconds / found["step_seconds"][way])
                run = options.folder / f"{way.replace(', ', '-').replace(' ', '-')}-{seed}"
                error = trained(objective, source, settings(found["steps"][way], seed), run, ranks)
                found["errors"].setdefault(way, []).append(error)
                print(f"{way}, seed {seed}: {found['steps'][way]} steps, {error:.1f} meV/A", flush=True)
                found["machine"] = provenance(torch.device("cpu"))
                whole = {"seconds": options.seconds, "seen": options.seen, "ways": WAYS, **found}
                options.output.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
