"""New tasks of record stores: JMP's for the datasets of the catalogue, with the data's own statistics for others."""

import dataclasses
from typing import Literal

from ejmp.catalog import CATALOG, Finetuning
from ejmp.data import Dataset, DatasetInfo
from ejmp.data.store.stats import Tally
from ejmp.graph.settings import GraphSettings
from ejmp.model.task import FORCE_WEIGHT, Task, finetune_task, pretrain_tasks
from ejmp.train.sources import Stores, TaskData, info_of

ForceKind = Literal["direct", "gradient"]


def recipe_graph(recipe: Finetuning) -> GraphSettings:
    """Return how JMP makes graphs for a fine-tuning task."""
    return next(entry.graph for entry in CATALOG.values() if recipe in entry.finetuning)


def recipe_of(name: str, target: str | None = None) -> Finetuning | None:
    """Return JMP's recipe for a dataset and a target.

    Args:
        name: name of the dataset.
        target: what is learned; None: what the recipe learns.

    Returns:
        The recipe; None if the dataset is not one that JMP is fine-tuned on, or its recipe learns another target.
    """
    recipes = CATALOG[name].finetuning if name in CATALOG else ()
    return next((recipe for recipe in recipes if target in (None, recipe.target)), None)


def pretraining_data(stores: Stores, head: int) -> TaskData:
    """Return stores with a pre-training task: energies and direct forces.

    Normalisation and weights are JMP's for the four datasets of its mix, and otherwise those of the training split,
    with forces weighing 100. The linear reference is that of the data. Graphs are still to be chosen (`with_graph`).

    Args:
        stores: dataset to train on.
        head: index of the model's head.

    Raises:
        ValueError: if the dataset has no energies.
    """
    info = info_of(stores)
    known = {task.name: task for task in pretrain_tasks()}.get(stores.name)
    if known is not None:
        task = dataclasses.replace(known, head=head, linear_reference=info.linear_reference)
    else:
        task = dataclasses.replace(Task.from_info(info, head=head), name=stores.name)
    return TaskData(splits=stores.splits, task=task)


def finetuning_data(
    stores: Stores, *, target: str | None = None, forces: ForceKind = "gradient", recipe: Finetuning | None = None
) -> TaskData:
    """Return stores with a fine-tuning task on head 0. Graphs are still to be chosen (`with_graph`).

    A dataset that JMP is fine-tuned on has the losses of its recipe. Its normalisation is that of the training split,
    because a dataset like rMD17 has many molecules; only if a recipe is asked for, it is the one JMP has published.
    Data of the user's own has JMP's losses for energies and forces, which weigh 1 and 100.

    Args:
        stores: dataset to train on.
        target: "energy" or another label of the dataset; None: what the recipe learns, or the energy.
        forces: how forces are predicted, if they are.
        recipe: recipe that is asked for, with its normalisation; None: that of the dataset's name.

    Raises:
        ValueError: if the dataset has no such label, or no forces where the recipe learns forces alone.
    """
    info = info_of(stores)
    if recipe is not None:
        task = finetune_task(recipe.task)
        if recipe.has_reference:
            task = dataclasses.replace(task, linear_reference=info.linear_reference)
        if task.forces is not None:
            task = dataclasses.replace(task, forces=forces)
    else:
        task = _measured(stores, info, target, forces)
    return TaskData(splits=stores.splits, task=dataclasses.replace(task, name=stores.name))


def _measured(stores: Stores, info: DatasetInfo, target: str | None, forces: ForceKind) -> Task:
    """Return a task with the normalisation of the training split and the losses of the dataset's recipe, if any."""
    recipe = recipe_of(stores.name, target)
    target = target or (recipe.target if recipe is not None else "energy")
    if stores.name in CATALOG and target in CATALOG[stores.name].referenced:
        return _referenced(stores, target)
    task = Task.from_info(info, target=target, forces=forces, force_weight=FORCE_WEIGHT)
    task = dataclasses.replace(task, force_mean="atoms")
    if recipe is None:
        return task
    task = dataclasses.replace(task, unit=recipe.unit)
    if recipe.force_std is None:
        return dataclasses.replace(task, forces=None, force_weight=0.0)
    if task.forces is None:
        raise ValueError(
            f"data: {stores.name} has no forces, and JMP's recipe for it learns forces alone; another name "
            f"(--data mine=FOLDER) has its energies learned"
        )
    return weighted(task, recipe.energy_weight, recipe.force_weight)


def weighted(task: Task, energy_weight: float | None, force_weight: float | None) -> Task:
    """Return a task with other weights in its loss.

    Forces that are learned alone, as the gradient, are compared in units of their own standard deviation, so that this
    becomes the unit of the energy too.

    Args:
        task: task to change.
        energy_weight: weight of the target's error; None: as it is.
        force_weight: weight of the forces' error; None: as it is.
    """
    energy_weight = task.energy_weight if energy_weight is None else energy_weight
    force_weight = task.force_weight if force_weight is None else force_weight
    alone = task.forces == "gradient" and force_weight and not energy_weight
    std = task.force_std if alone else task.std
    return dataclasses.replace(task, energy_weight=energy_weight, force_weight=force_weight, std=std)


def _referenced(stores: Stores, target: str) -> Task:
    """Return a task whose target is learned less a linear reference, which takes a pass over the training split."""
    tally = Tally()
    dataset: Dataset = stores.splits["train"]
    for number in range(len(dataset)):
        structure = dataset[number]
        energy = structure.targets.get(target)
        tally.add(dataclasses.replace(structure, energy=energy, forces=None, targets={}))
    statistics = tally.statistics()
    if "energy" not in statistics:
        raise ValueError(f"target: expected a label of {stores.name}, got {target!r}, which no structure has")
    found = statistics["energy"]
    return Task(
        name=stores.name,
        target=target,
        linear_reference=tally.linear_reference(),
        mean=found.mean,
        std=found.std,
        unit=info_of(stores).statistics[target].unit,
        force_mean="atoms",
        forces=None,
    )
