"""The data of a run: record stores named on the command line, or the embedded demo data, with their tasks."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ejmp.catalog import CATALOG, GraphSettings
from ejmp.data import DEMO_DOWNSTREAM, DEMO_MIX, Dataset, Loader, demo, open_store
from ejmp.data.sampling.mix import Sampler
from ejmp.model.jmp import JMP
from ejmp.train.task import Task, Tasks, pretrain_tasks

DEMO_GRAPH = (5.0, 14)
"""Cutoff (A) and neighbours of the demo mix's graphs, small as everything there."""
DEMO_FORCE_WEIGHT = 10.0
Split = Literal["train", "val", "test"]
TASKS_FILE = "tasks.json"
"""File beside a saved model that says what its heads predict, and of which graphs."""


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A dataset's splits, how graphs are made of them, and its task."""

    splits: Mapping[str, Dataset]
    """Splits by name; at least the one that is asked for."""
    task: Task
    """What a head learns of the dataset."""
    cutoff: float
    """Largest distance between neighbours in a graph, in A."""
    max_neighbors: int
    """Largest number of neighbours of an atom along main edges, before symmetrisation."""

    @property
    def name(self) -> str:
        """The name of the dataset."""
        return self.task.name

    def split(self, name: Split) -> Dataset:
        """Return one split.

        Raises:
            ValueError: if there is none of that name.
        """
        if name not in self.splits:
            raise ValueError(f"{self.name}: there is no split {name!r}, only {', '.join(self.splits)}")
        return self.splits[name]


def demo_mix() -> list[TaskData]:
    """Return the four demo datasets to pre-train and distil on, one head each."""
    return [_demo(name, head=head, forces="direct") for head, name in enumerate(DEMO_MIX)]


def demo_downstream(name: str) -> TaskData:
    """Return a demo dataset to fine-tune on, on head 0: forces as gradients where it has them, a scalar elsewhere.

    Raises:
        ValueError: if there is no such dataset.
    """
    if name not in DEMO_DOWNSTREAM:
        raise ValueError(f"dataset: expected one of {', '.join(DEMO_DOWNSTREAM)}, got {name!r}")
    return _demo(name, head=0, forces="gradient")


def _demo(name: str, *, head: int, forces: Literal["direct", "gradient"]) -> TaskData:
    splits: dict[str, Dataset] = {"train": demo(name, "train"), "val": demo(name, "val")}
    if name in DEMO_DOWNSTREAM:
        splits["test"] = demo(name, "test")
    info = splits["train"].info
    target = "gap" if name in ("qm9", "qmof") else "energy"
    weight = DEMO_FORCE_WEIGHT if forces == "direct" else 100.0
    task = Task.from_info(info, head=head, target=target, forces=forces, force_weight=weight)
    return TaskData(splits=splits, task=task, cutoff=DEMO_GRAPH[0], max_neighbors=DEMO_GRAPH[1])


def from_stores(
    spec: str, *, target: str = "energy", forces: Literal["direct", "gradient"] = "direct"
) -> list[TaskData]:
    """Open record stores (`ejmp data convert`) named like "oc20=PATH,oc22=PATH"; heads are numbered in that order.

    Args:
        spec: Names and folders, each with a folder per split; a name in the catalogue (`ejmp.catalog`) brings its
            cutoff and neighbours.
        target: Label that the heads learn.
        forces: How forces are predicted.

    Raises:
        ValueError: for a spec of another form, or a folder without splits.
    """
    sources = []
    for head, item in enumerate(spec.split(",")):
        name, found, folder = item.partition("=")
        if not found or not name or not folder:
            raise ValueError(f"data: expected NAME=FOLDER,..., got {spec!r}")
        paths = [path for path in sorted(Path(folder).glob("*")) if (path / "dataset.json").exists()]
        if not paths:
            raise ValueError(f"data: {folder}: no split with a dataset.json; `ejmp data convert` writes them")
        splits = {path.name: open_store(path) for path in paths}
        info = (splits.get("train") or next(iter(splits.values()))).info
        entry = CATALOG.get(name)
        pretraining = entry.pretraining if entry is not None and forces == "direct" else None
        weight = pretraining.force_weight if pretraining is not None else 100.0
        task = Task.from_info(info, head=head, target=target, forces=forces, force_weight=weight)
        graph = entry.graph if entry is not None else GraphSettings(cutoff=12.0)
        task = dataclasses.replace(task, name=name)
        sources.append(TaskData(splits=splits, task=task, cutoff=graph.cutoff, max_neighbors=graph.max_neighbors))
    return sources


def loader_of(
    sources: Sequence[TaskData],
    split: Split,
    sampler: Sampler,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> Loader:
    """Return a loader of one split of each source, with its graphs.

    Args:
        sources: datasets, in the order of their dataset numbers.
        split: split to load of each.
        sampler: chooses and orders the samples.
        dtype: type of the graphs' real numbers.
        device: device the batches are put on.
        num_workers: number of processes that make batches; 0: this one does.
    """
    return Loader(
        datasets=[source.split(split) for source in sources],
        sampler=sampler,
        cutoff=[source.cutoff for source in sources],
        max_neighbors=[source.max_neighbors for source in sources],
        dtype=dtype,
        device=device,
        num_workers=num_workers,
    )


def tasks_of(sources: Sequence[TaskData]) -> Tasks:
    """Return the sources' tasks in the order of their dataset numbers."""
    return Tasks([source.task for source in sources])


def tasks_text(sources: Sequence[TaskData]) -> str:
    """Return the text of a model's tasks file, which `load_tasks` reads: what its heads predict, of which graphs."""
    rows = [
        {**dataclasses.asdict(source.task), "cutoff": source.cutoff, "max_neighbors": source.max_neighbors}
        for source in sources
    ]
    return json.dumps(rows, indent=1) + "\n"


def load_tasks(directory: Path) -> list[tuple[Task, float, int]] | None:
    """Return a saved model's tasks, each with the cutoff (A) and neighbours of its graphs; None without a file of them.

    Raises:
        ValueError: if the file is damaged.
    """
    path = directory / TASKS_FILE
    if not path.is_file():
        return None
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())
        found = []
        for row in rows:
            cutoff, max_neighbors = float(row.pop("cutoff")), int(row.pop("max_neighbors"))
            row["linear_reference"] = {int(number): value for number, value in row["linear_reference"].items()}
            found.append((Task(**row), cutoff, max_neighbors))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a list of tasks: {error}") from error
    return found


def with_tasks_of(path: Path, sources: Sequence[TaskData], model: JMP) -> list[TaskData]:
    """Return sources with the heads, normalisation and graphs that a saved model has for datasets of their names.

    For JMP's checkpoint, which comes without a tasks file, they are those of the paper for its four datasets; the
    linear references stay those of the data.

    Raises:
        ValueError: if the model was not trained on one of the sources.
    """
    saved = {task.name: (task, cutoff, most) for task, cutoff, most in load_tasks(path) or []}
    published = {task.name: task for task in pretrain_tasks()} if not saved else {}
    found = []
    for source in sources:
        if source.name in saved:
            task, cutoff, most = saved[source.name]
            found.append(dataclasses.replace(source, task=task, cutoff=cutoff, max_neighbors=most))
        elif source.name in published and model.config.num_tasks == len(published):
            task = dataclasses.replace(published[source.name], linear_reference=source.task.linear_reference)
            found.append(dataclasses.replace(source, task=task))
        else:
            raise ValueError(f"{path}: the model has no head for {source.name}, only for {', '.join(saved) or 'none'}")
    return found
