"""A comparison as text: what it came to, and its tables in Markdown."""

from collections.abc import Iterable, Mapping
from typing import Any

from ejmp.markdown import Columns, format_rows
from ejmp.track.exact import shown
from ejmp.track.verdict import NOISY_SHARE

COLUMNS: Columns = (
    ("benchmark", "{name}"),
    ("verdict", "{shown}"),
    ("HEAD / BASE", "{ratio:.3f}"),
    ("interval", "{lower:.3f} to {upper:.3f}"),
    ("tolerated", "{tolerated:.2f}"),
    ("BASE ms", "{base_ms:.3g}"),
    ("HEAD ms", "{head_ms:.3g}"),
    ("pairs", "{pairs}"),
    ("note", "{note}"),
)
ORDER = ("SLOW", "UNSURE", "UNSTABLE", "FAST", "SAME")
"""Verdicts in the order in which a reader wants them."""


def markdown(result: Mapping[str, Any]) -> str:
    """Return the whole report."""
    parts = [f"# {headline(result)}", *_sides(result)]
    for title, lines in (
        ("Broken", result["broken"]),
        ("Exact differences", [shown(tuple(difference)) for difference in result["exact"]]),
        ("New", [f"{name} (BASE: {why})" for name, why in result["new"].items()]),
        ("Gone", [f"{name} (HEAD: {why})" for name, why in result["gone"].items()]),
    ):
        if lines:
            parts += [f"## {title}", "\n".join(f"- {line}" for line in lines)]
    timed = [row for row in result["rows"] if "ratio" in row]
    if timed:
        parts += ["## Times", format_rows(COLUMNS, _cells(timed))]
    return "\n\n".join(parts) + "\n"


def headline(result: Mapping[str, Any]) -> str:
    """Return what a comparison came to, as one sentence."""
    timed = [row for row in result["rows"] if "ratio" in row]
    counted = [row for row in timed if not row["unstable"]]
    slow = [row["name"] for row in counted if row["verdict"] == "SLOW"]
    controls = [row["name"] for row in counted if row["verdict"] == "SLOW" and row["control"]]
    undecided = [row["name"] for row in counted if row["verdict"] in ("UNSURE", "UNSTABLE")]
    if result["outcome"] == "broken":
        return f"Broken: {len(result['broken'])} problem(s), nothing is said about speed"
    if controls:
        return f"Void: {', '.join(controls)} became slower although its sources are the same"
    if result["outcome"] == "slow":
        return f"Slower: {', '.join(slow)}"
    if result["outcome"] == "noisy":
        return f"Too noisy: {len(undecided)} of {len(counted)} undecided, more than {NOISY_SHARE:.0%}"
    if not timed:
        return f"{len(result['rows'])} benchmarks are right; nothing was timed"
    return f"Nothing became slower: {len(counted)} benchmarks, {len(undecided)} undecided"


def _sides(result: Mapping[str, Any]) -> Iterable[str]:
    sides = []
    for title in ("base", "head"):
        side = result[title]
        commit = f"{side['commit'][:12]}{' with changes' * side['dirty']}"
        sides.append(f"{title.upper()}: {side['name']}" + (f" ({commit})" if commit != side["name"] else ""))
        if side["no_extension"]:
            yield f"{title.upper()} has no C++ extension: {side['no_extension']}"
    machine = result["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} thread(s)"
    yield f"{'; '.join(sides)}. {where}, torch {machine['torch']}; {result['seconds']:.0f} s."


def _cells(rows: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    for row in sorted(rows, key=lambda row: (ORDER.index(row["verdict"]), row["name"])):
        marks = [word for word in ("control", "unstable") if row[word]]
        yield {
            **row,
            "shown": row["verdict"] + (f" ({', '.join(marks)})" if marks else ""),
            "tolerated": 1 + row["tolerance"],
            "pairs": len(row["log_ratios"]) + len(row["repeated_log_ratios"]),
        }
