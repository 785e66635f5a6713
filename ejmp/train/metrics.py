"""Mean absolute errors per task, as sums that ranks can add up."""

import torch
from torch import Tensor

from ejmp.data.sampling.batch import Batch
from ejmp.train.task import Tasks

ENERGY, ENERGY_PER_ATOM, STRUCTURES, FORCES, COMPONENTS = range(5)
"""Columns of `Maes.sums`."""


class Maes:
    """Mean absolute errors: sums over batches, which ranks add up by an all_reduce of `sums`."""

    def __init__(self, tasks: Tasks, device: torch.device | str = "cpu") -> None:
        self.tasks = tasks
        self.sums = torch.zeros(len(tasks), 5, dtype=torch.float64, device=device)
        """Sums by task, [tasks, 5]: absolute errors of the target, these per atom, number of structures, absolute
        errors of force components, number of components."""

    @torch.no_grad()
    def update(self, energy: Tensor, forces: Tensor | None, batch: Batch) -> None:
        """Add the errors on a batch. Missing labels are left out, and the forces on fixed atoms.

        Args:
            energy: raw energies of all heads, [B, T].
            forces: raw forces of all heads [N, T, 3] or of each atom's own task [N, 3]; None if they are not
                predicted.
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
        """Return the mean errors by task and name.

        The names are "energy_meV" and "energy_meV_per_atom", or another target with its unit, and "forces_meV_per_A".
        Errors of labels that no structure has, or that the task does not train, are left out. A NaN prediction makes
        its mean NaN.
        """
        found: dict[str, dict[str, float]] = {}
        for task, row in zip(self.tasks, self.sums.tolist(), strict=True):
            means = found[task.name] = {}
            if row[STRUCTURES] and task.energy_weight:
                mean = row[ENERGY] / row[STRUCTURES]
                if task.target == "energy":
                    means["energy_meV"] = 1000 * mean
                    means["energy_meV_per_atom"] = 1000 * row[ENERGY_PER_ATOM] / row[STRUCTURES]
                else:
                    means["_".join(filter(None, (task.target, task.unit)))] = mean
            if row[COMPONENTS] and task.forces is not None:
                means["forces_meV_per_A"] = 1000 * row[FORCES] / row[COMPONENTS]
        return found
