"""The table of docs/training.md on Hessian distillation, from benchmarks/results/hessian_cpu.json."""

import statistics

from ejmp.markdown import markdown_table


def hessian_table(result):
    rows = []
    for way, errors in result["errors"].items():
        each = ", ".join(f"{error:.1f}" for error in errors)
        rows.append([way, str(result["steps"][way]), f"{statistics.mean(errors):.1f}", each])
    return markdown_table(["student learns", "steps", "forces, meV/A", "each seed"], rows, numbers=True)
