"""What a run is, as run.json in its folder keeps it, and what of that has changed when it goes on."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ejmp.provenance import provenance
from ejmp.train.config import TrainConfig
from ejmp.train.distributed import Ranks
from ejmp.train.objective import Distillation, Objective
from ejmp.train.sources import TaskData

NAME = "run.json"
"""The file's name."""
FREE = ("max_seconds", "num_workers", "log_every", "checkpoint_every", "keep_checkpoints")
"""Settings that do not change what a run computes."""


def describe(objective: Objective, sources: Sequence[TaskData], config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """Return what a run is and what it runs on, ready for JSON."""
    model = objective.model
    return {
        "config": config.to_dict(),
        "objective": type(objective).__name__,
        "datasets": {source.name: dataclasses.asdict(source.task.graph) for source in sources},
        "structures": {source.name: {name: len(data) for name, data in source.splits.items()} for source in sources},
        "parameters": sum(p.numel() for p in model.parameters()),
        "depths": model.config.depths or (model.config.blocks,),
        "terms": dataclasses.asdict(objective.config) if isinstance(objective, Distillation) else None,
        "backend": model.backend,
        "world_size": ranks.world_size,
        "machine": provenance(ranks.device),
    }


def differences(folder: Path, now: Mapping[str, Any]) -> list[str]:
    """Return in words what differs between a run as it was begun and as it is to go on: settings, data or code.

    Numbers of ranks, backends and machines may differ, and what an earlier version did not write down.

    Args:
        folder: folder of the run; if run.json is not in it, nothing is known to differ.
        now: what `describe` returns for the run as it is to go on.
    """
    try:
        begun = dict(_compared(json.loads((folder / NAME).read_text())))
    except FileNotFoundError:
        return []
    here = dict(_compared(json.loads(json.dumps(now))))
    return [
        f"{name} is {begun[name]} there and {value} here"
        for name, value in here.items()
        if begun.get(name, value) != value
    ]


def _compared(description: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what decides what a run computes, by name."""
    for name, value in description["config"].items():
        if name not in FREE:
            yield name, value
    for name in ("commit", "ejmp"):
        yield name, description["machine"][name]
    for name in ("objective", "datasets", "structures", "parameters", "depths", "terms"):
        value = description.get(name)
        if value is not None:
            yield name, list(value.items()) if isinstance(value, dict) else value  # the order of datasets counts
