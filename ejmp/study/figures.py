"""Table 1 drawn, and Figures 2, 3 and 4 of Ghunaim et al. (arXiv 2504.19538), as inline SVG."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ejmp.train.markup import COLORS, GLYPHS, Cell, draw, figure, legend, log_axis, number

STRATEGIES = {
    "zero": "predicting zero",
    "mean": "predicting the mean",
    "teacher": "teacher",
    "br": "BR (sliced)",
    "br_random": "BR, random MLP",
    "br_kd": "BR + KD",
    "scratch": "from scratch",
    "br_refit": "BR, refitted MLP",
}
"""Strategies of a study, and what tables and legends call them."""
CONTROLS = ("zero", "mean")
"""Strategies without a model: their errors are beyond the others', and stand above a panel."""
PRUNED = ("br", "br_random", "br_refit", "br_kd")
"""Strategies that are the teacher itself where nothing is removed."""
DRAWN = tuple(name for name in STRATEGIES if name not in CONTROLS)
"""Strategies that have a line, each with the same colour and marker in all figures."""
NAMES = {
    "oc20": "OC20",
    "oc22": "OC22",
    "ani1x": "ANI-1x",
    "transition1x": "Transition-1x",
    "rmd17": "rMD17",
    "qm9": "QM9",
    "spice": "SPICE",
    "md22": "MD22",
    "qmof": "QMOF",
}
"""Datasets, and what their papers call them."""
Points = dict[str, list[tuple[int, float]]]
"""Number of blocks and value of each point of a line, by strategy."""


def strategy(name: str) -> str:
    """Return what a strategy is called."""
    return STRATEGIES.get(name, name)


def dataset(task: Mapping[str, Any]) -> str:
    """Return what the dataset of a task is called."""
    return str(task.get("label") or NAMES.get(task["dataset"], task["dataset"]))


def _looks(names: Iterable[str], known: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return a colour and a marker for each name, the same in all figures for those that are known."""
    order = [*known, *(name for name in dict.fromkeys(names) if name not in known)]
    markers = list(GLYPHS)
    found = {name: (COLORS[i % len(COLORS)], markers[i % len(markers)]) for i, name in enumerate(order)}
    return {name: found[name] for name in order if name in set(names)}


def ratios(part: Mapping[str, Any]) -> str:
    """Return Table 1 as panels, one per dataset: errors over the teacher's, ours and published; empty without both."""
    whole = next((row for row in part["rows"] if row["strategy"] == "teacher"), None)
    rows = [row for row in part["rows"] if row["strategy"] not in CONTROLS and row["blocks"]]
    if whole is None or len(rows) < 2:
        return ""
    looks = _looks([row["strategy"] for row in rows], DRAWN)
    lines = {strategy(name): look for name, look in looks.items() if name != "teacher"}
    panels: list[tuple[Cell, str]] = []
    for i, column in enumerate(part["columns"]):
        ours, published = _ratios(rows, whole, column)
        panels.append((str(NAMES.get(column, column)), _ratio_panel(f"table1-{i}", ours, published, looks)))
    caption = (
        "Error over the teacher's against the number of interaction blocks. Full lines are ours; broken lines with "
        "open markers are published. The teacher is at 1."
    )
    return figure(panels, caption, legend((name, *look) for name, look in lines.items()))


def _ratios(rows: Sequence[Mapping[str, Any]], whole: Mapping[str, Any], column: str) -> tuple[Points, Points]:
    """Return our and the published ratios to the whole model's error, as points by strategy."""
    found: tuple[Points, Points] = ({}, {})
    for row in sorted(rows, key=lambda row: row["blocks"]):
        ours = [(each["values"].get(column) or {}).get("mean") for each in (row, whole)]
        theirs = [(each.get("published") or {}).get(column) for each in (row, whole)]
        for points, (value, of) in zip(found, (ours, theirs), strict=True):
            if row["strategy"] != "teacher" and value is not None and of:
                points.setdefault(row["strategy"], []).append((row["blocks"], value / of))
    for points in found:
        for kind in points.keys() & set(PRUNED):
            points[kind].append((whole["blocks"], 1.0))
    return found


def _ratio_panel(name: str, ours: Points, published: Points, looks: Mapping[str, tuple[str, str]]) -> str:
    def plot(axes: Any) -> None:
        for points, style in (
            (ours, {}),
            (published, {"linestyle": "--", "markerfacecolor": "none", "linewidth": 0.9}),
        ):
            for kind, line in points.items():
                color, marker = looks[kind]
                axes.plot(*zip(*line, strict=True), color=color, marker=marker, **style)
        every = [point for points in (ours, published) for line in points.values() for point in line]
        axes.set(xlabel="interaction blocks", ylabel="error over the teacher's", xticks=sorted({n for n, _ in every}))
        log_axis(axes, "y", [ratio for _, ratio in every])

    told = "; ".join(
        f"{who}, {strategy(kind)}: " + ", ".join(f"{blocks} blocks {ratio:.2f}" for blocks, ratio in line)
        for who, points in (("ours", ours), ("published", published))
        for kind, line in points.items()
    )
    return draw(name, f"Error over the teacher's by number of blocks. {told}", plot)


def relevance(part: Mapping[str, Any]) -> str:
    """Return Figure 2: bars of relevance by block, energy beside forces."""
    labels = [str(label) for label in part["labels"]]
    branches = [branch for branch in ("energy", "forces") if part.get(branch)]

    def plot(axes: Any) -> None:
        width = 0.8 / len(branches)
        for i, branch in enumerate(branches):
            places = [place + (i - (len(branches) - 1) / 2) * width for place in range(len(labels))]
            axes.bar(places, part[branch], width * 0.94, color=COLORS[i])
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
        axes.set(ylabel="share of the relevance, %")
        axes.grid(visible=False, axis="x")

    told = "; ".join(
        f"{branch}: "
        + ", ".join(f"{label} {number(share, 3)}" for label, share in zip(labels, part[branch], strict=True))
        for branch in branches
    )
    svg = draw("fig2", f"Bars of relevance by block, in percent. {told}", plot, size=(4.6, 2.9))
    key = legend((branch, COLORS[i], "s") for i, branch in enumerate(branches))
    caption = (
        "Relevance of the embedding and of each block (Grad-CAM), as a share of the sum. In the paper it falls "
        "gradually from block to block; the last two blocks have the lowest."
    )
    return figure([("", svg)], caption, key)


def downstream(tasks: Sequence[Mapping[str, Any]]) -> str:
    """Return Figure 3: a panel per task, its error against the number of blocks, a line per strategy."""
    looks = _looks(
        [row["strategy"] for task in tasks for row in task["rows"] if row["strategy"] not in CONTROLS], DRAWN
    )
    panels = [(_title(task), _downstream(f"fig3-{i}", task, looks)) for i, task in enumerate(tasks)]
    key = legend((strategy(name), *look) for name, look in looks.items())
    caption = (
        "Error after fine-tuning against the number of interaction blocks; bars are the spread over seeds. The broken "
        "line is the teacher's error, with nothing removed."
    )
    return figure(panels, caption, key)


def _title(task: Mapping[str, Any]) -> Cell:
    """Return the title of a task's panel, with what is reached without a model."""
    controls = [row for row in task["rows"] if row["strategy"] in CONTROLS]
    told = ", ".join(f"{strategy(row['strategy'])}: {number(row['mean'])} {task['unit']}" for row in controls)
    return (dataset(task), told) if told else dataset(task)


def _downstream(name: str, task: Mapping[str, Any], looks: Mapping[str, tuple[str, str]]) -> str:
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(task["rows"], key=lambda row: row["blocks"] or 0):
        if row["strategy"] not in CONTROLS and row["mean"] is not None:
            lines.setdefault(row["strategy"], []).append(row)
    rows = [row for points in lines.values() for row in points]

    def plot(axes: Any) -> None:
        for kind, points in lines.items():
            color, marker = looks[kind]
            if kind == "teacher":
                axes.axhline(points[-1]["mean"], color=color, linestyle="--", linewidth=1)
            blocks, means = [p["blocks"] for p in points], [p["mean"] for p in points]
            axes.errorbar(
                blocks, means, [p.get("spread") or 0.0 for p in points], color=color, marker=marker, capsize=2
            )
        axes.set(
            xlabel="interaction blocks", ylabel=f"error, {task['unit']}", xticks=sorted({r["blocks"] for r in rows})
        )
        log_axis(axes, "y", [row["mean"] for row in rows])

    told = "; ".join(
        f"{strategy(kind)}: " + ", ".join(f"{p['blocks']} blocks {number(p['mean'])}" for p in points)
        for kind, points in lines.items()
    )
    return draw(name, f"{dataset(task)}, error in {task['unit']}. {told}", plot)


def convergence(tasks: Sequence[Mapping[str, Any]]) -> str:
    """Return Figure 4: a panel per task, its error against seconds of training, a line per number of blocks."""
    counts = sorted({curve["blocks"] for task in tasks for curve in task["curves"]}, reverse=True)
    looks = _looks([str(n) for n in counts], [])
    panels = [(dataset(task), _convergence(f"fig4-{i}", task, looks)) for i, task in enumerate(tasks)]
    key = legend((f"{n} blocks", *looks[str(n)]) for n in counts)
    return figure(panels, "Validation error against seconds of training, by number of interaction blocks.", key)


def _convergence(name: str, task: Mapping[str, Any], looks: Mapping[str, tuple[str, str]]) -> str:
    def plot(axes: Any) -> None:
        for curve in task["curves"]:
            color, marker = looks[str(curve["blocks"])]
            errors = [math.nan if error is None else error for error in curve["error"]]
            axes.plot(curve["seconds"], errors, color=color, marker=marker, markersize=3.5)
        axes.set(xlabel="training time, s", ylabel=f"error, {task['unit']}")
        log_axis(axes, "x", [second for curve in task["curves"] for second in curve["seconds"] if second])
        log_axis(axes, "y", [error for curve in task["curves"] for error in curve["error"] if error is not None])

    told = "; ".join(
        f"{curve['blocks']} blocks: from {number(curve['error'][0])} to {number(curve['error'][-1])} "
        f"in {number(curve['seconds'][-1])} s"
        for curve in task["curves"]
        if curve["error"]
    )
    return draw(name, f"{dataset(task)}, error in {task['unit']} against training time. {told}", plot)
