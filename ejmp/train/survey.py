"""Block relevance on each dataset of a mix."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from ejmp.compress.relevance import block_relevance, magnitude
from ejmp.data.sampling.batch import Batch, make_batch
from ejmp.model.jmp import JMP, Output
from ejmp.train.loss import multitask_loss
from ejmp.train.sources import TaskData
from ejmp.train.task import Tasks


def survey(
    model: JMP, sources: Sequence[TaskData], *, structures: int = 32, batch_size: int = 4, labels: bool = False
) -> dict[str, dict[str, list[float]]]:
    """Score the blocks of a model on validation structures of each source.

    Args:
        model: model with a head for each source's task.
        sources: datasets with a split "val".
        structures: largest number of structures to take of each dataset.
        batch_size: number of structures per batch, which does not change the scores.
        labels: whether to take the loss of energies and direct forces on labels, the paper's choice; otherwise the
            loss is the sum of the magnitudes of all heads.

    Returns:
        Scores by dataset and branch: "energy", "forces" (if the model has that branch) and "combined", each
        [blocks + 1].
    """
    found = {}
    for source in sources:
        tasks = Tasks([source.task])

        def on_labels(output: Output, batch: Batch, tasks: Tasks = tasks) -> Tensor:
            return multitask_loss(output.energy, output.forces, batch, tasks).total * batch.graph.num_structures

        batches = _batches(model, source, structures, batch_size)
        scores = block_relevance(model, batches, loss=on_labels if labels else magnitude)
        branches = {"energy": scores.energy, "forces": scores.forces, "combined": scores.combined}
        found[source.name] = {branch: values.tolist() for branch, values in branches.items() if values is not None}
    return found


def _batches(model: JMP, source: TaskData, structures: int, batch_size: int) -> Iterator[Batch]:
    data = source.split("val")
    count = min(structures, len(data))
    for first in range(0, count, batch_size):
        items = [data[i] for i in range(first, min(first + batch_size, count))]
        yield make_batch(items, [0] * len(items), settings=source.task.graph, dtype=model.dtype).to(model.device)
