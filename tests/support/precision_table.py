"""The table of docs/benchmarks.md on precisions, from benchmarks/results/precisions_cpu.json."""

from ejmp.markdown import markdown_table


def precision_table(result):
    rows = []
    times = {(row["precision"], row["blocks"]): row for row in result["times"]["rows"]}
    most, least = max(b for _, b in times), min(b for _, b in times)
    size = {"fp32": result["bytes"]["float"], "int8": result["bytes"]["int8"]}
    for precision, errors in result["against_float64"].items():
        row, short = times[precision, most], times[precision, least]
        by = [times["fp32", b]["ms"]["median"] / times[precision, b]["ms"]["median"] for b in (most, least)]
        labels = result["on_labels"][precision]
        forces = [found["forces_meV_per_A"] for found in labels["errors"].values()]
        cells = [f"{row['ms']['median']:.0f}", f"{by[0]:.2f}", f"{1 / row['gemm_share']:.2f}"]
        cells += [f"{short['ms']['median']:.0f}", f"{by[1]:.2f}", f"{1 / short['gemm_share']:.2f}"]
        cells += [f"{errors['energy']:.0e}", f"{errors['forces']:.0e}"]
        cells += [f"{sum(forces) / len(forces):.1f}", f"{labels['over_fp32']:.3f}", f"{row['peak_memory_mib']:.0f}"]
        rows.append([precision, *cells, f"{size[precision] / 1e6:.0f}" if precision in size else "-"])
    titles = ["precision"]
    titles += [title for b in (most, least) for title in (f"ms, {b} blocks", "x of fp32", "x of floor")]
    titles += ["energy error", "forces error", "teacher meV/A", "of fp32", "MiB", "file MB"]
    return markdown_table(titles, rows, numbers=True)


def share_table(profile):
    """Where the time of a pass goes: the ops that take at least half a percent of it, and all others."""
    ops = [op for op in profile["ops"] if op["share"] >= 0.005]
    rest = [op for op in profile["ops"] if op["share"] < 0.005]
    rows = [[f"`{op['op']}`", op["calls"], f"{op['ms']:.0f}", f"{100 * op['share']:.1f}"] for op in ops]
    total = [sum(op[name] for op in rest) for name in ("calls", "ms", "share")]
    rows.append([f"{len(rest)} others", total[0], f"{total[1]:.0f}", f"{100 * total[2]:.1f}"])
    return markdown_table(["op", "calls", "ms", "% of time"], rows, numbers=True)
