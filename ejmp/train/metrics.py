"""Mean absolute errors per task, as sums that ranks can add up."""

import torch
from torch import Tensor

from ejmp.data.sampling.batch import Batch
from ejmp.train.task import Tasks

ENERGY, ENERGY_PER_ATOM, STRUCTURES, FORCES, COMPONENTS = range(5)
"""Columns of `Maes.sums`."""


class Maes:
    """Absolute errors added up over batches, and over ranks by an all_reduce (sum) of `sums`."""

    def __init__(self, tasks: Tasks, device: torch.device | str = "cpu") -> None:
        self.tasks = tasks
        self.sums = torch.zeros(len(tasks), 5, dtype=torch.float64, device=device)
        """[tasks, 5]: errors of the target, the same per atom, structures, errors of force components, components."""

    @torch.no_grad()
    def update(self, energy: Tensor, forces: Tensor | None, batch: Batch) -> None:
        """Add a batch. Missing labels are left out, and fixed atoms from the forces.

        Args:
            energy: [B, T], raw.
            forces: [N, T, 3] or those of each atom's own task [N, 3], raw; None if they are not predicted.
            batch: labels.
        """
        tasks, graph = self.tasks, batch.graph
        label = tasks.raw_energy(batch)
        known = ~label.isnan()
        error = (tasks.own_energy(energy, batch).double() - label).abs() * tasks.of(batch, "std")
        self._add(ENERGY, batch.dataset[known], error[known])
        self._add(ENERGY_PER_ATOM, batch.dataset[known], (error / graph.ptr.diff())[known])
        self._add(STRUCTURES, batch.dataset[known], torch.ones_like(error[known]))
        if forces is None:
            return
        free = batch.has_forces & ~batch.fixed
        dataset = batch.dataset[graph.batch[free]]
        difference = tasks.forces(tasks.own_forces(forces, batch), batch) - batch.forces
        errors = difference[free].abs().sum(1)
        self._add(FORCES, dataset, errors)
        self._add(COMPONENTS, dataset, torch.full_like(errors, 3))

    def _add(self, column: int, dataset: Tensor, values: Tensor) -> None:
        self.sums[:, column].index_add_(0, dataset, values)

    def result(self) -> dict[str, dict[str, float]]:
        """Return by task "energy_meV" and "energy_meV_per_atom", or the target and its unit, and "forces_meV_per_A".

        What no structure was labelled with is left out. A NaN prediction makes its mean NaN.
        """
        found: dict[str, dict[str, float]] = {}
        for task, row in zip(self.tasks, self.sums.tolist(), strict=True):
            means = found[task.name] = {}
            if row[STRUCTURES]:
                mean = row[ENERGY] / row[STRUCTURES]
                if task.target == "energy":
                    means["energy_meV"] = 1000 * mean
                    means["energy_meV_per_atom"] = 1000 * row[ENERGY_PER_ATOM] / row[STRUCTURES]
                else:
                    means[f"{task.target}_{task.unit}"] = mean
            if row[COMPONENTS] and task.forces is not None:
                means["forces_meV_per_A"] = 1000 * row[FORCES] / row[COMPONENTS]
        return found
