"""The page of a history: trends of every benchmark by machine, in one HTML file without script or network.

What is shown can be chosen by machine, type and op: each choice is a checkbox, and a rule of CSS hides what belongs to
a box that is not ticked.
"""

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ejmp.track.history import Change, Series
from ejmp.train.markup import (
    COLORS,
    code,
    document,
    draw,
    folded,
    heading,
    need_matplotlib,
    number,
    paragraph,
    table,
)

TITLE = "ejmp: speed over commits"
CAPTION = """The newest record of each benchmark; ceiling: the time in which the machine, in the same run, multiplied or
copied as much, whichever is longer"""
FILTER_STYLE = """<style>
fieldset {{ border: 1px solid var(--line); margin: 0.5rem 0; display: flex; flex-wrap: wrap; gap: 0.2rem 1rem;
  font-size: 0.875rem }}
{rules}
</style>"""


def write_page(path: Path, series: Sequence[Series], changes: Sequence[Change], problems: Sequence[str]) -> None:
    """Write the page.

    Args:
        path: file to write.
        series: what to show.
        changes: change points of these series.
        problems: lines of the history that were skipped.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if there is nothing to show.
    """
    need_matplotlib()
    if not series:
        raise ValueError("history: expected records to show, found none")
    kinds = {
        "machine": lambda one: one.key,
        "type": lambda one: one.dtype,
        "op": lambda one: one.name.partition("/")[0],
    }
    body = [heading(TITLE, 1), *_introduction(series, changes), _filters(kinds, series)]
    for key in dict.fromkeys(one.key for one in series):
        mine = [one for one in series if one.key == key]
        body += [f'<section class="{_label("machine", key)}">', heading(key), _facts(mine[0])]
        body += [_table(mine), *_panels(kinds, mine, changes), "</section>"]
    if problems:
        body.append(folded(f"{len(problems)} lines of the history were skipped", code("\n".join(problems))))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document(TITLE, body), encoding="utf-8")


def _introduction(series: Sequence[Series], changes: Sequence[Change]) -> Iterable[str]:
    commits = {record.commit for one in series for record in one.records}
    machines = {one.key for one in series}
    yield paragraph(
        f"{len(series)} benchmarks, {len(commits)} commits, {len(machines)} machine(s). Each drawing shows the time "
        "of a call over the time of a matrix product in the same minutes, as a share of the first commit's; up is "
        "slower. Numbers of two machines are never compared."
    )
    if changes:
        yield "<ul>" + "".join(f"<li>{html.escape(change.line)}</li>" for change in changes) + "</ul>"
    else:
        yield paragraph("No trend changes.")


def _label(kind: str, value: str) -> str:
    return f"{kind}-{re.sub(r'[^a-zA-Z0-9]+', '-', value)}"


def _filters(kinds: dict[str, Callable[[Series], str]], series: Sequence[Series]) -> str:
    """Return the checkboxes, and the rules that hide what belongs to those that are not ticked."""
    boxes, rules = [], []
    for kind, of in kinds.items():
        values = sorted({of(one) for one in series})
        inside = ""
        for value in values:
            name = _label(kind, value)
            rules.append(f"main:has(#show-{name}:not(:checked)) .{name} {{ display: none }}")
            inside += f'<label><input type="checkbox" id="show-{name}" checked> {html.escape(value)}</label>'
        boxes.append(f"<fieldset><legend>{kind}</legend>{inside}</fieldset>")
    return FILTER_STYLE.format(rules="\n".join(rules)) + "".join(boxes)


def _facts(one: Series) -> str:
    machine = one.records[-1].machine
    known = [f"{name} {value}" for name, value in machine.items() if value not in (None, "")]
    return paragraph(", ".join(known), "note")


def _table(series: Sequence[Series]) -> str:
    """Return the newest record of each benchmark."""
    rows = []
    for one in series:
        last = one.records[-1]
        values = one.values
        share = last.ceiling_share
        rows.append(
            [
                (one.name, " ".join(filter(None, (one.suite, one.dtype, one.backend)))),
                last.commit[:10],
                number(1e3 * last.median, 3),
                number(last.speedup, 3),
                "-" if share is None else f"{100 * share:.0f}",
                number(math.exp(values[-1] - values[0]), 3),
                str(len(one.records)),
            ]
        )
    titles = ["benchmark", "commit", "ms", "x of reference", "% of ceiling", "of the first", "records"]
    return table(CAPTION, titles, rows)


def _panels(
    kinds: dict[str, Callable[[Series], str]], series: Sequence[Series], changes: Sequence[Change]
) -> Iterable[str]:
    yield '<div class="panels">'
    for place, one in enumerate(series):
        found = [change for change in changes if change.series is one]
        labels = " ".join(_label(kind, of(one)) for kind, of in kinds.items())
        name, alt = f"{_label('trend', one.key)}-{place}", f"{one.title} over {len(one.records)} records"
        drawings = [draw(name, alt, _trend(one, found), size=(3.7, 2.0))]
        speedups = [record.speedup or math.nan for record in one.records]
        percents = [100 * (record.ceiling_share or math.nan) for record in one.records]
        for label, values, color in (("x of reference", speedups, COLORS[2]), ("% of ceiling", percents, COLORS[1])):
            if any(map(math.isfinite, values)):
                plot = _plain(one, label, values, color)
                drawings.append(draw(f"{name}-{label[0]}", f"{one.title}: {label}", plot, size=(3.7, 1.8)))
        yield f'<div class="panel {labels}">{heading(one.title, 3)}{"".join(drawings)}</div>'
    yield "</div>"


def _trend(one: Series, changes: Sequence[Change]) -> Callable[[Any], None]:
    values = one.values
    shares = [math.exp(value - values[0]) for value in values]

    def plot(axes: Any) -> None:
        axes.plot(range(len(shares)), shares, "o-", color=COLORS[0])
        for change in changes:
            axes.axvline(change.index - 0.5, color=COLORS[3], linestyle="--")
        axes.set_ylim(0.9 * min(*shares, 0.95), 1.1 * max(*shares, 1.05))
        axes.set_ylabel("of the first")
        _name_commits(axes, one)

    return plot


def _plain(one: Series, label: str, values: Sequence[float], color: str) -> Callable[[Any], None]:
    def plot(axes: Any) -> None:
        axes.plot(range(len(values)), values, "s-", color=color)
        axes.set_ylabel(label)
        _name_commits(axes, one)

    return plot


def _name_commits(axes: Any, one: Series) -> None:
    """Write some commits below an axis, as many as there is room for."""
    step = -(-len(one.records) // 12)
    axes.set_xticks(range(0, len(one.records), step))
    axes.set_xticklabels([record.commit[:7] for record in one.records[::step]], rotation=60, ha="right", fontsize=7)
