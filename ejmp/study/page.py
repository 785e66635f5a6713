"""The page of a study: the tables and figures of the pruning paper, published values beside ours, how each was made."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ejmp.study.figures import NAMES, convergence, dataset, downstream, ratios, relevance, strategy
from ejmp.train.markup import Cell, code, document, facts, folded, heading, need_matplotlib, number, paragraph, table

TITLE = "ejmp: pruning and distilling JMP, measured"
Part = Mapping[str, Any]
"""A part of study.json."""


def write_study_page(folder: Path) -> Path:
    """Write index.html of what study.json in the same folder says, and return its path.

    The page needs no other file and no network. Parts that study.json does not have are left out.

    Args:
        folder: folder of a study.

    Raises:
        FileNotFoundError: if the folder has no study.json.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    need_matplotlib()
    study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    parts = {"table1": _table1, "table2": _table2, "fig2": _figure2, "fig3": _figure3, "fig4": _figure4, "runs": _runs}
    body = [heading(TITLE, 1), *_introduction(study)]
    for name, make in parts.items():
        if _holds(study.get(name)):
            body += [f'<section id="{name}">', *make(study[name]), "</section>"]
    path = folder / "index.html"
    path.write_text(document(TITLE, body), encoding="utf-8")
    return path


def _holds(part: Any) -> bool:
    """Return whether a part of a study has something to show yet: no list of it is empty."""
    return bool(part) and not (isinstance(part, Mapping) and [] in part.values())


def _introduction(study: Part) -> Iterable[str]:
    demo = bool(study.get("demo"))
    data = (
        "the demo data of this package, with its small teacher" if demo else "the datasets and the teacher named below"
    )
    yield paragraph(
        "A JMP model is cut to its first interaction blocks, and distillation from the whole model wins back what that "
        f"costs (Ghunaim et al., arXiv 2504.19538). One command made every table and figure of that paper on {data}; "
        "published values stand beside ours."
    )
    if demo:
        yield paragraph(
            "Errors of the demo's teacher and of the published one, JMP-L, do not compare in meV/A: neither the data "
            "nor the sizes are the same. What compares is the ratio to the teacher, in small print below each error: "
            "what pruning costs, and what distillation wins back.",
            "note",
        )
    known = {"command": study.get("command"), "seeds": study.get("seeds"), "commit": study.get("commit")}
    known["machine"] = _machine(study.get("machine"))
    yield facts({name: value for name, value in known.items() if value not in (None, "")})
    yield '<p>All numbers: <a href="study.json">study.json</a>, <a href="study.csv">study.csv</a></p>'


def _machine(machine: Any) -> str:
    if isinstance(machine, Mapping):
        return ", ".join(f"{name} {value}" for name, value in machine.items())
    return "" if machine is None else str(machine)


def _blocks(blocks: int | None) -> str:
    return "" if blocks is None else f"{blocks} blocks"


def _mean(found: Part | None) -> str:
    """Return a mean with its spread, both with as many decimals as four digits of the mean take."""
    mean, spread = (found or {}).get("mean"), (found or {}).get("spread")
    shown = number(mean)
    if mean is None or spread is None:
        return shown
    return f"{shown} ± {spread:.{len(shown.partition('.')[2])}f}"


def _ratio(value: float | None, whole: float | None) -> str:
    if value is None or not whole or not math.isfinite(value / whole):
        return ""
    return f"x {value / whole:.2f}"


def _pair(value: str, small: str) -> Cell:
    return (value, small) if small else value


def _table1(part: Part) -> Iterable[str]:
    yield heading("Table 1: errors of forces before fine-tuning")
    columns, unit = part["columns"], part["unit"]
    whole = next((row for row in part["rows"] if row["strategy"] == "teacher"), {"values": {}, "published": None})
    rows, seeds = [], []
    for row in part["rows"]:
        name = _pair(strategy(row["strategy"]), _blocks(row["blocks"]))
        rows.append([name, *(cell for column in columns for cell in _errors(row, whole, column))])
        seeds.append([name, *(_seeds(row["values"].get(column)) for column in columns)])
    titles = [str(NAMES.get(column, column)) for column in columns]
    caption = (
        f"Mean absolute error of force components, {unit}: ours, mean ± spread over seeds, and published (for JMP-L). "
        "In small print: x times the teacher's."
    )
    groups = [(title, 2) for title in titles]
    yield table(caption, ["strategy", *["ours", "published"] * len(columns)], rows, groups=groups)
    yield ratios(part)
    if any(any(cells[1:]) for cells in seeds):
        yield folded("each seed", table(f"Table 1 by seed, {unit}.", ["strategy", *titles], seeds))


def _errors(row: Part, whole: Part, column: str) -> tuple[Cell, Cell]:
    """Return our error and the published one, each with its ratio to that of the whole model."""
    ours, our_whole = (found["values"].get(column) or {} for found in (row, whole))
    theirs, their_whole = ((found.get("published") or {}).get(column) for found in (row, whole))
    published = "" if theirs is None else _pair(f"{theirs:.1f}", _ratio(theirs, their_whole))
    return _pair(_mean(ours), _ratio(ours.get("mean"), our_whole.get("mean"))), published


def _seeds(found: Part | None) -> str:
    return ", ".join(number(value) for value in (found or {}).get("seeds") or [])


def _table2(part: Part) -> Iterable[str]:
    yield heading("Table 2: speed and size")
    most = max(part["rows"], key=lambda row: row["blocks"])
    rows = [[str(row["blocks"]), *_speed(row, most)] for row in part["rows"]]
    batch = f" in batches of {part['batch']}" if part.get("batch") else ""
    caption = (
        f"Inference on {NAMES.get(part['dataset'], part['dataset'])}{batch}; published: JMP-L on QMOF, one V100. "
        f"In small print: x times that of {most['blocks']} blocks."
    )
    titles = ["ours", "published", "ours, GMAC", "ours, GFLOP", "published", "ours", "published"]
    groups = [("structures/s", 2), ("work", 3), ("parameters", 2)]
    yield table(caption, ["blocks", *titles], rows, groups=groups)
    yield paragraph(
        "Our work is that of one structure, in both conventions: multiply-adds (GMAC), and operations, two of which "
        "make a multiply-add (GFLOP). The published column is called GFlops there; we read it as 10^12 multiply-adds "
        "per batch of about four structures, so that only its ratios compare.",
        "note",
    )


def _speed(row: Part, most: Part) -> list[Cell]:
    """Return the cells of Table 2, each with its ratio to that of the most blocks."""
    ours = (("structures_per_s", number), ("gmacs", number), ("gflops", number), ("parameters", _count))
    theirs = (("throughput", _published), ("gflops", _published), ("parameters", _count))
    published, published_most = row.get("published") or {}, most.get("published") or {}
    rate, gmacs, gflops, parameters = (
        _pair(show(row.get(name)), _ratio(row.get(name), most.get(name))) for name, show in ours
    )
    their_rate, their_gflops, their_parameters = (
        _pair(show(published.get(name)), _ratio(published.get(name), published_most.get(name))) for name, show in theirs
    )
    return [rate, their_rate, gmacs, gflops, their_gflops, parameters, their_parameters]


def _published(value: float | None) -> str:
    """Return a number with the three digits that the paper gives."""
    return number(value, 3)


def _count(parameters: float | None) -> str:
    """Return a number of parameters in millions or thousands."""
    if parameters is None:
        return number(None)
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e6 else f"{parameters / 1e3:.1f} k"


def _figure2(part: Part) -> Iterable[str]:
    yield heading("Figure 2: relevance of the blocks")
    yield relevance(part)
    branches = [branch for branch in ("energy", "forces") if part.get(branch)]
    shares = zip(*(part[branch] for branch in branches), strict=True)
    rows = [[str(label), *(number(v, 3) for v in found)] for label, found in zip(part["labels"], shares, strict=True)]
    yield folded("the numbers", table("Relevance, % of the sum.", ["output", *branches], rows))


def _figure3(part: Part) -> Iterable[str]:
    yield heading("Figure 3: fine-tuning pruned models")
    yield downstream(part["tasks"])
    yield folded("the numbers", *(_downstream_table(task) for task in part["tasks"]))


def _downstream_table(task: Part) -> str:
    rows: list[Sequence[Cell]] = [
        [
            _pair(strategy(row["strategy"]), _blocks(row["blocks"])),
            _mean(row),
            _seeds(row),
        ]
        for row in task["rows"]
    ]
    return table(f"{dataset(task)}: error in {task['unit']}.", ["strategy", "mean ± spread", "each seed"], rows)


def _figure4(part: Part) -> Iterable[str]:
    yield heading("Figure 4: error against training time")
    yield convergence(part["tasks"])
    yield folded("the numbers", *(_curves_table(task) for task in part["tasks"]))


def _curves_table(task: Part) -> str:
    rows = [
        [_blocks(curve["blocks"]), number(seconds), number(error)]
        for curve in task["curves"]
        for seconds, error in zip(curve["seconds"], curve["error"], strict=True)
    ]
    return table(f"{dataset(task)}: error in {task['unit']}.", ["curve", "training time, s", "error"], rows)


def _runs(runs: Sequence[Part]) -> Iterable[str]:
    yield heading("How each number was made")
    kinds: dict[str, list[Part]] = {}
    for run in runs:
        kinds.setdefault(str(run["kind"]), []).append(run)
    for kind, same in kinds.items():
        seconds = sum(run.get("seconds") or 0.0 for run in same)
        titles = ["run", "seconds", "steps", "commit", "machine"]
        rows = [
            [
                str(run["name"]),
                number(run.get("seconds")),
                "-" if run.get("steps") is None else str(run["steps"]),
                str(run.get("commit") or "-"),
                _machine(run.get("machine")),
            ]
            for run in same
        ]
        inside = [table(f"Runs of the kind {kind}.", titles, rows), *(_commands(run) for run in same)]
        yield folded(f"{kind}: {len(same)} run{'s' * (len(same) > 1)}, {number(seconds)} s", *inside)


def _commands(run: Part) -> str:
    config = json.dumps(run.get("config") or {}, indent=1)
    return folded(f"{run['name']}: command and config", code(str(run.get("command") or "")), code(config))
