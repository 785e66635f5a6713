"""The parts of study.json, from the results of runs: means and spreads over seeds beside published values."""

import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ejmp.study import published
from ejmp.study.plan import BLOCKS, RunSpec, runs_of
from ejmp.study.record import read_result, run_folder
from ejmp.study.settings import Part, StudySettings

LABELS = {
    "rmd17": "Aspirin (rMD17)",
    "qm9": "U0 (QM9)",
    "spice": "Solvated amino acids (SPICE)",
    "md22": "Ac-Ala3-NHMe (MD22)",
    "qmof": "Band gap (QMOF)",
}
"""Tasks of Figures 3 and 4 as the paper names them."""
UNITS = {"forces_meV_per_A": "meV/A", "energy_meV": "meV"}
"""Units of errors by their name; others end in theirs, or are in the catalogue's, eV."""


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (None for one value) and the values."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": spread, "seeds": list(values)}


def main_error(errors: dict[str, float]) -> tuple[str, float]:
    """Return unit and value of the error that the paper compares: of forces where there are some, or of the target."""
    name = "forces_meV_per_A" if "forces_meV_per_A" in errors else next(iter(errors))
    return UNITS.get(name) or name.rpartition("_")[2] or "eV", errors[name]


def table1(study: Path, settings: StudySettings) -> dict[str, Any]:
    """Return errors of forces on the validation data of the mix, by strategy and number of blocks."""
    rows = []
    for same in _by_row(_rows_of(settings, "table1")):
        found = [read_result(study, spec.name)["values"]["errors"] for spec in same]
        values = {name: summary([errors[name]["forces_meV_per_A"] for errors in found]) for name in settings.mix}
        spec = same[0]
        theirs = published.TABLE1.get((spec.strategy or "", spec.blocks or 0))
        rows.append(
            {"strategy": spec.strategy, "blocks": spec.blocks, "values": values, "published": theirs and dict(theirs)}
        )
    return {"columns": list(settings.mix), "unit": "meV/A", "rows": rows}


def table2(study: Path, _: StudySettings) -> dict[str, Any]:
    """Return speed, work and size by number of blocks."""
    values = read_result(study, "inference")["values"]
    rows = [row | {"published": dict(published.TABLE2[row["blocks"]])} for row in values["rows"]]
    return values | {"rows": rows}


def fig2(study: Path, _: StudySettings) -> dict[str, Any]:
    """Return the relevance of the embedding and of each block, % of each branch, averaged over the datasets."""
    scores = read_result(study, "relevance")["values"]["scores"].values()
    found: dict[str, Any] = {"labels": ["embedding", *(f"block {i}" for i in range(BLOCKS))]}
    for branch in ("energy", "forces"):
        shares = [[100 * value / (sum(one[branch]) or 1.0) for value in one[branch]] for one in scores]
        found[branch] = [statistics.fmean(column) for column in zip(*shares, strict=True)]
    return found


def fig3(study: Path, settings: StudySettings) -> dict[str, Any]:
    """Return errors on the test data of each task, by strategy and number of blocks."""
    tasks = []
    for dataset in settings.downstream:
        wanted = [spec for spec in _rows_of(settings, "fig3") if spec.dataset == dataset]
        rows, unit = [], ""
        for same in _by_row(wanted):
            found = [main_error(read_result(study, spec.name)["values"]["errors"][dataset]) for spec in same]
            unit = found[0][0]
            row = {"strategy": same[0].strategy, "blocks": same[0].blocks}
            rows.append(row | summary([value for _, value in found]))
        tasks.append({"dataset": dataset, "label": _label(dataset, unit, settings), "unit": unit, "rows": rows})
    return {"tasks": tasks}


def _label(dataset: str, unit: str, settings: StudySettings) -> str:
    """Return what a task is called; the gap is what the demo learns of QM9."""
    return "HOMO-LUMO gap (QM9)" if settings.demo and dataset == "qm9" and unit == "eV" else LABELS[dataset]


def fig4(study: Path, settings: StudySettings) -> dict[str, Any]:
    """Return validation errors against training time for each task, from the logs of Figure 3's runs."""
    tasks = []
    for dataset in settings.downstream:
        curves, unit = [], ""
        for spec in runs_of("fig4", settings):
            if spec.dataset == dataset:
                log = (run_folder(study, spec.name) / "log.jsonl").read_text()
                unit, seconds, errors = curve([json.loads(line) for line in log.splitlines()], dataset)
                curves.append({"blocks": spec.blocks, "seconds": seconds, "error": errors})
        tasks.append({"dataset": dataset, "label": _label(dataset, unit, settings), "unit": unit, "curves": curves})
    return {"tasks": tasks}


def curve(lines: Sequence[dict[str, Any]], dataset: str) -> tuple[str, list[float], list[float]]:
    """Return unit, training times (s) and errors of a run's validations.

    The time is the number of steps times the median time of a step between two lines of the log without a validation
    between them, so that neither validations nor interruptions count.

    Args:
        lines: the log; a run that was interrupted has some steps twice.
        dataset: dataset whose error counts.
    """
    after_training = list(_step_seconds(lines, after={"train"}))
    per_step = statistics.median(after_training or _step_seconds(lines, after={"train", "validation"}))
    found = {line["step"]: main_error(line[dataset]) for line in lines if line["event"] == "validation"}
    errors = [found[step][1] for step in sorted(found)]
    return next(iter(found.values()))[0], [step * per_step for step in sorted(found)], errors


def _step_seconds(lines: Sequence[dict[str, Any]], *, after: set[str]) -> Iterator[float]:
    """Yield the seconds of a training step between each two lines of a log of which the first is of these events."""
    for before, line in itertools.pairwise(lines):
        steps = line["step"] - before["step"]
        if line["event"] == "train" and before["event"] in after and steps > 0:
            yield (line["time"] - before["time"]) / steps


MAKERS: dict[Part, Callable[[Path, StudySettings], dict[str, Any]]] = {
    "table1": table1,
    "table2": table2,
    "fig2": fig2,
    "fig3": fig3,
    "fig4": fig4,
}
"""What makes each part."""


def _rows_of(settings: StudySettings, part: Part) -> list[RunSpec]:
    """Return the runs that are rows of a part, without those that others only need before them."""
    runs = list({spec.name: spec for spec in runs_of(part, settings)}.values())
    return runs if part == "table1" else [spec for spec in runs if spec.dataset is not None]


def _by_row(runs: Iterable[RunSpec]) -> list[list[RunSpec]]:
    """Return runs that differ in their seed alone together, in the order of the first of each."""
    rows: dict[tuple[str | None, int | None], list[RunSpec]] = {}
    for spec in runs:
        rows.setdefault((spec.strategy, spec.blocks), []).append(spec)
    return list(rows.values())
