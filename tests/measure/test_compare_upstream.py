"""benchmarks/compare_upstream.py on a stand-in for a user's checkout, and on folders that are none."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support.public_jmp import write_checkout

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare_upstream.py"


def compare(*arguments, path=""):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    paths = os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=paths)
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_both_are_measured_by_turns(tmp_path):
    flags = ["--model", "jmp-s", "--blocks", "1", "--workloads", "H2O", "--precisions", "fp32", "--rounds", "2"]
    output = tmp_path / "out.json"
    run = compare(write_checkout(tmp_path / "jmp"), *flags, "--output", output)
    assert run.returncode == 0, run.stderr
    assert "structures | precision | what | JMP, ms | ejmp, ms" in run.stdout
    assert "a line of its own" not in run.stdout
    found = json.loads(output.read_text())
    assert [row["what"] for row in found["rows"]] == ["graph", "forward", "training step"]
    for row in found["rows"]:
        assert row["difference"] < 1e-5
        assert row["interval_95"][0] <= row["faster"] <= row["interval_95"][1]
    assert found["rows"][2]["ejmp_peak_mib"] > found["rows"][1]["ejmp_peak_mib"] > 0
    assert found["provenance"]["threads"] == 1


def test_other_outputs_are_not_timed(tmp_path):
    checkout = write_checkout(tmp_path)
    backbone = checkout / "src/jmp/models/gemnet/backbone.py"
    backbone.write_text(backbone.read_text().replace("found.mlp_E[-1]", "1.01 * found.mlp_E[-1]"))
    run = compare(checkout, "--model", "jmp-s", "--blocks", "1", "--workloads", "H2O", "--precisions", "fp32")
    assert run.returncode == 1
    assert "these are not the same models" in run.stderr
    assert not run.stdout


def test_what_is_missing_is_named(tmp_path):
    run = compare(tmp_path)
    assert run.returncode == 1
    assert run.stderr.strip() == f"{tmp_path}: no checkout of JMP: src/jmp/models/gemnet/backbone.py is missing"
    checkout = write_checkout(tmp_path)
    (checkout / "src/jmp/models/gemnet/backbone.py").write_text("import no_such_scatter\n")
    run = compare(checkout)
    assert run.returncode == 1
    assert "its code needs a package that is not installed here (No module named 'no_such_scatter')" in run.stderr


def test_another_copy_is_not_measured(tmp_path):
    other = write_checkout(tmp_path / "other")
    run = compare(write_checkout(tmp_path / "jmp"), path=other / "src")
    assert run.returncode == 1
    assert "another copy of the package jmp comes before it" in run.stderr
