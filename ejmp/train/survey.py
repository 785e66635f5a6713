"""Block relevance on the embedded datasets, one by one."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from ejmp.data.batch import Batch, make_batch
from ejmp.data.embedded import DEMO_GRAPHS, DEMO_MIX, demo
from ejmp.model import JMP, Output
from ejmp.relevance import block_relevance, magnitude
from ejmp.train.loss import multitask_loss
from ejmp.train.task import Task, Tasks


def survey(
    model: JMP, names: Sequence[str], *, structures: int = 32, batch_size: int = 4, labels: bool = False
) -> dict[str, dict[str, list[float]]]:
    """Score the blocks of a model on validation structures of embedded datasets.

    Args:
        model: whose heads are in the order of `DEMO_MIX`, or one for all.
        names: of embedded datasets.
        structures: of each at most.
        batch_size: does not change the scores.
        labels: take the loss of energies and direct forces on labels, the paper's choice, instead of the sum of
            the magnitudes of all heads.

    Returns:
        By dataset: "energy", "forces" (if the model has that branch) and "combined", [blocks + 1] each.

    Raises:
        ValueError: if there is no such dataset.
    """
    found = {}
    for name in names:
        head = DEMO_MIX.index(name) if name in DEMO_MIX and model.config.num_tasks >= len(DEMO_MIX) else 0
        forces = "direct" if model.config.direct_forces else None
        tasks = Tasks([Task.from_info(demo(name, "val").info, head=head, forces=forces)])

        def on_labels(output: Output, batch: Batch, tasks: Tasks = tasks) -> Tensor:
            return multitask_loss(output.energy, output.forces, batch, tasks).total * batch.graph.num_structures

        batches = _batches(model, name, structures, batch_size)
        scores = block_relevance(model, batches, loss=on_labels if labels else magnitude)
        branches = {"energy": scores.energy, "forces": scores.forces, "combined": scores.combined}
        found[name] = {branch: values.tolist() for branch, values in branches.items() if values is not None}
    return found


def _batches(model: JMP, name: str, structures: int, batch_size: int) -> Iterator[Batch]:
    data = demo(name, "val")
    cutoff, most = DEMO_GRAPHS.get(name, (12.0, 30))
    count = min(structures, len(data))
    for first in range(0, count, batch_size):
        items = [data[i] for i in range(first, min(first + batch_size, count))]
        batch = make_batch(items, [0] * len(items), cutoff=cutoff, max_neighbors=most, dtype=model.dtype)
        yield batch.to(model.device)
