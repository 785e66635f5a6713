"""What the runs of a study start from: the teacher and the datasets, with their tasks."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ejmp.catalog import CATALOG, Finetuning
from ejmp.model.checkpoint import load
from ejmp.model.jmp import JMP
from ejmp.study.settings import StudySettings
from ejmp.train.demo import demo_teacher
from ejmp.train.distributed import Ranks
from ejmp.train.recipes import finetuning_data, recipe_graph
from ejmp.train.sources import (
    Splits,
    TaskData,
    at_most,
    demo_downstream,
    demo_mix,
    from_stores,
    with_graph,
    with_tasks_of,
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The teacher and the data of a study."""

    settings: StudySettings
    """Settings that name them."""
    folder: Path
    """Folder of the study."""
    ranks: Ranks
    """This process."""

    def teacher_path(self) -> Path:
        """Return where the teacher is."""
        return demo_teacher() if self.settings.teacher is None else Path(self.settings.teacher)

    def teacher(self) -> JMP:
        """Return the teacher as it was saved, a model of its own for each call."""
        return load(self.teacher_path())

    def mix(self, teacher: JMP) -> list[TaskData]:
        """Return the pre-training datasets with the teacher's heads for them, and as much to validate on as is used."""
        sources = with_tasks_of(self.teacher_path(), self.open_mix(self.settings.mix), teacher)
        most = self.settings.budget.val_structures
        return [at_most(source, "val", most) if "val" in source.splits else source for source in sources]

    def open_mix(self, names: Sequence[str]) -> Sequence[Splits]:
        """Return some of the pre-training datasets, whose tasks are still to be chosen."""
        if self.settings.demo:
            return [source for source in demo_mix() if source.name in names]
        return from_stores(",".join(f"{name}={self.settings.stores[name]}" for name in names))

    def downstream(self, name: str, start: JMP | None) -> TaskData:
        """Return a dataset to fine-tune on, with JMP's task for it and the graphs for the model it starts from."""
        if self.settings.demo:
            return demo_downstream(name)
        recipe = recipe_for(name)
        (stores,) = from_stores(f"{name}={self.settings.stores[name]}")
        return with_graph(finetuning_data(stores, recipe=recipe), start=start, known=recipe_graph(recipe))


def recipe_for(name: str) -> Finetuning:
    """Return JMP's recipe for the task of the paper on a dataset."""
    return CATALOG[name].finetuning[0]
