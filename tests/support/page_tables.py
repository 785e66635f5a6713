"""The tables of README and docs that hold figures, each made of a JSON file under benchmarks/results/."""

import json

import compare_upstream as upstream

from ejmp.limits import Limits
from ejmp.measure import report
from ejmp.study import gather
from ejmp.train.evaluate import table
from ejmp.train.search import from_json, text_of
from support.hessian_table import hessian_table
from support.inputs import ROOT
from support.precision_table import precision_table, share_table
from support.track_table import faster_table, track_table
from support.training_tables import (
    any_depth_table,
    any_depth_teacher_table,
    narrower_table,
    neighbour_table,
    refit_table,
)

RESULTS = ROOT / "benchmarks" / "results"


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def infos(name):
    return {bench["name"]: bench["extra_info"] for bench in result(name)["benchmarks"]}


def block_table(columns, most):
    """A table of the block-count benchmark: its head, and a cell of each row for each column."""
    head = [name.format(most=most) for name in columns]
    rows = [[cell(row) for cell in columns.values()] for row in result("blocks_mof_cpu")["rows"]]
    return markdown(head, rows)


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def short_table():
    return block_table(
        {
            "precision": lambda row: row["precision"],
            "blocks": lambda row: row["blocks"],
            "structures/s": lambda row: f"{row['structures_per_s']:.3g}",
            "x of {most} blocks": lambda row: f"{row['ratio']['structures_per_s']:.2f}",
            "published x": lambda row: f"{row['published_throughput_ratio']:.2f}",
            "x of the plain-torch model": lambda row: f"{row['speedup']:.2f}",
            "MiB": lambda row: f"{row['peak_memory_mib']:.0f}",
        },
        most=6,
    )


def kernel_growth_table():
    found = infos("kernels_cpu")
    ops = ("edge_to_edge", "quadruplet", "pair")
    rows = {op: [row for row in found.values() if row.get("op") == f"grow_{op}"] for op in ops}
    head = ["atoms", *(row["atoms"] for row in rows["pair"])]
    return markdown(head, [[op, *(f"{row['us_per_atom']:.0f}" for row in rows[op])] for op in ops])


def graph_growth():
    """Atoms and milliseconds of graph building."""
    found = [info for name, info in infos("graph_cpu").items() if name.startswith("bench_growth")]
    return [(info["atoms"], info["us_per_atom"] * info["atoms"] / 1000) for info in found]


def graph_table():
    found = graph_growth()
    return markdown(["atoms", *(atoms for atoms, _ in found)], [["ms", *(f"{ms:.3g}" for _, ms in found)]])


def smoothness_table():
    rows = result("limits")["near_linear"]
    molecules = list(dict.fromkeys(row["molecule"] for row in rows))
    cells = {
        (row["bend_A"], row["molecule"]): f"{row['largest_force_float64']:.3g} / {row['largest_force_float32']:.3g}"
        for row in rows
    }
    bends = dict.fromkeys(row["bend_A"] for row in rows)
    return markdown(["bend, A", *molecules], [[f"{b:g}", *(cells[b, name] for name in molecules)] for b in bends])


def demo_table():
    return gather.text("table1", result("study_cpu")["table1"])


def aspirin_table():
    errors = result("aspirin_cpu")["errors"]
    return table({f"{name}, {when}": {"aspirin": rows[when]} for name, rows in errors.items() for when in rows})


def limits_table():
    return markdown(["limit", "default"], [[f"`{name}`", f"{most:,}"] for name, most in vars(Limits()).items()])


def search_tables():
    """The two tables of docs/training.md on subsets of blocks."""
    found = {key: part for key, part in result("search_cpu").items() if key in ("ratios", "refitted", "scores")}
    return text_of(from_json(found)).split("\n\n")[1::1]


TABLES = {
    "any depth": ("docs/training.md", lambda: any_depth_table(result("any_depth_cpu"), result("study_cpu"))),
    "any depth, teacher": ("docs/training.md", lambda: any_depth_teacher_table(result("any_depth_teacher_cpu"))),
    "precisions": ("docs/benchmarks.md", lambda: precision_table(result("precisions_cpu"))),
    "shares": ("docs/benchmarks.md", lambda: share_table(result("profile_bf16_cpu"))),
    "upstream": ("docs/benchmarks.md", lambda: upstream.text_of(result("upstream_cpu")["rows"])),
    "hessian": ("docs/training.md", lambda: hessian_table(result("hessian_cpu"))),
    "track": ("docs/tracking.md", lambda: track_table(result("track_cpu"))),
    "faster": ("docs/tracking.md", lambda: faster_table(result("track_commits_cpu"))),
    "neighbour": ("docs/training.md", lambda: neighbour_table(result("neighbour_cpu"))),
    "narrower": ("docs/training.md", lambda: narrower_table(result("narrower_cpu"))),
    "search": ("docs/training.md", lambda: search_tables()[0]),
    "scores": ("docs/training.md", lambda: search_tables()[1].rstrip("\n")),
    "refit": ("docs/training.md", lambda: refit_table(result("refit_cpu"))),
    "short": ("README.md", short_table),
    "blocks": ("docs/benchmarks.md", lambda: report.table(result("blocks_mof_cpu"))),
    "kernels": ("docs/benchmarks.md", lambda: report.kernel_table(result("kernels_cpu"))),
    "kernel growth": ("docs/benchmarks.md", kernel_growth_table),
    "graph growth": ("docs/benchmarks.md", graph_table),
    "demo": ("docs/training.md", demo_table),
    "aspirin": ("docs/training.md", aspirin_table),
    "data": ("docs/data.md", lambda: report.data_table(result("data_cpu"))),
    "smoothness": ("docs/smoothness.md", smoothness_table),
    "limits": ("docs/security.md", limits_table),
}
"""The page of each table, and what makes it."""
