"""The table of docs/training.md on refitting, from benchmarks/results/refit_cpu.json."""

import numpy as np


def refit_table(result):
    rows, names = result["rows"], ("oc20", "oc22", "ani1x", "transition1x")

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
