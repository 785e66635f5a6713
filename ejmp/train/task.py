"""The tasks of a mix, which normalise whole batches. `ejmp.model.task` says what a task is."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ejmp.data.sampling.batch import Batch
from ejmp.model.task import Task, finetune_task, pretrain_tasks

__all__ = ["Task", "Tasks", "finetune_task", "pretrain_tasks"]


class Tasks(Sequence[Task]):
    """The tasks of a mix in the order of its dataset numbers; normalises whole batches, in float64.

    Args:
        tasks: at least one task, all of different names.

    Raises:
        ValueError: for no tasks, two of one name, or two that average the loss of forces differently.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        if not tasks:
            raise ValueError("tasks: expected one per dataset, got none")
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks: expected different names, got {', '.join(names)}")
        means = {task.force_mean for task in tasks if task.force_weight}
        if len(means) > 1:
            raise ValueError("tasks: expected one force_mean, got structures and atoms")
        self.tasks = tuple(tasks)
        self.force_mean = means.pop() if means else "structures"
        """Over what the loss of the forces is averaged; see `Task.force_mean`."""
        self.targets = sorted({task.target for task in tasks})
        self._tables: dict[torch.device, dict[str, Tensor]] = {}

    def __getitem__(self, index: int) -> Task:  # type: ignore[override] # slices are of no use here
        return self.tasks[index]

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def of(self, batch: Batch, name: str) -> Tensor:
        """Return a number of each structure's task, [B] float64 (for "head" int64).

        Args:
            batch: structures whose dataset numbers are below the number of tasks.
            name: name of a number in `Task`, or "raw_force": one unit of the raw forces, in eV/A.
        """
        return self._table(batch.dataset.device)[name][batch.dataset]

    def reference(self, batch: Batch) -> Tensor:
        """Return each structure's linear reference, summed over its atoms, [B] float64, in eV."""
        graph = batch.graph
        dataset = batch.dataset[graph.batch]
        per_atom = self._table(batch.dataset.device)["reference"][dataset, graph.atomic_numbers]
        return per_atom.new_zeros(graph.num_structures).index_add_(0, graph.batch, per_atom)

    def raw_energy(self, batch: Batch) -> Tensor:
        """Return each structure's normalised target, which its head should predict, [B] float64; NaN where missing."""
        columns = torch.full_like(batch.energy, torch.nan).repeat(len(self.targets), 1)
        for row, name in zip(columns, self.targets, strict=True):
            found = batch.energy if name == "energy" else batch.targets.get(name)
            if found is not None:
                row.copy_(found)
        label = columns.gather(0, self.of(batch, "column")[None])[0]
        return (label - self.reference(batch) - self.of(batch, "mean")) / self.of(batch, "std")

    def energy(self, raw: Tensor, batch: Batch) -> Tensor:
        """Return raw predictions [B] of the tasks' own heads in the unit of each target, [B] float64."""
        return raw.double() * self.of(batch, "std") + self.of(batch, "mean") + self.reference(batch)

    def forces(self, raw: Tensor, batch: Batch) -> Tensor:
        """Return raw forces [N, 3], direct or gradient, in eV/A, [N, 3] float64."""
        return raw.double() * self.of(batch, "raw_force")[batch.graph.batch, None]

    def own_energy(self, energy: Tensor, batch: Batch) -> Tensor:
        """Select from energies of all heads [B, T] those of each structure's task, [B].

        Raises:
            ValueError: if there are fewer heads than a task needs, or no row per structure.
        """
        self._check_heads(energy, (batch.graph.num_structures,), "energy")
        return energy.gather(1, self.of(batch, "head")[:, None])[:, 0]

    def own_forces(self, forces: Tensor, batch: Batch) -> Tensor:
        """Select from forces of all heads [N, T, 3] those of each atom's task, [N, 3].

        Forces of shape [N, 3], such as gradient forces, are taken to be those of each atom's task already.

        Raises:
            ValueError: if there are fewer heads than a task needs, or no row per atom.
        """
        if forces.shape == (batch.graph.num_atoms, 3):
            return forces
        self._check_heads(forces[..., 0], (batch.graph.num_atoms,), "forces")
        head = self.of(batch, "head")[batch.graph.batch]
        return forces.gather(1, head[:, None, None].expand(-1, 1, 3))[:, 0]

    def _check_heads(self, value: Tensor, rows: tuple[int], name: str) -> None:
        heads = 1 + max(task.head for task in self.tasks)
        if value.ndim != 2 or value.shape[:1] != rows or value.shape[1] < heads:
            raise ValueError(f"{name}: expected [{rows[0]}, T, ...] with T of at least {heads}, got {[*value.shape]}")

    def _table(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self._tables:
            tasks = self.tasks
            rows: dict[str, Any] = {
                name: [float(getattr(task, name)) for task in tasks]
                for name in ("mean", "std", "force_std", "energy_weight", "force_weight")
            }
            rows["raw_force"] = [task.std if task.forces == "gradient" else task.force_std for task in tasks]
            rows["reference"] = [task.reference_row() for task in tasks]
            table = {name: torch.tensor(row, dtype=torch.float64, device=device) for name, row in rows.items()}
            table["head"] = torch.tensor([task.head for task in tasks], device=device)
            table["column"] = torch.tensor([self.targets.index(task.target) for task in tasks], device=device)
            self._tables[device] = table
        return self._tables[device]
