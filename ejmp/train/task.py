"""Tasks: which labels of a dataset a head learns, in which normalisation, with which weights in the loss."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor

from ejmp.data.catalog import CATALOG, FINETUNING
from ejmp.data.info import DatasetInfo
from ejmp.data.sampling.batch import Batch
from ejmp.graph.structure import MAX_ATOMIC_NUMBER

FORCE_WEIGHT = 100.0
"""JMP's for fine-tuning on forces."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One dataset's head, normalisation and loss weights.

    A model's raw energy is (energy - linear reference - mean) / std. Its raw direct forces are forces / force_std; raw
    gradient forces are the negative gradient of the raw energy, so in units of std.

    Raises:
        ValueError: for a negative head or weight, or a std that is not positive.
    """

    name: str
    """Name of the dataset."""
    head: int = 0
    """Index of the model's head, from 0."""
    target: str = "energy"
    """Label the head predicts: "energy", or a name in `Batch.targets`."""
    linear_reference: Mapping[int, float] = field(default_factory=dict)
    """Energy by atomic number, in eV, which is subtracted for each atom. If there is one, the energy of a structure
    with another element counts as missing."""
    mean: float = 0.0
    """Mean of the target after subtracting the reference, in the target's unit."""
    std: float = 1.0
    """Standard deviation of the target after subtracting the reference, in the target's unit."""
    force_std: float = 1.0
    """Standard deviation of the force components, in eV/A."""
    unit: str = "eV"
    """Unit of the target."""
    energy_weight: float = 1.0
    """Weight of the target's error in the loss; 0: the target is not trained."""
    force_weight: float = 0.0
    """Weight of the forces' error in the loss; 0: forces are not trained."""
    forces: Literal["direct", "gradient"] | None = "direct"
    """How forces are predicted: by the force branch, as the energy's gradient, or (None) not at all."""

    def __post_init__(self) -> None:
        """Check the head, the weights and the deviations."""
        if self.head < 0:
            raise ValueError(f"Task {self.name}: head: expected 0 or more, got {self.head}")
        for name in ("energy_weight", "force_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"Task {self.name}: {name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("std", "force_std"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"Task {self.name}: {name}: expected a positive number, got {getattr(self, name)}")
        if self.forces not in ("direct", "gradient", None) or (self.force_weight and self.forces is None):
            raise ValueError(
                f'Task {self.name}: forces: expected "direct" or "gradient" (None only with force_weight 0), '
                f"got {self.forces!r}"
            )

    @classmethod
    def from_info(
        cls,
        info: DatasetInfo,
        *,
        head: int = 0,
        target: str = "energy",
        forces: Literal["direct", "gradient"] | None = "direct",
        force_weight: float = FORCE_WEIGHT,
    ) -> Self:
        """Make a task with the normalisation of a dataset's training split.

        Args:
            info: description of the dataset, with the statistics of its training split.
            head: index of the model's head.
            target: "energy", or another label of the dataset.
            forces: how forces are predicted. They are trained if the target is the energy and the dataset has forces.
            force_weight: weight of the forces' error in the loss.

        Raises:
            ValueError: if the dataset has no statistics of the target.
        """
        if target not in info.statistics:
            known = ", ".join(sorted(info.statistics)) or "none"
            raise ValueError(f"target: {info.name} has statistics of {known}, got {target!r}")
        statistics, energy = info.statistics[target], target == "energy"
        trained = energy and forces is not None and "forces" in info.statistics
        return cls(
            name=info.name,
            head=head,
            target=target,
            linear_reference=info.linear_reference if energy else {},
            mean=statistics.mean,
            std=statistics.std,
            force_std=info.statistics["forces"].std if trained else 1.0,
            unit=statistics.unit,
            force_weight=force_weight if trained else 0.0,
            forces=forces if trained else None,
        )


class Tasks(Sequence[Task]):
    """The tasks of a mix in the order of its dataset numbers; normalises whole batches, in float64.

    Args:
        tasks: at least one task, all of different names.

    Raises:
        ValueError: for no tasks, or two of one name.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        if not tasks:
            raise ValueError("tasks: expected one per dataset, got none")
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks: expected different names, got {', '.join(names)}")
        self.tasks = tuple(tasks)
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
            rows["reference"] = [_reference_row(task) for task in tasks]
            table = {name: torch.tensor(row, dtype=torch.float64, device=device) for name, row in rows.items()}
            table["head"] = torch.tensor([task.head for task in tasks], device=device)
            table["column"] = torch.tensor([self.targets.index(task.target) for task in tasks], device=device)
            self._tables[device] = table
        return self._tables[device]


def _reference_row(task: Task) -> list[float]:
    unknown = float("nan") if task.linear_reference else 0.0
    return [task.linear_reference.get(number, unknown) for number in range(MAX_ATOMIC_NUMBER + 1)]


def pretrain_tasks() -> Tasks:
    """Return JMP's four pre-training tasks: oc20, oc22, ani1x, transition1x, on heads 0 to 3.

    Their normalisation is that of energies less a linear reference, which comes with the data: put it in with
    `dataclasses.replace`.
    """
    rows = [(entry.name, entry.pretraining) for entry in CATALOG.values() if entry.pretraining is not None]
    return Tasks(
        [
            Task(name=name, head=head, std=row.energy_std, force_std=row.force_std, force_weight=row.force_weight)
            for head, (name, row) in enumerate(rows)
        ]
    )


def finetune_task(name: str) -> Task:
    """Return a fine-tuning task with JMP's normalisation, on head 0; those on forces have gradient forces.

    Args:
        name: "aspirin", "ac_ala3_nhme", "solvated_amino_acids", "qm9_u0" (less a linear reference, which comes with
            the data) or "qmof_gap".

    Raises:
        ValueError: if there is no such task.
    """
    if name not in FINETUNING:
        raise ValueError(f"name: expected one of {', '.join(FINETUNING)}, got {name!r}")
    row = FINETUNING[name]
    if row.force_std is None:
        return Task(name=name, target=row.target, mean=row.mean, std=row.std, forces=None)
    return Task(
        name=name,
        target=row.target,
        mean=row.mean,
        std=row.std,
        force_std=row.force_std,
        force_weight=FORCE_WEIGHT,
        forces="gradient",
    )
