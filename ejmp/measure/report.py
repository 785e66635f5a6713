"""Turn benchmark results into a table and a picture."""

from pathlib import Path
from typing import Any

COLUMNS = (
    "precision | blocks | structures/s | atoms/s | edges/s | ms median | ms p95 | x of {most} blocks | published x | "
    "GMAC | GFLOP | of {most} | parameters | of {most} | peak MiB | of {most} | % of GEMM rate"
)
COMPARED = " | x of reference | its peak MiB"


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table of a block-count benchmark."""
    compared = all("speedup" in row for row in result["rows"])
    head = COLUMNS.format(most=max(row["blocks"] for row in result["rows"])) + (COMPARED if compared else "")
    lines = [f"| {head} |", "|" + " --- |" * (head.count("|") + 1)]
    for row in result["rows"]:
        published = row.get("published_throughput_ratio")
        cells = [
            row["precision"],
            str(row["blocks"]),
            f"{row['structures_per_s']:.3g}",
            f"{row['atoms_per_s']:.4g}",
            f"{row['edges_per_s']:.4g}",
            f"{row['ms']['median']:.0f}",
            f"{row['ms']['p95']:.0f}",
            f"{row['ratio']['structures_per_s']:.2f}",
            f"{published:.2f}" if published else "-",
            f"{row['gmac']:.1f}",
            f"{row['gflop']:.1f}",
            f"{row['ratio']['gmac']:.2f}",
            f"{row['parameters']:,}",
            f"{row['ratio']['parameters']:.2f}",
            f"{row['peak_memory_mib']:.0f}",
            f"{row['ratio']['peak_memory_mib']:.2f}",
            f"{100 * row['gemm_share']:.0f}",
        ]
        if compared:
            cells += [f"{row['speedup']:.2f}", f"{row['reference_peak_memory_mib']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kernel_table(result: dict[str, Any]) -> str:
    """Return a Markdown table of `benchmarks/bench_kernels.py`, one row per op, from pytest-benchmark's JSON."""
    passes = ("forward", "backward", "second")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for benchmark in result["benchmarks"]:
        info = benchmark["extra_info"]
        if "speedup" in info and "op" in info:
            order = next(name for name in passes if f"-{name}]" in benchmark["name"])
            found.setdefault(info["op"], {})[order] = info
    columns = [
        "op",
        *(f"{order} {of}" for order in passes for of in ("ms", "x")),
        "x, shared tables",
        "% of GEMM",
        "% of copy",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for op, rows in found.items():
        cells = [op]
        for order in passes:
            row = rows.get(order)
            cells += [f"{row['ms']:.1f}", f"{row['speedup']:.1f}"] if row else ["-", "-"]
        shared = [f"{row['speedup_over_shared']:.1f}" for row in rows.values() if "speedup_over_shared" in row]
        first = rows["forward"]
        cells += [
            " ".join(shared) or "-",
            f"{100 * first['share_of_gemm_rate']:.0f}",
            f"{100 * first['share_of_copy_rate']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> str:
    """Return the lines that belong above the table."""
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
    """Find out before a measurement, not after it, whether a picture of it can be drawn.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")


def picture(result: dict[str, Any], path: Path) -> None:
    """Draw throughput over that of 6 blocks against the number of blocks, with the published curve."""
    need_matplotlib()
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for precision in dict.fromkeys(row["precision"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["precision"] == precision]
        blocks = [row["blocks"] for row in rows]
        axes.plot(blocks, [row["ratio"]["structures_per_s"] for row in rows], "o-", label=f"ejmp, {precision}")
    rows = [row for row in result["rows"] if row["precision"] == result["rows"][0]["precision"]]
    blocks = [row["blocks"] for row in rows]
    published = [(row["blocks"], row.get("published_throughput_ratio")) for row in rows]
    published = [point for point in published if point[1] is not None]
    if published:
        axes.plot(*zip(*published, strict=True), "s--", color="gray", label="published (V100)")
    axes.plot(blocks, [1 / row["ratio"]["gmac"] for row in rows], ":", color="black", label="work alone")
    axes.set(xlabel="interaction blocks", ylabel=f"throughput over {max(blocks)} blocks", xticks=blocks)
    axes.set_title(f"{result['model'].split(',')[0]}, {result['workload']['name']}")
    axes.invert_xaxis()
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _block_names(scores: dict[str, dict[str, list[float]]]) -> list[str]:
    first = next(iter(scores.values()))
    return ["embedding", *(f"block {i}" for i in range(len(first["combined"]) - 1))]


def relevance_table(scores: dict[str, dict[str, list[float]]]) -> str:
    """Return a Markdown table of block relevance, in percent of each row's sum.

    Args:
        scores: by dataset and branch ("energy", "forces", "combined"), [blocks + 1] each (`ejmp.train.survey`).
    """
    columns = ["dataset", "branch", *_block_names(scores)]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for name, branches in scores.items():
        for branch, values in branches.items():
            total = sum(values) or 1.0
            lines.append("| " + " | ".join([name, branch, *(f"{100 * v / total:.1f}" for v in values)]) + " |")
    return "\n".join(lines)


def relevance_picture(scores: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw the combined scores as bars, one group per block, one colour per dataset. Arguments as for the table."""
    need_matplotlib()
    import matplotlib.pyplot as plt  # noqa: PLC0415

    names, width = _block_names(scores), 0.8 / len(scores)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, (name, branches) in enumerate(scores.items()):
        places = [place + (i - (len(scores) - 1) / 2) * width for place in range(len(names))]
        axes.bar(places, branches["combined"], width, label=name)
    axes.set(xticks=range(len(names)), xticklabels=names, ylabel="share of the relevance", title="Block relevance")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


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
    return "\n".join(["| | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows)])
