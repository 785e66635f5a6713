"""What a study is asked to do: one frozen dataclass, the same for all of its processes; needs no torch."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ejmp.catalog import CATALOG
from ejmp.data.store.durable import written
from ejmp.study import budget
from ejmp.study.budget import Budget

Part = Literal["table1", "table2", "fig2", "fig3", "fig4"]
PARTS: tuple[Part, ...] = get_args(Part)
"""Tables and figures of the paper that a study can make."""
MIX = tuple(name for name, entry in CATALOG.items() if entry.pretraining is not None)
"""Datasets that a teacher is pre-trained on, the columns of Table 1."""
DOWNSTREAM = tuple(name for name, entry in CATALOG.items() if entry.finetuning)
"""Datasets that models are fine-tuned on."""


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """A study: its data and teacher, and how much work it takes.

    Raises:
        ValueError: for a number of seeds below 1, data without a teacher or a teacher's name that means nothing here.
    """

    teacher: str | None
    """What `ejmp.load` reads; None: the demo teacher."""
    data: str | None
    """Record stores, as "NAME=FOLDER,..."; None: the demo data."""
    seeds: int
    """Seeds of each distillation."""
    finetune_seeds: int
    """Seeds of each fine-tuning run."""
    budget: Budget
    """Lengths of the runs."""

    def __post_init__(self) -> None:
        """Check the settings against each other."""
        for name in ("seeds", "finetune_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected 1 or more, got {getattr(self, name)}")
        if self.data is not None and self.teacher is None:
            raise ValueError("--teacher: expected a model that was trained on the data of --data, got none")
        for item in self.stores.items():
            _check_store(*item)

    @property
    def demo(self) -> bool:
        """Whether the data is the demo's."""
        return self.data is None

    @property
    def stores(self) -> dict[str, str]:
        """Folders of the record stores by name of the dataset."""
        items = [item.partition("=") for item in (self.data or "").split(",") if item]
        return {name: folder for name, _, folder in items}

    @property
    def mix(self) -> tuple[str, ...]:
        """Datasets of Table 1, in the order of its columns."""
        return MIX if self.demo else tuple(name for name in MIX if name in self.stores)

    @property
    def downstream(self) -> tuple[str, ...]:
        """Datasets of Figures 3 and 4."""
        return DOWNSTREAM if self.demo else tuple(name for name in DOWNSTREAM if name in self.stores)

    def to_json(self) -> dict[str, Any]:
        """Return the settings, ready for JSON."""
        return dataclasses.asdict(self)


def _check_store(name: str, folder: str) -> None:
    if name not in CATALOG:
        raise ValueError(f"--data: expected some of {', '.join(CATALOG)}, got {name!r}")
    if not folder:
        raise ValueError(f"--data: expected NAME=FOLDER,..., got {name!r}")


def make_settings(
    *,
    teacher: Path | None,
    data: str | None,
    seeds: int | None,
    finetune_seeds: int | None,
    changes: dict[str, Any],
) -> StudySettings:
    """Return settings with the defaults of the demo data, or of real data if there is some.

    Args:
        teacher: saved model; None: the demo teacher.
        data: record stores; None: the demo data.
        seeds: seeds of each distillation; None: the default.
        finetune_seeds: seeds of each fine-tuning run; None: the default.
        changes: lengths of the runs that were asked for, by the name of a field of `Budget`; None: the default.
    """
    usual = budget.DEMO if data is None else budget.FULL
    lengths = {name: value for name, value in changes.items() if value is not None}
    seeds = seeds if seeds is not None else budget.SEEDS
    return StudySettings(
        teacher=None if teacher is None else str(teacher),
        data=data,
        seeds=seeds,
        finetune_seeds=finetune_seeds if finetune_seeds is not None else budget.FINETUNE_SEEDS,
        budget=dataclasses.replace(usual, **lengths),
    )


def claim(folder: Path, settings: StudySettings) -> None:
    """Make a folder that of a study, or check that it is that of a study with the same settings.

    Raises:
        ValueError: if its study has other settings, naming what differs.
    """
    path = folder / "plan.json"
    wanted = settings.to_json()
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with written(path) as temporary:
            temporary.write_text(json.dumps(wanted, indent=1) + "\n")
        return
    differences = list(_differences(json.loads(path.read_text()), wanted))
    if differences:
        raise ValueError(f"--run {folder} holds a study with other settings: {'; '.join(differences)}; choose another")


def _differences(have: dict[str, Any], want: dict[str, Any]) -> list[str]:
    found = []
    for name in sorted(have.keys() | want.keys()):
        a, b = have.get(name), want.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b)
        elif a != b:
            found.append(f"{name} is {a!r} there and {b!r} here")
    return found
