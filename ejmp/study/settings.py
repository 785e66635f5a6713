"""What a study is asked to do: one frozen dataclass, the same for all of its processes; needs no torch."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from ejmp.catalog import CATALOG
from ejmp.data.store.durable import write_json
from ejmp.lock import locked
from ejmp.study import budget
from ejmp.study.budget import Budget

PLAN = "plan.json"
"""The file of a study that holds its settings."""
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


def timed(settings: StudySettings) -> str:
    """Return the dataset whose structures Table 2 times: QMOF as in the paper, or another one to fine-tune on."""
    return "qmof" if "qmof" in settings.downstream else settings.downstream[0]


def check_parts(parts: Sequence[Part], settings: StudySettings) -> None:
    """Raise ValueError if a part needs datasets of which --data has none."""
    for part in parts:
        kinds = [(MIX, settings.mix)] if part in ("table1", "fig2", "fig3") else []
        kinds += [(DOWNSTREAM, settings.downstream)] if part in ("table2", "fig3", "fig4") else []
        for known, found in kinds:
            if not found:
                raise ValueError(f"--data: {part} needs some of {', '.join(known)}, got {', '.join(settings.stores)}")


class Told(Protocol):
    """What a folder of runs was begun with."""

    def to_json(self) -> dict[str, Any]:
        """Return it, ready for JSON."""
        ...


def claim(folder: Path, settings: Told) -> None:
    """Make a folder that of a study, or check that it is that of a study with the same settings.

    Raises:
        ValueError: if its study has other settings, naming what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "plan.lock", wait=True):
        for problem in differences(folder, settings):
            raise ValueError(problem)
        if not (folder / PLAN).exists():
            write_json(folder / PLAN, settings.to_json())


def differences(folder: Path, settings: Told) -> list[str]:
    """Return a message if the study in a folder has other settings, naming what differs."""
    path = folder / PLAN
    if not path.exists():
        return []
    found = list(_differing(json.loads(path.read_text()), settings.to_json()))
    if not found:
        return []
    return [f"--run {folder} holds a study with other settings: {'; '.join(found)}; choose another folder"]


def _differing(have: dict[str, Any], want: dict[str, Any]) -> Iterator[str]:
    for name in sorted(have.keys() | want.keys()):
        a, b = have.get(name), want.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differing(a, b)
        elif a != b:
            yield f"{name} is {a!r} there and {b!r} here"
