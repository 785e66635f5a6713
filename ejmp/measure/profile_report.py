"""A profile as text."""

from typing import Any

from ejmp.markdown import Columns, format_rows


def text(result: dict[str, Any], *, most_ops: int = 25) -> str:
    """Return a profile (`ejmp.measure.profile.run`) as text for people.

    Args:
        result: the profile.
        most_ops: number of ops to list; the rest are one line.
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


MODULE_COLUMNS: Columns = (
    ("module", "{module}"),
    ("GMAC, model", "{gmac:.4g}"),
    ("GFLOP, model", "{gflop:.4g}"),
    ("GFLOP, run", "{run_gflop:.4g}"),
    ("ms", "{ms:.3g}"),
    ("% of time", "{percent:.1f}"),
    ("TFLOP/s", "{rate}"),
)
OP_COLUMNS: Columns = (
    ("op", "{op}"),
    ("calls", "{calls}"),
    ("GFLOP, run", "{gflop:.4g}"),
    ("ms", "{ms:.3g}"),
    ("% of time", "{percent:.1f}"),
)


def modules_table(result: dict[str, Any]) -> str:
    """Return a Markdown table of work and time by module, each block's parts summed below the blocks."""
    rows = result["modules"]
    blocks = [row for row in rows if row["module"].startswith("block ")]
    sums = [_total(rows, module="all")]
    for part in dict.fromkeys(row["module"].split()[-1] for row in blocks):
        same = [row for row in blocks if row["module"].split()[-1] == part]
        sums.append(_total(same, module=f"all blocks' {part}"))
    shown = [
        row | {"percent": 100 * row["share"], "rate": f"{row['gflop'] / row['ms']:.3g}" if row["ms"] > 0 else "-"}
        for row in (*rows, *sums)
    ]
    return format_rows(MODULE_COLUMNS, shown, numbers=True)


def ops_table(result: dict[str, Any], *, most: int = 25) -> str:
    """Return a Markdown table of calls, work and time by op.

    The time of an op leaves out the ops it calls; only an op of ejmp's includes them.
    """
    rows, rest = result["ops"][:most], result["ops"][most:]
    if rest:
        rows = [*rows, _total(rest, op=f"{len(rest)} others")]
    return format_rows(OP_COLUMNS, [row | {"percent": 100 * row["share"]} for row in rows], numbers=True)


def _total(rows: list[dict[str, Any]], **name: str) -> dict[str, Any]:
    """Return a row with a name and the sum of every number in some rows."""
    numbers = [key for key, value in rows[0].items() if not isinstance(value, str)]
    return name | {key: sum(row[key] for row in rows) for key in numbers}


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
