"""Make a page of the GPU campaign's results: one section per step, whatever steps are there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_step import COUNTS, NAMES, WAYS, read_steps

from ejmp.markdown import markdown_table

Row = dict[str, Any]


def page(folder: Path) -> str:
    """Return a page in Markdown of the JSON files in a folder.

    Raises:
        FileNotFoundError: if there are none.
    """
    steps = read_steps(folder)
    found = {name: steps[name] for name in TITLES if name in steps}
    if not found:
        raise FileNotFoundError(f"{folder}: no step has written anything yet")
    dry = any(step["dry"] for step in found.values())
    lines = [f"# GPU campaign: {machine(found)}", ""]
    if dry:
        lines += [
            "**A dry run**: on the CPU, interpreted, tiny sizes. It proves the command; its times say nothing.",
            "",
        ]
    lines += [
        "Made by `benchmarks/gpu_campaign.py`; every number is in campaign.json beside this page. % of GEMM: the work",
        "of the model itself (two operations per multiply-add) over the rate of bare matrix products,",
        "measured at the same number of edges in the same step. MFU: over the datasheet's dense peak.",
        "Errors are against float64.",
        "",
    ]
    lines += claims(found)
    for name, title in TITLES.items():
        lines += ["", f"## {title}", ""]
        lines += section(name, found[name]) if name in found else ["Not run."]
    return "\n".join(lines) + "\n"


TITLES = {
    "build": "Building the CUDA extension",
    "test": "Tests on this machine",
    "sanitize": "compute-sanitizer on the native kernels",
    "ceilings": "What the machine can do",
    "ops": "Ops",
    "chain": "The dense chain",
    "blocks": "Blocks and batch sizes",
    "compare": "Ways to run one model: backends",
    "compiled": "Ways to run one model: compiled and recorded",
    "train": "Training and distillation",
    "tune": "Launch settings of Triton's kernels",
    "profile": "Profiles",
}
"""Titles of the page's sections, by the steps in the page's order."""


def machine(found: dict[str, Any]) -> str:
    """Return the name of the GPU that was measured, or of the CPU in a dry run."""
    made = next(iter(found.values()))["provenance"]
    return made.get("gpu") or made["cpu"]


def provenance_lines(step: dict[str, Any]) -> list[str]:
    """Return a paragraph that says where, when, on what and for how long a step was measured."""
    made, smi = step["provenance"], step["provenance"]["nvidia_smi"]
    card = ", ".join(f"{name} {value}" for name, value in smi.items()) if isinstance(smi, dict) else smi
    return [
        (
            f"{made['date']}, commit {made['commit']}, torch {made['torch']}, Triton {made['triton']}"
            f"{' (interpreter)' if made['triton_interpreter'] else ''}, CUDA {made.get('cuda', 'none')}; {card}; "
            f"native kernels: {made['native']}; {step['seconds']:.0f} s."
        ),
        "",
    ]


def section(name: str, step: dict[str, Any]) -> list[str]:
    """Return a step's provenance, what holds for all its rows, its table, and what is missing in it."""
    lines = provenance_lines(step)
    about = {k: v for k, v in step.items() if isinstance(v, str | int | float) and k not in HIDDEN}
    if about:
        lines += ["; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in about.items()) + ".", ""]
    if name == "profile":
        for row in step["rows"]:
            if "text" in row:
                lines += ["", row["text"], ""]
    else:
        done = [row for row in step["rows"] if "skipped" not in row and "failed" not in row]
        lines += [table(COLUMNS[name], done)] if done else []
    missing = [row for row in step["rows"] if "skipped" in row or "failed" in row]
    if missing:
        lines += ["", "Not there:", ""]
        lines += [f"- {who(row)}: {row.get('skipped') or 'FAILED: ' + str(row['failed'])}" for row in missing]
    return lines


HIDDEN = ("step", "dry", "seconds", "log_tail", "status")
"""Fields of a step that the page does not show above its table."""


def who(row: Row) -> str:
    """Return what a row is about, for the list of what is not there."""
    named = [str(row[name]) for name in (*NAMES, *WAYS, "precision", "shape") if name in row]
    return ", ".join([*named, *(f"{row[name]} {name}" for name in COUNTS if name in row)])


def percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.1f}"


def number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def how_many(reasons: dict[str, int]) -> str:
    return str(sum(reasons.values()))


Column = tuple[str, str, Callable[[Any], str]]
"""Title of a column, the field of a row that it shows, and how."""
SHARES: tuple[Column, ...] = (
    ("TFLOP/s", "tflops", number),
    ("% of GEMM", "gemm_share", percent),
    ("MFU %", "mfu", percent),
)
COLUMNS: dict[str, tuple[Column, ...]] = {
    "build": (("what", "what", str), ("ms", "ms", number), ("native on CUDA", "native_on_cuda", str)),
    "test": (("file", "file", str), ("passed", "passed", str), ("left out", "left_out", how_many)),
    "sanitize": (("tool", "tool", str), ("ms", "ms", number), ("summary", "summary", number)),
    "ceilings": (
        ("what", "what", str), ("precision", "precision", number), ("shape", "shape", number), ("ms", "ms", number),
        ("TFLOP/s", "tflops", number), ("MFU %", "mfu", percent), ("GB/s", "gbytes_per_s", number),
        ("error", "error", error),
    ),
    "ops": (
        ("op", "op", str), ("pass", "order", str), ("precision", "precision", str), ("backend", "backend", str),
        ("ms", "ms", number), ("x of reference", "x of reference", number), *SHARES,
        ("% of copy", "copy_share", percent), ("error", "error", error),
    ),
    "chain": (
        ("precision", "precision", str), ("contestant", "contestant", str), ("ms", "ms", number),
        ("% of bare products", "of_products", percent), *SHARES, ("error", "error", error),
    ),
    "blocks": (
        ("precision", "precision", str), ("structures", "structures", str), ("edges", "edges", number),
        ("blocks", "blocks", str), ("ms", "ms", number), ("structures/s", "structures_per_s", number),
        ("edges/s", "edges_per_s", number), ("x of most blocks", "x_of_most", number),
        ("published x", "published_x", number), ("GMAC", "gmac", number), *SHARES, ("peak MiB", "peak_mib", number),
        ("error", "error", error),
    ),
    "compare": (
        ("precision", "precision", str), ("way", "way", str), ("ms", "ms", number), ("edges/s", "edges_per_s", number),
        ("x of JMP as shipped", "x of as shipped", number), ("x of reference", "x of reference", number),
        ("x of torch.compile(reference)", "x of torch.compile(reference)", number), *SHARES,
        ("peak MiB", "peak_mib", number), ("first call s", "first_call_s", number), ("error", "error", error),
    ),
    "tune": (
        ("kernel", "what", str), ("precision", "precision", str), ("faster settings", "settings", str),
        ("time over committed", "ratio", number),
    ),
    "train": (
        ("step", "kind", str), ("precision", "precision", str), ("backend", "backend", str), ("ms", "ms", number),
        ("structures/s", "structures_per_s", number), ("x of reference", "x of reference", number), *SHARES,
        ("peak MiB", "peak_mib", number), ("error of loss", "error", error),
    ),
}  # fmt: skip
COLUMNS["compiled"] = COLUMNS["compare"]


def table(columns: tuple[Column, ...], rows: list[Row]) -> str:
    """Return a Markdown table of a step's rows."""
    cells = ([show(row.get(key)) for _, key, show in columns] for row in rows)
    return markdown_table([title for title, _, _ in columns], cells)


def claims(found: dict[str, Any]) -> list[str]:
    """Return what the project set out to reach on a GPU beside what was measured."""
    chain = [
        row
        for row in rows_of(found, "chain")
        if row["contestant"] in ("native", "triton") and row["precision"] == "bf16"
    ]
    ways = [*rows_of(found, "compare"), *rows_of(found, "compiled")]
    whole = [row for row in ways if row["precision"] == "bf16" and row["way"] not in BASELINES]
    best = {
        "dense chain, bf16, % of bare products (at least 90)": most(chain, "of_products", 100),
        "whole model, bf16, % of the datasheet's peak (at least 45)": most(whole, "mfu", 100),
        "whole model, bf16, over eager fp16 autocast (at least 3)": most(whole, "x of as shipped", 1),
        "whole model, bf16, over torch.compile of the reference (at least 1.5)": most(
            whole, "x of torch.compile(reference)", 1
        ),
    }
    return [f"- {name}: {value}" for name, value in best.items()]


BASELINES = ("reference", "torch.compile(reference)")


def rows_of(found: dict[str, Any], name: str) -> list[Row]:
    rows = found[name]["rows"] if name in found else []
    return [row for row in rows if "ms" in row]


def most(rows: list[Row], key: str, scale: float) -> str:
    """Return the largest value of a field among some rows, times a scale, and which row it is from."""
    known = [row for row in rows if row.get(key) is not None]
    if not known:
        return "not measured"
    best = max(known, key=lambda row: row[key])
    return f"{scale * best[key]:.3g} ({best.get('way') or best.get('contestant')}, error {error(best.get('error'))})"
