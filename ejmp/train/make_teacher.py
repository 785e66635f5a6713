"""Make the demo teacher again: `python -m ejmp.train.make_teacher OUT`, some hours of one core.

The run is kept in OUT/run and goes on from its newest checkpoint when it is started again. OUT/teacher is what ships
with the package: weights in half precision, their recipe and the log. Training repeats bit by bit with the same
numbers of ranks and threads on the same processor; elsewhere the errors are within some percent.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import torch

from ejmp.data.store.durable import hash_file
from ejmp.model.checkpoint import load, save
from ejmp.provenance import provenance
from ejmp.train import presets
from ejmp.train.config import TrainConfig
from ejmp.train.demo import RECIPE, TEACHER, demo_config
from ejmp.train.distributed import Ranks
from ejmp.train.evaluate import Errors, evaluate, table
from ejmp.train.faults import session
from ejmp.train.loop import FINAL, Run, train
from ejmp.train.objective import Supervised
from ejmp.train.sources import demo_mix, tasks_of
from ejmp.train.start import new_model

COMMAND = "python -m ejmp.train.make_teacher"


def make_teacher(folder: Path, config: TrainConfig, ranks: Ranks) -> Errors | None:
    """Train the demo teacher, or go on with it, and write it to folder/teacher; return its validation errors.

    Args:
        folder: for the run and the teacher; it is made if it is not there.
        config: settings of the run.
        ranks: this process among all.

    Returns:
        Errors of the weights as they are written, in half precision; None if the run was told to stop.
    """
    run = folder / "run"
    run.mkdir(parents=True, exist_ok=True)
    sources = demo_mix()
    objective = Supervised(new_model(demo_config(), sources, seed=config.seed), tasks_of(sources))
    whole = Run(objective=objective, sources=sources, config=config, directory=run, ranks=ranks, force=True)
    result = train(whole, resume=None)
    if not result.finished:
        return None
    if ranks.rank == 0:
        write_teacher(run, folder / "teacher")
    torch.distributed.barrier()
    errors = evaluate(load(folder / "teacher"), sources, ranks)
    if ranks.rank == 0:
        _write_recipe(folder / "teacher", config, errors, ranks)
    return errors


def write_teacher(run: Path, folder: Path) -> None:
    """Write the model that a run ended with in half precision, all but its scale factors, and the run's log."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415 - building a model does not need it

    save(load(run / FINAL), folder, overwrite=True)
    weights = folder / "model.safetensors"
    state = load_file(weights)
    save_file({name: value.half() if value.numel() > 1 else value for name, value in state.items()}, weights)
    shutil.copyfile(run / "log.jsonl", folder / "log.jsonl")


def _write_recipe(folder: Path, config: TrainConfig, errors: Errors, ranks: Ranks) -> None:
    recipe = {
        "command": f"{COMMAND} OUT --steps {config.steps} --seed {config.seed}",
        "settings": config.to_dict(),
        "validation": errors,
        "machine": provenance(ranks.device),
        "hash": hash_file(folder / "model.safetensors"),
    }
    (folder / RECIPE).write_text(json.dumps(recipe, indent=1) + "\n")


def main() -> None:
    """Make the teacher, and compare its errors with those of the one that ships."""
    standard = presets.teacher()
    parser = argparse.ArgumentParser(prog=COMMAND, description="Make the demo teacher again.")
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--steps", type=int, default=standard.steps, help=f"default: {standard.steps}")
    parser.add_argument("--seed", type=int, default=standard.seed, help=f"default: {standard.seed}")
    options = parser.parse_args()
    config = dataclasses.replace(standard, steps=options.steps, seed=options.seed)
    with session("auto") as ranks:
        errors = make_teacher(options.folder, config, ranks)
    if errors is None:
        sys.stderr.write("stopped; the same command goes on\n")
    elif ranks.rank == 0:
        shipped = json.loads((TEACHER / RECIPE).read_text())["validation"]
        sys.stdout.write(table({"this one": errors, "the one that ships": shipped}) + "\n")


if __name__ == "__main__":
    main()
