"""A dry run: every input of a study is checked, and its plan shown with the time it takes, before anything starts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ejmp.markdown import markdown_table
from ejmp.model.jmp import JMP
from ejmp.model.task import Task
from ejmp.study.cost import GRADIENT_FORCES, SAMPLE, TRAINING, Costs
from ejmp.study.inputs import Inputs
from ejmp.study.plan import BLOCKS, RunSpec, plan
from ejmp.study.record import is_finished
from ejmp.study.settings import Part, StudySettings, differences, timed
from ejmp.train.distributed import Ranks
from ejmp.train.sources import Split, TaskData

ALONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
"""This process, which is part of no group."""


@dataclass(kw_only=True)
class Checked:
    """The inputs of a study that could be opened, and what is wrong with the others."""

    teacher: JMP | None = None
    """The teacher; None if it cannot be loaded."""
    sources: dict[str, TaskData] = field(default_factory=dict)
    """Datasets by name."""
    problems: list[str] = field(default_factory=list)
    """One message for each bad input."""


def dry_run(folder: Path, parts: Sequence[Part], settings: StudySettings, tflops: float) -> tuple[str, list[str]]:
    """Check the inputs of a study and return its plan as text, and a message for each bad input; write nothing.

    Args:
        folder: folder of the study, which need not exist.
        parts: tables and figures that are asked for.
        settings: of the study.
        tflops: rate to estimate times with, 10^12 operations per second.
    """
    runs = plan(parts, settings)
    found = check_inputs(folder, runs, settings)
    if found.problems or found.teacher is None:
        return "", found.problems
    costs = Costs(settings, found.teacher, found.sources)
    rows, total = [], 0.0
    for spec in runs:
        cost = costs.of(spec)
        done = is_finished(folder, spec.name)
        hours = 0.0 if done else cost.hours(tflops)
        total += hours
        steps = "-" if cost.steps is None else f"{cost.steps:,}"
        rows.append([spec.name, spec.kind, steps, "finished" if done else f"{hours:.3g}"])
    rows.append([f"{len(runs)} runs", "", "", f"{total:.3g}"])
    table = markdown_table(["run", "kind", "steps", "GPU hours"], rows, numbers=True)
    return (
        f"{table}\n\n{_assumptions(tflops)}\n{len(found.sources)} datasets and the teacher are as they should be.",
        [],
    )


def _assumptions(tflops: float) -> str:
    return (
        f"GPU hours: estimated at {tflops:g} x 10^12 operations per second (--tflops), 2 per multiply-add, counted on "
        f"{SAMPLE} structures of each dataset; training is {TRAINING} x its forward pass, gradient forces are "
        f"{GRADIENT_FORCES} x energies, a distillation has its teacher's forward pass besides, validations are counted."
    )


def check_inputs(folder: Path, runs: Sequence[RunSpec], settings: StudySettings) -> Checked:
    """Open the teacher and all datasets that some runs need.

    Args:
        folder: folder of the study.
        runs: its runs.
        settings: of the study.
    """
    found = Checked(problems=differences(folder, settings))
    inputs = Inputs(settings, folder, ALONE)
    try:
        found.teacher = inputs.teacher()
    except (ValueError, OSError) as error:
        found.problems.append(f"--teacher {settings.teacher or 'of the demo'}: {error}")
    else:
        found.problems += _teacher_problems(settings, found.teacher)
    for name, splits in splits_needed(runs, settings).items():
        try:
            source = _open(name, inputs, found.teacher)
        except (ValueError, OSError) as error:
            found.problems.append(f"--data {name}: {error}")
            continue
        found.sources[name] = source
        found.problems += [f"--data {name}: {text}" for text in _problems(source, splits, found.teacher)]
    return found


def _teacher_problems(settings: StudySettings, teacher: JMP) -> Iterator[str]:
    where = f"--teacher {settings.teacher}"
    if teacher.config.blocks != BLOCKS:
        yield f"{where}: expected {BLOCKS} interaction blocks, got {teacher.config.blocks}"
    if not teacher.config.direct_forces:
        yield f"{where}: expected a force branch, got none"
    known = {task.name for task in teacher.tasks}
    lacking = [name for name in settings.mix if name not in known]
    if lacking:
        yield f"{where}: expected heads for {', '.join(lacking)}, got {', '.join(sorted(known)) or 'none'}"


def splits_needed(runs: Sequence[RunSpec], settings: StudySettings) -> dict[str, set[Split]]:
    """Return the splits of each dataset that some runs need."""
    needed: dict[str, set[Split]] = {}
    for spec in runs:
        names = settings.mix if spec.dataset is None else (spec.dataset,)
        splits: set[Split] = {"val"}
        if spec.kind in ("distill", "scratch", "finetune"):
            splits.add("train")
        if spec.dataset is not None:
            splits.add("test")
        if spec.kind == "inference":
            names = (timed(settings),)
        for name in names:
            needed.setdefault(name, set()).update(splits)
    return needed


def _open(name: str, inputs: Inputs, teacher: JMP | None) -> TaskData:
    """Return a dataset with its task, and with the graphs for the teacher where it could be loaded."""
    if name not in inputs.settings.mix:
        return inputs.downstream(name, teacher)
    (source,) = inputs.open_mix((name,))
    known = [task for task in teacher.tasks if task.name == name] if teacher is not None else []
    return TaskData(splits=source.splits, task=known[0] if known else Task(name=name))


def _problems(source: TaskData, splits: set[Split], teacher: JMP | None) -> Iterator[str]:
    lacking = sorted(split for split in splits if split not in source.splits)
    if lacking:
        yield f"expected the splits {', '.join(sorted(splits))}, {', '.join(lacking)} is missing"
    for split in sorted(splits - set(lacking)):
        data = source.splits[split]
        if len(data) == 0:
            yield f"{split}: expected structures, got none"
            continue
        try:
            for number in (0, len(data) - 1):
                _ = data[number]
        except (ValueError, OSError) as error:
            yield f"{split}: {error}"
    yield from _unknown_elements(source, teacher)
    info = next(iter(source.splits.values())).info
    wanted = {"forces"} if source.task.forces is not None else {source.task.target}
    if not wanted <= set(info.statistics):
        yield f"expected {', '.join(wanted)}, got {', '.join(sorted(info.statistics)) or 'no labels'}"


def _unknown_elements(source: TaskData, teacher: JMP | None) -> Iterator[str]:
    """Yield a message if the data has elements that the teacher or its reference energies do not cover."""
    elements = set(next(iter(source.splits.values())).info.linear_reference)
    known = set(source.task.linear_reference or elements)
    if teacher is not None:
        known = {number for number in known if number <= teacher.config.num_elements}
    if elements - known:
        numbers = ", ".join(map(str, sorted(elements - known)))
        yield f"expected elements that the teacher covers, got atomic numbers {numbers} besides"
