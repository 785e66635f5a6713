"""All numbers of a study as rows, for study.csv."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

COLUMNS = ("part", "strategy", "dataset", "blocks", "quantity", "unit", "mean", "spread", "seeds", "published")
"""Columns of study.csv."""
Row = tuple[Any, ...]


def csv_rows(study: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the rows of study.csv, a number each, as `COLUMNS` names their cells."""
    for part, rows in _PARTS.items():
        if part in study:
            yield from rows(study[part])


def _row(part: str, of: Mapping[str, Any], place: tuple[str, str, str], value: Any, published: Any = None) -> Row:
    """Return a row; the place is dataset, quantity and unit, and the value a number or a summary over seeds."""
    dataset, quantity, unit = place
    found = value if isinstance(value, Mapping) else {"mean": value, "spread": None, "seeds": [value]}
    seeds = " ".join(map(str, found["seeds"]))
    where = (part, of.get("strategy"), dataset, of.get("blocks"), quantity, unit)
    return (*where, found["mean"], found["spread"], seeds, published)


def _table1(part: Mapping[str, Any]) -> Iterator[Row]:
    for row in part["rows"]:
        published = row["published"] or {}
        for name, value in row["values"].items():
            yield _row("table1", row, (name, "forces", part["unit"]), value, published.get(name))


def _table2(part: Mapping[str, Any]) -> Iterator[Row]:
    names = (
        ("structures_per_s", "1/s", "throughput"),
        ("gmacs", "10^9", None),
        ("gflops", "10^9", "gflops"),
        ("parameters", "", "parameters"),
    )
    for row in part["rows"]:
        for name, unit, published in names:
            yield _row("table2", row, (part["dataset"], name, unit), row[name], row["published"].get(published))


def _fig2(part: Mapping[str, Any]) -> Iterator[Row]:
    for branch in ("energy", "forces"):
        for label, share in zip(part["labels"], part[branch], strict=True):
            yield _row("fig2", {}, (label, f"relevance, {branch}", "%"), share)


def _fig3(part: Mapping[str, Any]) -> Iterator[Row]:
    for task in part["tasks"]:
        for row in task["rows"]:
            yield _row("fig3", row, (task["dataset"], "error", task["unit"]), row)


def _fig4(part: Mapping[str, Any]) -> Iterator[Row]:
    for task in part["tasks"]:
        for curve in task["curves"]:
            for seconds, error in zip(curve["seconds"], curve["error"], strict=True):
                yield _row("fig4", curve, (task["dataset"], f"error after {seconds:.2f} s", task["unit"]), error)


_PARTS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[Row]]] = {
    "table1": _table1,
    "table2": _table2,
    "fig2": _fig2,
    "fig3": _fig3,
    "fig4": _fig4,
}
