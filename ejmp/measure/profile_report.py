"""Turn a profile into text."""

from typing import Any


def text(result: dict[str, Any], *, most_ops: int = 25) -> str:
    """Return a profile (`ejmp.measure.profile.run`) as text for people.

    Args:
        result: what was found.
        most_ops: how many ops to list; the rest are one line.
    """
    head = [
        f"{result['model']}, backend {result['backend']}, {result['precision']}, on {result['device']}",
        "{workload}: {sizes[atoms]} atoms, {sizes[edges]} edges, {sizes[quadruplets]} quadruplets".format(**result),
        result["convention"],
        '"model" is what the model defines, "run" what the backend ran; rates are of "model"',
    ]
    parts = ["\n".join(head), modules_table(result), ops_table(result, most=most_ops), totals_lines(result)]
    if result.get("fvcore"):
        parts.append(
            f"fvcore, reference backend, padded tables included; #flops are multiply-adds:\n{result['fvcore']}"
        )
    return "\n\n".join(parts)


def modules_table(result: dict[str, Any]) -> str:
    """Return a Markdown table of work and time by module, each block's parts summed below the blocks."""
    rows = result["modules"]
    lines = [
        "| module | GMAC, model | GFLOP, model | GFLOP, run | ms | % of time | TFLOP/s |",
        "| --- |" + " ---: |" * 6,
    ]
    lines += [_module_line(row) for row in rows]
    total = {name: sum(row[name] for row in rows) for name in ("gmac", "gflop", "run_gflop", "ms", "share")}
    lines.append(_module_line(total | {"module": "all"}))
    blocks = [row for row in rows if row["module"].startswith("block ")]
    for part in dict.fromkeys(row["module"].split()[-1] for row in blocks):
        same = [row for row in blocks if row["module"].split()[-1] == part]
        total = {name: sum(row[name] for row in same) for name in ("gmac", "gflop", "run_gflop", "ms", "share")}
        lines.append(_module_line(total | {"module": f"all blocks' {part}"}))
    return "\n".join(lines)


def _module_line(row: dict[str, Any]) -> str:
    rate = f"{row['gflop'] / row['ms']:.3g}" if row["ms"] > 0 else "-"
    return (
        f"| {row['module']} | {row['gmac']:.4g} | {row['gflop']:.4g} | {row['run_gflop']:.4g} | {row['ms']:.3g} | "
        f"{100 * row['share']:.1f} | {rate} |"
    )


def ops_table(result: dict[str, Any], *, most: int = 25) -> str:
    """Return a Markdown table of calls, work and time by op.

    Time is the op's own; only an op of ejmp's has that of the ops it calls.
    """
    lines = ["| op | calls | GFLOP, run | ms | % of time |", "| --- |" + " ---: |" * 4]
    rows = result["ops"]
    rest = rows[most:]
    if rest:
        total = {name: sum(row[name] for row in rest) for name in ("calls", "gflop", "ms", "share")}
        rows = [*rows[:most], total | {"op": f"{len(rest)} others"}]
    lines += [
        f"| {row['op']} | {row['calls']} | {row['gflop']:.4g} | {row['ms']:.3g} | {100 * row['share']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def totals_lines(result: dict[str, Any]) -> str:
    """Return the totals: work in both conventions, rate, utilisation."""
    totals = result["totals"]
    if totals["card"] == "unknown":
        mfu = f"MFU: unknown, there is no datasheet entry for {result['device']}"
    elif totals["mfu"] is None:
        mfu = f"MFU: unknown, the datasheet of {totals['card']} has no {result['precision']}"
    else:
        mfu = (
            f"MFU: {100 * totals['mfu']:.1f}% of {totals['peak_tflops']:g} TFLOP/s, {totals['card']} "
            f"({totals['peak_source']})"
        )
    work = (
        f"forward pass: {totals['ms']:.3g} ms; {totals['gmac']:.4g} GMAC = {totals['gflop']:.4g} GFLOP of the model, "
        f"{totals['run_gflop']:.4g} GFLOP run"
    )
    rate = (
        f"rate: {totals['tflops']:.3g} TFLOP/s, {100 * totals['gemm_share']:.0f}% of matrix products of "
        f"({result['sizes']['edges']}, 1024, 1024) in the same run, {totals['gemm_tflops']:.3g} TFLOP/s"
    )
    return f"{work}\n{rate}\n{mfu}"
