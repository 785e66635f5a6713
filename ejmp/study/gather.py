"""Gathers the results of a study: study.json, study.csv, the page and the text for people."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ejmp.data.store.durable import write_json, written
from ejmp.lock import locked
from ejmp.markdown import markdown_table
from ejmp.study.numbers import COLUMNS, csv_rows
from ejmp.study.page import write_study_page
from ejmp.study.plan import plan, runs_of
from ejmp.study.record import is_finished, read_result
from ejmp.study.settings import PARTS, Part, StudySettings
from ejmp.study.tables import MAKERS


def gather(folder: Path, parts: Sequence[Part], settings: StudySettings, command: str) -> str:
    """Write study.json, study.csv and the page of all finished parts, and return the parts asked for as text.

    Args:
        folder: folder of the study.
        parts: what was asked for.
        settings: of the study.
        command: command line, for the record.

    Raises:
        ValueError: if runs of the parts asked for are not finished, naming them.
    """
    missing = [spec.name for spec in plan(parts, settings) if not is_finished(folder, spec.name)]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{folder}: {len(missing)} runs are not finished ({shown}); the same command goes on with them"
        )
    with locked(folder / "gather.lock", wait=True):
        study = collect(folder, settings, command)
        write_json(folder / "study.json", study)
        with written(folder / "study.csv") as path, path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(csv_rows(study))
        try:
            page = f"the page: {write_study_page(folder)}"
        except ModuleNotFoundError as error:
            page = f"no page: {error}"
    return "\n\n".join([*(text(part, study[part]) for part in parts), page])


def collect(folder: Path, settings: StudySettings, command: str) -> dict[str, Any]:
    """Return the contents of study.json: every part whose runs are all finished."""
    ready: list[Part] = [part for part in PARTS if is_ready(folder, part, settings)]
    results = [read_result(folder, spec.name) for spec in plan(ready, settings)]
    study: dict[str, Any] = {
        "command": command,
        "seeds": settings.seeds,
        "commit": results[-1]["commit"],
        "machine": results[-1]["machine"],
        "demo": settings.demo,
    }
    study |= {part: MAKERS[part](folder, settings) for part in ready}
    fields = ("name", "kind", "seconds", "steps", "command", "config", "commit", "machine")
    return study | {"runs": [{name: result[name] for name in fields} for result in results]}


def is_ready(folder: Path, part: Part, settings: StudySettings) -> bool:
    """Return whether a part has runs, and all of them are finished."""
    runs = list(runs_of(part, settings))
    return bool(runs) and all(is_finished(folder, spec.name) for spec in runs)


def text(part: Part, content: Mapping[str, Any]) -> str:
    """Return a part as a Markdown table."""
    if part == "table1":
        rows = [[_name(row), *(_mean(row["values"][c]) for c in content["columns"])] for row in content["rows"]]
        head = ["model", *(f"{name} {content['unit']}" for name in content["columns"])]
    elif part == "table2":
        head = ["blocks", "structures/s", "GMAC", "GFLOP", "parameters"]
        names = ("structures_per_s", "gmacs", "gflops")
        rows = [
            [str(row["blocks"]), *(f"{row[name]:.4g}" for name in names), f"{row['parameters']:,}"]
            for row in content["rows"]
        ]
    elif part == "fig2":
        head = ["relevance, %", *content["labels"]]
        rows = [[branch, *(f"{share:.1f}" for share in content[branch])] for branch in ("energy", "forces")]
    elif part == "fig3":
        head = ["task", "model", "error", "unit"]
        rows = [[t["label"], _name(row), _mean(row), t["unit"]] for t in content["tasks"] for row in t["rows"]]
    else:
        head = ["task", "blocks", "validation error after training for"]
        rows = [[task["label"], str(c["blocks"]), _points(c)] for task in content["tasks"] for c in task["curves"]]
    return markdown_table(head, rows, numbers=part != "fig4")


def _name(row: Mapping[str, Any]) -> str:
    name = str(row["strategy"])
    strategy = {"br_random": "br/random", "br_refit": "br/refit", "br_kd": "br+kd"}.get(name, name)
    return strategy if row["blocks"] is None else f"{row['blocks']} blocks, {strategy}"


def _mean(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.4g}" + ("" if value["spread"] is None else f" +- {value['spread']:.2g}")


def _points(found: Mapping[str, Any]) -> str:
    pairs = zip(found["seconds"], found["error"], strict=True)
    return ", ".join(f"{seconds:.1f} s: {error:.4g}" for seconds, error in pairs)
