"""The multi-task loss of JMP's pre-training and fine-tuning."""

import torch
from torch import Tensor

from ejmp.compress.losses import Losses
from ejmp.data.sampling.batch import Batch
from ejmp.train.task import Tasks

FORCE_OFFSET = 1e-6
"""Number that is added to each component of the difference of forces, in units of force_std, as upstream does."""


def multitask_loss(energy: Tensor, forces: Tensor | None, batch: Batch, tasks: Tasks) -> Losses:
    """Compare a model's raw outputs with a batch's labels (JMP, arXiv 2310.16802).

    Each structure is compared by its own task's head, in normalised units: the energy by its absolute error, the forces
    by the L2 norm of each atom's error, averaged over the structure's atoms, both times the task's weights. Each is
    then averaged over the structures of the batch that have the label. Where the tasks' `force_mean` is "atoms", as in
    fine-tuning, the forces are averaged over all atoms of the batch at once. Fixed atoms count like all others; only
    metrics leave them out, as upstream.

    Args:
        energy: raw energies of all heads, [B, T].
        forces: raw forces, direct or gradient, of all heads [N, T, 3] or of each atom's own task [N, 3]; None if no
            task trains forces.
        batch: labels, NaN where missing; a missing label adds nothing to the loss and zeros to the gradients.
        tasks: tasks by dataset number.

    Returns:
        Losses with the parts "energy" and (if forces are predicted) "forces". The total is 0 without any label.

    Raises:
        ValueError: if a head that a task needs is missing, or forces are.
    """
    if forces is None and any(task.force_weight for task in tasks):
        name = next(task.name for task in tasks if task.force_weight)
        raise ValueError(f"forces: task {name} trains forces, got None")
    predicted = tasks.own_energy(energy, batch)
    weight = tasks.of(batch, "energy_weight")
    label = tasks.raw_energy(batch)
    known = ~label.isnan() & (weight > 0)
    difference = torch.where(known, predicted - label, 0.0)
    total = _mean(difference.abs() * weight, known)
    parts = {"energy": total.detach()}
    if forces is not None:
        force_loss = _force_loss(tasks.own_forces(forces, batch), batch, tasks)
        parts["forces"] = force_loss.detach()
        total = total + force_loss
    return Losses(total=total.to(torch.promote_types(energy.dtype, torch.float32)), parts=parts)


def _force_loss(predicted: Tensor, batch: Batch, tasks: Tasks) -> Tensor:
    atoms = batch.graph.batch
    weight = tasks.of(batch, "force_weight")
    known = batch.has_forces & (weight > 0)[atoms]
    error = tasks.forces(predicted, batch) - batch.forces
    scaled = error / tasks.of(batch, "force_std")[atoms, None] + FORCE_OFFSET
    norm = torch.where(known[:, None], scaled, 1.0).norm(dim=1) * known
    if tasks.force_mean == "atoms":
        return _mean(norm * weight[atoms], known)
    zeros = norm.new_zeros(batch.graph.num_structures)
    count = zeros.index_add(0, atoms, known.to(zeros.dtype))
    per_structure = zeros.index_add(0, atoms, norm) / count.clamp_min(1)
    return _mean(per_structure * weight, count > 0)


def _mean(values: Tensor, known: Tensor) -> Tensor:
    return values.sum() / known.sum().clamp_min(1)
