"""Errors of a model on data: mean absolute errors of energies and forces per dataset, over all ranks."""

from collections.abc import Sequence

import torch

from ejmp.data import InOrder
from ejmp.markdown import markdown_table
from ejmp.model.jmp import JMP
from ejmp.train.distributed import Ranks, sum_over_ranks
from ejmp.train.metrics import Maes
from ejmp.train.objective import predict
from ejmp.train.sources import Split, TaskData, loader_of, tasks_of

Errors = dict[str, dict[str, float]]
"""Mean absolute errors by dataset, then by name with its unit; see `Maes.result`."""


def evaluate(
    model: JMP,
    sources: Sequence[TaskData],
    ranks: Ranks,
    *,
    split: Split = "val",
    batch_size: int = 16,
    num_workers: int = 0,
) -> Errors:
    """Return the mean absolute errors of a model on one split of each source.

    Args:
        model: model with a head for each source's task; it is in evaluation mode meanwhile.
        sources: datasets with their graphs and tasks.
        ranks: this process among all, which share the work.
        split: split of each source to evaluate.
        batch_size: number of structures per rank and step.
        num_workers: number of processes per rank that build graphs; 0: this one does.
    """
    sizes = [len(source.split(split)) for source in sources]
    sampler = InOrder(sizes=sizes, batch_size=batch_size, world_size=ranks.world_size, rank=ranks.rank)
    loader = loader_of(sources, split, sampler, dtype=model.dtype, device=ranks.device, num_workers=num_workers)
    tasks = tasks_of(sources)
    maes = Maes(tasks, ranks.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in loader.batches():
            energy, forces = predict(model, batch, tasks)
            maes.update(energy, forces, batch)
    model.train(training)
    maes.sums = sum_over_ranks(maes.sums)
    return maes.result()


def score(errors: Errors) -> float:
    """Return the number that validations compare, lower is better: the mean force error of all datasets, in meV/A.

    If no dataset has forces, it is the mean of each dataset's first error.
    """
    forces = [row["forces_meV_per_A"] for row in errors.values() if "forces_meV_per_A" in row]
    values = forces or [next(iter(row.values())) for row in errors.values() if row]
    return sum(values) / len(values) if values else float("nan")


def table(rows: dict[str, Errors]) -> str:
    """Return a Markdown table with a row per model and a column per dataset and error.

    Args:
        rows: errors by name of the model; all on the same datasets.
    """
    columns = [(name, kind) for name, errors in next(iter(rows.values())).items() for kind in errors]
    cells = ([model, *(f"{errors[name][kind]:.4g}" for name, kind in columns)] for model, errors in rows.items())
    return markdown_table(["model", *(f"{name} {kind}" for name, kind in columns)], cells, numbers=True)
