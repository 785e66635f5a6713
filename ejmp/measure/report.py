"""Benchmark results as tables and pictures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ejmp.markdown import Columns, format_rows, markdown_table

COLUMNS: Columns = (
    ("precision", "{precision}"),
    ("blocks", "{blocks}"),
    ("structures/s", "{structures_per_s:.3g}"),
    ("atoms/s", "{atoms_per_s:.4g}"),
    ("edges/s", "{edges_per_s:.4g}"),
    ("ms median", "{ms[median]:.0f}"),
    ("ms p95", "{ms[p95]:.0f}"),
    ("x of {most} blocks", "{ratio[structures_per_s]:.2f}"),
    ("published x", "{published}"),
    ("GMAC", "{gmac:.1f}"),
    ("GFLOP", "{gflop:.1f}"),
    ("of {most}", "{ratio[gmac]:.2f}"),
    ("parameters", "{parameters:,}"),
    ("of {most}", "{ratio[parameters]:.2f}"),
    ("peak MiB", "{peak_memory_mib:.0f}"),
    ("of {most}", "{ratio[peak_memory_mib]:.2f}"),
    ("% of GEMM rate", "{gemm_percent:.0f}"),
)
"""All columns of the block-count table; {most} is the largest number of blocks."""
COMPARED: Columns = (("x of reference", "{speedup:.2f}"), ("its peak MiB", "{reference_peak_memory_mib:.0f}"))
"""Columns of a benchmark that timed the reference backend too."""
SHORT: Columns = (
    *(COLUMNS[i] for i in (0, 1, 2, 7, 8)),
    ("x of the plain-torch model", "{speedup:.2f}"),
    ("MiB", "{peak_memory_mib:.0f}"),
)
"""Columns of the short table."""
PASSES = ("forward", "backward", "second")
"""What is timed of an op: the op, its gradients, and their gradients."""


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table of a block-count benchmark with all columns."""
    compared = all("speedup" in row for row in result["rows"])
    return _blocks_table(result, (*COLUMNS, *(COMPARED if compared else ())))


def short_table(result: dict[str, Any]) -> str:
    """Return a Markdown table of seven columns of a block-count benchmark that timed the reference backend too.

    Raises:
        ValueError: if it did not.
    """
    if not all("speedup" in row for row in result["rows"]):
        raise ValueError("result: expected one of ejmp bench --compare, got one without the reference backend")
    return _blocks_table(result, SHORT)


def _blocks_table(result: dict[str, Any], columns: Columns) -> str:
    rows = []
    for row in result["rows"]:
        published = row.get("published_throughput_ratio")
        shown = {"published": f"{published:.2f}" if published else "-", "gemm_percent": 100 * row["gemm_share"]}
        rows.append(row | shown)
    most = max(row["blocks"] for row in result["rows"])
    return format_rows([(title.format(most=most), cell) for title, cell in columns], rows)


def kernel_table(result: dict[str, Any]) -> str:
    """Return a Markdown table of `benchmarks/bench_kernels.py`, one row per op, from pytest-benchmark's JSON."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for benchmark in result["benchmarks"]:
        info = benchmark["extra_info"]
        if "speedup" in info and "op" in info:
            order = next(name for name in PASSES if f"-{name}]" in benchmark["name"])
            found.setdefault(info["op"], {})[order] = info
    timed = [f"{order} {what}" for order in PASSES for what in ("ms", "x")]
    rows = []
    for op, infos in found.items():
        cells = [op]
        for order in PASSES:
            info = infos.get(order)
            cells += [f"{info['ms']:.1f}", f"{info['speedup']:.1f}"] if info else ["-", "-"]
        shared = [f"{info['speedup_over_shared']:.1f}" for info in infos.values() if "speedup_over_shared" in info]
        first = infos["forward"]
        shares = [f"{100 * first[f'share_of_{what}_rate']:.0f}" for what in ("gemm", "copy")]
        rows.append([*cells, " ".join(shared) or "-", *shares])
    return markdown_table(["op", *timed, "x, shared tables", "% of GEMM", "% of copy"], rows)


def summary(result: dict[str, Any]) -> str:
    """Return the lines that belong above the table: what was measured, on what, and how."""
    work, made = result["workload"], result["provenance"]
    sizes = work["sizes"]
    graphs = ", ".join(f"{name} {found['median']:.1f}" for name, found in result["graph_ms"].items())
    rates = ", ".join(f"{name} {rate['median']:.0f}" for name, rate in result["gemm_gflops"].items())
    return "\n".join(
        (
            (
                f"{result['model']} on {work['name']}: {work['structures']} structure(s), {sizes['atoms']} atoms, "
                f"{sizes['edges']} edges, {sizes['edge_to_edge']} triplets, {sizes['quadruplets']} quadruplets "
                f"({work['cutoff']:g} A, {'/'.join(map(str, work['max_neighbors']))} neighbours)"
            ),
            (
                f"{made.get('gpu', made['cpu'])}, {made['threads']} threads, torch {made['torch']}, commit "
                f"{made['commit']}, load before {made['load_before']:.2f}, {result['rows'][0]['ms']['samples']} rounds"
            ),
            f"matrix products at ({sizes['edges']}, 1024, 1024), GFLOP/s: {rates}; the last column is of the fastest",
            f"graph building, ms, not part of the times below: {graphs}",
            result["convention"],
        )
    )


def need_matplotlib() -> None:
    """Raise ModuleNotFoundError before a measurement, not after it, if no picture of it can be drawn.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")


@contextmanager
def axes_of(path: Path, width: float) -> Iterator[Any]:
    """Give axes to draw on, of a picture that is `width` x 4 inches and is written with a legend."""
    need_matplotlib()
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(width, 4), layout="constrained")
    yield axes
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def picture(result: dict[str, Any], path: Path) -> None:
    """Draw throughput over that of 6 blocks against the number of blocks, with the published curve."""
    by_precision: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        by_precision.setdefault(row["precision"], []).append(row)
    rows = next(iter(by_precision.values()))
    blocks = [row["blocks"] for row in rows]
    published = [(row["blocks"], row.get("published_throughput_ratio")) for row in rows]
    published = [point for point in published if point[1] is not None]
    with axes_of(path, 6) as axes:
        for precision, same in by_precision.items():
            ratios = [row["ratio"]["structures_per_s"] for row in same]
            axes.plot([row["blocks"] for row in same], ratios, "o-", label=f"ejmp, {precision}")
        if published:
            axes.plot(*zip(*published, strict=True), "s--", color="gray", label="published (V100)")
        axes.plot(blocks, [1 / row["ratio"]["gmac"] for row in rows], ":", color="black", label="work alone")
        axes.set(xlabel="interaction blocks", ylabel=f"throughput over {max(blocks)} blocks", xticks=blocks)
        axes.set_title(f"{result['model'].split(',')[0]}, {result['workload']['name']}")
        axes.invert_xaxis()


def _block_names(scores: dict[str, dict[str, list[float]]]) -> list[str]:
    first = next(iter(scores.values()))
    return ["embedding", *(f"block {i}" for i in range(len(first["combined"]) - 1))]


def relevance_table(scores: dict[str, dict[str, list[float]]]) -> str:
    """Return a Markdown table of block relevance, in percent of each row's sum.

    Args:
        scores: by dataset and branch ("energy", "forces", "combined"), [blocks + 1] each (`ejmp.train.survey`).
    """
    rows = []
    for name, branches in scores.items():
        for branch, values in branches.items():
            total = sum(values) or 1.0
            rows.append([name, branch, *(f"{100 * v / total:.1f}" for v in values)])
    return markdown_table(["dataset", "branch", *_block_names(scores)], rows)


def relevance_picture(scores: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw the combined scores as bars, one group per block, one colour per dataset.

    Args:
        scores: as for `relevance_table`.
        path: file to write.
    """
    names, width = _block_names(scores), 0.8 / len(scores)
    with axes_of(path, 7) as axes:
        for i, (name, branches) in enumerate(scores.items()):
            places = [place + (i - (len(scores) - 1) / 2) * width for place in range(len(names))]
            axes.bar(places, branches["combined"], width, label=name)
        axes.set(xticks=range(len(names)), xticklabels=names, ylabel="share of the relevance", title="Block relevance")


def data_table(result: dict[str, Any]) -> str:
    """Return what `benchmarks/bench_data.py` measured of sampling and loading, as a Markdown table."""
    infos = {bench["name"]: bench["extra_info"] for bench in result["benchmarks"]}
    ready, epoch = infos["bench_ready[512]"], infos["bench_epoch"]
    rows = [
        ("sampler of 120 million structures ready, 512 ranks", f"{ready['ready_s']:.2f} s"),
        ("memory of a rank then, with Python and torch", f"{ready['mib']['VmRSS']:.0f} MiB"),
        ("samples drawn, whole epoch of 174 million", f"{epoch['million_per_s_whole_epoch']:.1f} million/s"),
    ]
    for ranks in (8, 64, 512):
        worst = infos[f"bench_balance[{ranks}-8]"]["balanced"]
        rows.append((f"slowest rank over mean, {ranks} ranks of 8 structures", f"{worst['mean']:.3f}"))
    for kind in ("molecules", "slabs"):
        made = infos[f"bench_make_batch[8-{kind}]"]
        rows.append((f"graphs of {kind}, {made['atoms']:.0f} atoms", f"{made['structures_per_cpu_s']:.0f}/s per core"))
    return markdown_table(["", ""], rows, numbers=True)
