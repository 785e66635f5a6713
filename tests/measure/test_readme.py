"""README's example runs, and its figures are those of the committed JSON files."""

import json
import re
import subprocess
import sys
from pathlib import Path

from ejmp.measure import report
from ejmp.train.evaluate import forces_only, table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def test_example_runs():
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(example.strip().splitlines()) <= 10
    run = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "torch.Size([2, 4]) torch.Size([12, 4, 3])",
        "27082752 18558464",
    ]


def test_table_is_the_committed_result():
    result = json.loads((RESULTS / "blocks_mof_cpu.json").read_text())
    assert report.table(result) in README
    assert [row["blocks"] for row in result["rows"]] == [6, 5, 4, 3, 2] * 2
    assert "dirty" not in result["provenance"]["commit"]


def test_kernel_table_is_the_committed_result():
    result = json.loads((RESULTS / "kernels_cpu.json").read_text())
    assert report.kernel_table(result) in README


def test_training_figures_are_the_committed_result():
    infos = [b["extra_info"] for b in json.loads((RESULTS / "training_cpu.json").read_text())["benchmarks"]]
    (step,) = (info for info in infos if "speedup" in info)
    assert f"{step['speedup']:.2f} times as fast" in README
    assert f"{100 * step['memory_ratio']:.0f}% of the" in README
    for info in infos:
        if "energy_error" in info:
            assert f"{info['energy_error']:.0e} and {info['gradient_force_error']:.0e} in {info['precision']}" in README


def test_demo_table_is_the_committed_result():
    errors = json.loads((RESULTS / "demo_cpu.json").read_text())["errors"]
    assert table({name: forces_only(row) for name, row in errors.items()}) in README
    for name in ("oc20", "oc22", "ani1x", "transition1x"):
        for blocks in (5, 4, 3, 2):
            pruned, taught = (errors[f"{blocks} blocks, {kind}"][name]["forces_meV_per_A"] for kind in ("BR", "BR+KD"))
            assert taught < pruned
        assert errors["teacher, 6 blocks"][name]["forces_meV_per_A"] < errors["untrained"][name]["forces_meV_per_A"]


def test_aspirin_table_is_the_committed_result():
    result = json.loads((RESULTS / "aspirin_cpu.json").read_text())["errors"]
    rows = {f"{name}, {when}": {"aspirin": errors[when]} for name, errors in result.items() for when in errors}
    assert table(rows) in README


def test_compiled_kernels_are_the_committed_result():
    result = json.loads((RESULTS / "triton_compile.json").read_text())
    kernels, text = result["kernels"], " ".join(README.split())
    spilled = max(row["stack"] for row in kernels if row["dtype"] != "float64")
    assert f"{len(kernels)} kernels, by type" in text
    assert f"spills more than {spilled} bytes" in text
    assert "dirty" not in result["provenance"]["commit"]


def test_data_table_is_the_committed_result():
    assert report.data_table(json.loads((RESULTS / "data_cpu.json").read_text())) in README


def test_distillation_figure_is_the_committed_result():
    (found,) = json.loads((RESULTS / "distill_cpu.json").read_text())["benchmarks"]
    assert f"costs {found['extra_info']['step_over_parts']:.2f} times its parts" in README


def test_every_named_file_exists():
    for name in re.findall(r"`((?:benchmarks|launch|csrc|kernels|ejmp|tests)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name
