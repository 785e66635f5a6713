"""Tasks: what the heads of a model predict, and of which graphs. They are saved with the model."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

from ejmp.catalog import CATALOG, FINETUNING
from ejmp.graph.settings import GraphSettings
from ejmp.graph.structure import MAX_ATOMIC_NUMBER
from ejmp.model.config import JMPConfig

FORCE_WEIGHT = 100.0
"""JMP's for fine-tuning on forces."""


class Described(Protocol):
    """A dataset's description as far as a task needs it: see `ejmp.data.info.DatasetInfo`."""

    @property
    def name(self) -> str:
        """Name of the dataset."""
        ...

    @property
    def linear_reference(self) -> Mapping[int, float]:
        """Energy by atomic number, eV, subtracted for each atom."""
        ...

    @property
    def statistics(self) -> Mapping[str, Any]:
        """Mean, standard deviation and unit of each label in the training split."""
        ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one head of a model predicts: of which dataset, in which unit and normalisation, of which graphs.

    A model's raw energy is (energy - linear reference - mean) / std. Its raw direct forces are forces / force_std; raw
    gradient forces are the negative gradient of the raw energy, so in units of std. A task that trains gradient forces
    alone (`energy_weight` 0) has std = force_std, as JMP compares them; its energy is then the potential of the forces
    up to a constant.

    Raises:
        ValueError: for a negative head or weight, or a std that is not positive.
    """

    name: str
    """Name of the dataset."""
    head: int = 0
    """Index of the model's head, from 0."""
    target: str = "energy"
    """Label the head predicts: "energy", or a name in `Batch.targets`."""
    linear_reference: Mapping[int, float] | None = field(default_factory=dict)
    """Energy by atomic number, in eV, which is subtracted for each atom. If there is one, the energy of a structure
    with another element counts as missing. Empty: nothing is subtracted. None: something was, but the model's file does
    not say what (JMP's published checkpoint), so that its energies have an unknown zero for each element."""
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
    force_mean: Literal["structures", "atoms"] = "structures"
    """Over what the loss of the forces is averaged: over the atoms of each structure and then over these (JMP's
    pre-training), or over all atoms of a batch (JMP's fine-tuning)."""
    forces: Literal["direct", "gradient"] | None = "direct"
    """How forces are predicted: by the force branch, as the energy's gradient, or (None) not at all."""
    graph: GraphSettings = field(default_factory=GraphSettings)
    """How graphs are made of the dataset's structures."""

    def __post_init__(self) -> None:
        """Check the head, the weights and the deviations."""
        if self.head < 0:
            raise ValueError(f"Task {self.name}: head: expected 0 or more, got {self.head}")
        for name in ("energy_weight", "force_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"Task {self.name}: {name}: expected 0 or more, got {getattr(self, name)}")
        if self.force_mean not in ("structures", "atoms"):
            raise ValueError(f'Task {self.name}: force_mean: expected "structures" or "atoms", got {self.force_mean!r}')
        for name in ("std", "force_std"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"Task {self.name}: {name}: expected a positive number, got {getattr(self, name)}")
        if self.forces not in ("direct", "gradient", None) or (self.force_weight and self.forces is None):
            raise ValueError(
                f'Task {self.name}: forces: expected "direct" or "gradient" (None only with force_weight 0), '
                f"got {self.forces!r}"
            )

    def reference_row(self) -> list[float]:
        """Return the reference energy by atomic number, [121], eV: NaN for elements it lacks, 0 if there is none."""
        reference = self.linear_reference or {}
        lacking = float("nan") if reference else 0.0
        return [reference.get(number, lacking) for number in range(MAX_ATOMIC_NUMBER + 1)]

    @classmethod
    def from_info(
        cls,
        info: Described,
        *,
        head: int = 0,
        target: str = "energy",
        forces: Literal["direct", "gradient"] | None = "direct",
        force_weight: float = FORCE_WEIGHT,
        graph: GraphSettings | None = None,
    ) -> Self:
        """Make a task with the normalisation of a dataset's training split.

        Args:
            info: description of the dataset, with the statistics of its training split.
            head: index of the model's head.
            target: "energy", or another label of the dataset.
            forces: how forces are predicted. They are trained if the target is the energy and the dataset has forces.
            force_weight: weight of the forces' error in the loss.
            graph: how graphs are made of its structures; None: as `GraphSettings` does by default.

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
            graph=graph or GraphSettings(),
        )


def check_tasks(tasks: Iterable[Task], config: JMPConfig) -> tuple[Task, ...]:
    """Return a model's tasks, after checking that it has a head for each.

    Raises:
        ValueError: for two tasks of one name, a head that the model lacks, or direct forces without a force branch.
    """
    checked = tuple(tasks)
    names = [task.name for task in checked]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks: expected different names, got {', '.join(names)}")
    for task in checked:
        if task.head >= config.num_tasks:
            raise ValueError(f"tasks: {task.name} needs head {task.head}, the model has {config.num_tasks}")
        if task.forces == "direct" and not config.direct_forces:
            raise ValueError(f"tasks: {task.name} has direct forces, the model has no force branch")
    return checked


def tasks_text(tasks: Sequence[Task]) -> str:
    """Return the JSON text that keeps tasks, which `read_tasks` reads."""
    return json.dumps([dataclasses.asdict(task) for task in tasks], indent=1) + "\n"


def read_tasks(text: str) -> tuple[Task, ...]:
    """Return the tasks that a text keeps.

    Raises:
        ValueError: if the text is damaged, or says something impossible.
    """
    try:
        return tuple(_read_task(row) for row in json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a list of tasks: {error}") from error


def _read_task(row: dict[str, Any]) -> Task:
    reference = row.pop("linear_reference")
    reference = None if reference is None else {int(number): float(value) for number, value in reference.items()}
    graph = row.pop("graph", None)
    if graph is None:  # files of ejmp 0.1 before there were graph settings
        graph = {"cutoff": row.pop("cutoff"), "max_neighbors": row.pop("max_neighbors")}
    return Task(linear_reference=reference, graph=GraphSettings.from_json(graph), **row)


def pretrain_tasks() -> tuple[Task, ...]:
    """Return JMP's four pre-training tasks: oc20, oc22, ani1x, transition1x, on heads 0 to 3.

    Their normalisation is that of energies less a linear reference, which comes with the data: put it in with
    `dataclasses.replace`. Until then it is None, unknown.
    """
    rows = [(entry, entry.pretraining) for entry in CATALOG.values() if entry.pretraining is not None]
    return tuple(
        Task(
            name=entry.name,
            head=head,
            linear_reference=None,
            std=row.energy_std,
            force_std=row.force_std,
            force_weight=row.force_weight,
            graph=entry.graph,
        )
        for head, (entry, row) in enumerate(rows)
    )


def finetune_task(name: str) -> Task:
    """Return a fine-tuning task with JMP's losses and normalisation, on head 0; those on forces have gradient forces.

    Args:
        name: "aspirin", "ac_ala3_nhme", "solvated_amino_acids", "qm9_u0" or "qmof_gap". The linear reference of qm9_u0
            comes with the data: put it in with `dataclasses.replace`. Until then it is None, unknown.

    Raises:
        ValueError: if there is no such task.
    """
    if name not in FINETUNING:
        raise ValueError(f"name: expected one of {', '.join(FINETUNING)}, got {name!r}")
    row = FINETUNING[name]
    force_std = row.force_std
    return Task(
        name=name,
        target=row.target,
        linear_reference=None if row.has_reference else {},
        mean=row.mean,
        std=row.std if force_std is None or row.energy_weight else force_std,
        force_std=1.0 if force_std is None else force_std,
        unit=row.unit,
        energy_weight=row.energy_weight,
        force_weight=row.force_weight,
        force_mean="atoms",
        forces=None if force_std is None else "gradient",
        graph=next(entry.graph for entry in CATALOG.values() if row in entry.finetuning),
    )
