"""The tables of docs/training.md on refitting, training at any depth and narrower blocks, from benchmarks/results."""

import numpy as np

NAMES = ("oc20", "oc22", "ani1x", "transition1x")


def any_depth_table(result, study):
    """Force errors of one training for all depths -> those of a training per depth (three seeds each)."""
    separate = {row["blocks"]: row["values"] for row in study["table1"]["rows"] if row["strategy"] == "br_kd"}
    runs = [run["errors"] for run in result["runs"] if "seed" in run]
    lines = ["| blocks | OC20 | OC22 | ANI-1x | Transition-1x |", "| ---: | --- | --- | --- | --- |"]
    for blocks in (5, 4, 3, 2):
        title = "blocks 0,1,2,3,4: BR+KD" if blocks == 5 else f"its first {blocks} blocks"
        one = {name: np.mean([run[title][name]["forces_meV_per_A"] for run in runs]) for name in NAMES}
        pairs = [(separate[blocks][name]["mean"], one[name]) for name in NAMES]
        lines.append(f"| {blocks} | " + " | ".join(f"{a:.1f} -> {b:.1f} (x {b / a:.2f})" for a, b in pairs) + " |")
    return "\n".join(lines)


def neighbour_table(result):
    """Structures per second of a training without and with a neighbour that keeps one of two cores busy."""
    lines = ["| environment | alone | beside a busy neighbour | slower than alone |", "| --- | ---: | ---: | ---: |"]
    best = result["rows"][0]["alone_structures_per_s"]
    for row in result["rows"]:
        alone, beside = row["alone_structures_per_s"], row["neighbour_structures_per_s"]
        lines.append(f"| {row['way']} | {alone:.1f} | {beside:.1f} | x {best / beside:.2f} |")
    return "\n".join(lines)


def any_depth_teacher_table(result):
    """Force errors of models trained for every depth over those of the plain teacher, mean and spread over seeds."""
    head = "blocks | OC20 | OC22 | ANI-1x | Transition-1x | geometric mean"
    lines = [f"| {head} |", "| ---: | ---: | ---: | ---: | ---: | ---: |"]
    for blocks in sorted({row["blocks"] for row in result["rows"]}, reverse=True):
        rows = [row for row in result["rows"] if row["blocks"] == blocks]
        plain, kind = result["plain"], "forces_meV_per_A"
        cells = [np.mean([row["errors"][name][kind] / plain[name][kind] for row in rows]) for name in NAMES]
        means = [row["over_plain"] for row in rows]
        shown = " | ".join(f"{x:.2f}" for x in cells)
        lines.append(f"| {blocks} | {shown} | {np.mean(means):.3f} +- {np.std(means, ddof=1):.3f} |")
    return "\n".join(lines)


def refit_table(result):
    rows, names = result["rows"], NAMES

    def mean(blocks, kind, error):
        found = [row["errors"] for row in rows if (row["blocks"], row["final_mlp"]) == (blocks, kind)]
        return np.array([np.mean([errors[name][error] for errors in found]) for name in names])

    head = "blocks | OC20 | OC22 | ANI-1x | Transition-1x | share of what the cut cost, forces | energies"
    whole = " | ".join(f"{x:.1f}" for x in mean(6, "teacher", "forces_meV_per_A"))
    lines = [f"| {head} |", "| ---: | --- | --- | --- | --- | ---: | ---: |", f"| 6 (teacher) | {whole} | | |"]
    for blocks in (5, 4, 3, 2):
        shares = []
        for error in ("energy_meV_per_atom", "forces_meV_per_A"):
            teacher, cut, refitted = (
                mean(6, "teacher", error),
                mean(blocks, "sliced", error),
                mean(blocks, "refit", error),
            )
            shares.append(f"{100 * np.mean((cut - refitted) / (cut - teacher)):.0f}%")
        cells = " | ".join(f"{a:.1f} -> {b:.1f}" for a, b in zip(cut, refitted, strict=True))
        lines.append(f"| {blocks} | {cells} | {shares[1]} | {shares[0]} |")
    return "\n".join(lines)


def narrower_table(result):
    """Speed and error of students with fewer blocks or channels, before and after distillation, mean over seeds."""
    lines = [
        "| blocks | channels | x of the teacher's speed | error, least squares | error, distilled | from scratch |"
    ]
    lines.append("| ---: | ---: | ---: | ---: | ---: | ---: |")
    scratch = {row["channels"]: np.mean(row["errors"]) for row in result["scratch"]}
    sizes = dict.fromkeys((row["blocks"], row["channels"]) for row in result["rows"])
    most = max(sizes)
    for blocks, channels in sizes:
        rows = [row for row in result["rows"] if (row["blocks"], row["channels"]) == (blocks, channels)]
        found = {bool(row["steps"]): row for row in rows}
        cells = [str(blocks), str(channels), f"{found[False]['speed']:.2f}", f"{found[False]['error']:.3f}"]
        distilled = found.get(True)
        spread = "" if distilled is None or distilled["spread"] is None else f" +- {distilled['spread']:.3f}"
        cells.append("" if distilled is None else f"{distilled['error']:.3f}{spread}")
        own = blocks == most[0] and channels in scratch
        lines.append("| " + " | ".join([*cells, f"{scratch[channels]:.3f}" if own else ""]) + " |")
    return "\n".join(lines)
