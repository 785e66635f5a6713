"""The data of a run: record stores named on the command line, or the embedded demo data, with their tasks."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from ejmp.catalog import CATALOG, GraphSettings
from ejmp.data import DEMO_DOWNSTREAM, DEMO_MIX, Dataset, DatasetInfo, Loader, MixSampler, Structure, demo, open_store
from ejmp.data.sampling.mix import Sampler
from ejmp.data.sampling.permutation import permute
from ejmp.graph.graph import AtomGraph
from ejmp.model.checkpoint import TASKS
from ejmp.model.jmp import JMP
from ejmp.train.task import Task, Tasks

DEMO_MOLECULES = GraphSettings(cutoff=3.2, max_neighbors=8, tags="none")
"""How graphs are made of the demo data's molecules: small as everything there."""
DEMO_SOLIDS = GraphSettings(cutoff=4.0, max_neighbors=10)
"""How graphs are made of the demo data's slabs and, but for the tags, of its frameworks."""
DEMO_FORCE_WEIGHT = 10.0
Split = Literal["train", "val", "test"]


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A dataset's splits and its task, which says how graphs are made of them."""

    splits: Mapping[str, Dataset]
    """Splits by name; at least the one that is asked for."""
    task: Task
    """What a head learns of the dataset, and how graphs are made of it."""

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
            known = ", ".join(self.splits)
            raise ValueError(
                f"{self.name}: there is no split {name!r}, only {known}; `ejmp data convert --split {name}` makes it, "
                f"`ejmp evaluate --split {next(iter(self.splits))}` takes another"
            )
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
    task = Task.from_info(info, head=head, target=target, forces=forces, force_weight=weight, graph=_demo_graph(name))
    return TaskData(splits=splits, task=task)


def _demo_graph(name: str) -> GraphSettings:
    if name in ("oc20", "oc22"):
        return DEMO_SOLIDS
    return dataclasses.replace(DEMO_SOLIDS, tags="none") if name == "qmof" else DEMO_MOLECULES


class Splits(Protocol):
    """A dataset's splits under a name: `Stores` and `TaskData`."""

    @property
    def name(self) -> str:
        """The name of the dataset."""
        ...

    @property
    def splits(self) -> Mapping[str, Dataset]:
        """Splits by name."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stores:
    """A dataset's record stores. What is learned of them, and how graphs are made of them, is for others to say."""

    name: str
    """Name of the dataset, as the command line gave it."""
    splits: Mapping[str, Dataset]
    """Splits by name."""


def info_of(source: Splits) -> DatasetInfo:
    """Return what is known of a dataset as a whole, which its training split says if there is one."""
    return (source.splits.get("train") or next(iter(source.splits.values()))).info


def from_stores(spec: str) -> list[Stores]:
    """Open record stores (`ejmp data convert`) named like "oc20=PATH,oc22=PATH".

    Their tasks are those of a model (`with_tasks_of`), or new ones (`ejmp.train.recipes`).

    Args:
        spec: names and folders, each with a folder per split.

    Raises:
        ValueError: for a spec of another form, or a folder without splits.
    """
    found = []
    for item in spec.split(","):
        name, equals, folder = item.partition("=")
        if not equals or not name or not folder:
            raise ValueError(f"data: expected NAME=FOLDER,..., got {spec!r}")
        paths = [path for path in sorted(Path(folder).glob("*")) if (path / "dataset.json").exists()]
        if (Path(folder) / "dataset.json").exists():
            raise ValueError(f"data: {folder} is one split; expected the folder of all of them, {Path(folder).parent}")
        if not paths:
            raise ValueError(f"data: {folder}: no split with a dataset.json; `ejmp data convert` writes them")
        found.append(Stores(name=name, splits={path.name: open_store(path) for path in paths}))
    return found


def mix_of(spec: str | None) -> Sequence[Splits]:
    """Return the record stores of "NAME=FOLDER,...", as `from_stores` reads them, or the demo mix for None."""
    return from_stores(spec) if spec else demo_mix()


def with_graph(
    source: TaskData,
    *,
    cutoff: float | None = None,
    max_neighbors: int | None = None,
    start: JMP | None = None,
    known: GraphSettings | None = None,
) -> TaskData:
    """Return a source with the graphs that a model which starts from another one should be trained on.

    They are those of the model that it starts from, if all its tasks have the same; or else the paper's for a dataset
    of that name; or else, of the start model's, those of its catalysts (tasks with tags) for periodic data and of its
    molecules for others, as JMP has two kinds. What is given here replaces their numbers.

    Args:
        source: dataset with its task.
        cutoff: longest edge, A.
        max_neighbors: most main edges into an atom.
        start: model that training starts from; None: random weights.
        known: graphs of the recipe that was asked for, which come before those of the start model; None: none was.

    Raises:
        ValueError: if a number is neither given nor known from the start model or the dataset's name.
    """
    own = {task.graph for task in start.tasks} if start is not None else set()
    entry = CATALOG.get(source.name)
    if known is not None:
        graph = known
    elif len(own) == 1:
        (graph,) = own
    elif entry is not None:
        graph = entry.graph
    else:
        graph = _of_its_kind(source, own)
    if graph is None:
        if cutoff is None or max_neighbors is None:
            raise ValueError(
                f"data: how to make graphs of {source.name} is not known: no such name in the catalogue "
                f"({', '.join(CATALOG)}), nor a start model with one kind of graph; say --cutoff and --max-neighbors"
            )
        graph = GraphSettings(tags="none")
    if cutoff is not None:
        graph = dataclasses.replace(graph, cutoff=cutoff)
    if max_neighbors is not None:
        graph = dataclasses.replace(graph, max_neighbors=max_neighbors, fewer_above=())
    return dataclasses.replace(source, task=dataclasses.replace(source.task, graph=graph))


def _of_its_kind(source: TaskData, graphs: set[GraphSettings]) -> GraphSettings | None:
    """Return the one kind of graphs that is for structures like the first training structure; None if it is not one."""
    if not graphs or "train" not in source.splits:
        return None
    tags = "oc20" if np.any(source.splits["train"][0].pbc) else "none"
    found = [graph for graph in graphs if graph.tags == tags]
    return dataclasses.replace(found[0], tags="none") if len(found) == 1 else None


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
        settings=[source.task.graph for source in sources],
        dtype=dtype,
        device=device,
        num_workers=num_workers,
    )


def graphs_of(model: JMP, sources: Sequence[TaskData], structures: int, *, seed: int = 0) -> Iterator[AtomGraph]:
    """Yield graphs, as a model takes them, of training structures of all sources, mixed as for training.

    Args:
        model: whose type and device the graphs have.
        sources: datasets with a split "train".
        structures: number of structures, rounded up to whole batches of 16; at most an epoch of them is given.
        seed: seed of the choice.
    """
    sizes = [len(source.split("train")) for source in sources]
    sampler = MixSampler(sizes=sizes, seed=seed, batch_size=16)
    loader = loader_of(sources, "train", sampler, dtype=model.dtype, device=model.device)
    return (batch.graph for batch in loader.batches(0, min(structures, sampler.epoch_size)))


def tasks_of(sources: Sequence[TaskData]) -> Tasks:
    """Return the sources' tasks in the order of their dataset numbers."""
    return Tasks([source.task for source in sources])


class Chosen:
    """Some structures of a dataset.

    Args:
        dataset: all structures.
        numbers: numbers of those to take, [n].
    """

    def __init__(self, dataset: Dataset, numbers: np.ndarray) -> None:
        self.info = dataclasses.replace(dataset.info, count=len(numbers))
        self.num_atoms, self.num_edges = dataset.num_atoms[numbers], dataset.num_edges[numbers]
        self._dataset, self._numbers = dataset, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Structure:
        return self._dataset[int(self._numbers[index])]


def at_most(source: TaskData, split: Split, count: int | None, *, seed: int = 0) -> TaskData:
    """Return a source with at most so many structures of a split, always the same random ones for a seed.

    Args:
        source: dataset with the split.
        split: split to take them of.
        count: largest number of structures; None: all.
        seed: seed of the choice.
    """
    dataset = source.split(split)
    if count is None or len(dataset) <= count:
        return source
    numbers = np.sort(permute(np.arange(count), len(dataset), seed))
    return dataclasses.replace(source, splits={**source.splits, split: Chosen(dataset, numbers)})


def with_tasks_of(path: Path, sources: Sequence[Splits], model: JMP) -> list[TaskData]:
    """Return sources with the tasks that a model has for datasets of their names: heads, normalisation and graphs.

    Where a task does not say what the linear reference is (JMP's published checkpoint), it is that of the data.

    Args:
        path: where the model comes from, for messages.
        sources: datasets; tasks of their own do not matter.
        model: model whose tasks they get.

    Raises:
        ValueError: if the model does not say what its heads predict, or was not trained on one of the sources.
    """
    if not model.tasks:
        raise ValueError(
            f"{path}: the model does not say what its heads predict ({TASKS} is missing), and that is not guessed; "
            "make it again from its origin, or set model.tasks and ejmp.save it"
        )
    tasks = {task.name: task for task in model.tasks}
    found = []
    for source in sources:
        task = tasks.get(source.name)
        if task is None:
            raise ValueError(f"{path}: the model has no head for {source.name}, only for {', '.join(tasks)}")
        if task.linear_reference is None:
            task = dataclasses.replace(task, linear_reference=info_of(source).linear_reference)
        found.append(TaskData(splits=source.splits, task=task))
    return found
