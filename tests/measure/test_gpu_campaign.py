"""The GPU campaign without a GPU: its dry mode end to end on a bare installation, and its parts."""

import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_campaign
import gpu_models
import gpu_ops
import gpu_report
import gpu_setting
import gpu_step
import pytest
import torch
from support.inputs import require_native

import ejmp
from ejmp.track import schema
from ejmp_kernels import availability

ROOT = Path(__file__).parents[2]
ABSENT = (
    "ase", "deepspeed", "fvcore", "h5py", "lmdb", "matplotlib", "mpi4py", "pooch", "rich", "scipy",
    "tblite", "tensorboard", "wandb",
)  # fmt: skip
MEASURED = ("ceilings", "ops", "chain", "blocks", "compare", "compiled", "train", "profile")


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The results of `make gpu-dry`, made with nothing installed but torch, triton, numpy and pytest."""
    folder = tmp_path_factory.mktemp("dry")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    paths = [folder, ROOT, ROOT / "kernels", ROOT / "benchmarks"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "benchmarks/gpu_campaign.py", "all", "--dry", "--out", folder / "out"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "out"


def rows(folder, step):
    return gpu_step.read_steps(folder)[step]["rows"]


def test_every_step_leaves_its_file_and_its_section(dry):
    page = (dry / "README.md").read_text()
    assert "A dry run" in page
    assert "Not run." not in page
    for step, title in gpu_report.TITLES.items():
        result = gpu_step.read_steps(dry)[step]
        assert (result["step"], result["dry"]) == (step, True)
        assert result["rows"]
        assert f"## {title}" in page
        made = result["provenance"]
        assert {"commit", "torch", "python", "cpu", "date", "triton", "native"} <= set(made)
        assert made["triton_interpreter"]
        assert made["nvidia_smi"] == "no GPU"


def test_nothing_fails_and_what_is_left_out_has_its_reason(dry):
    reasons = {}
    for step in gpu_report.TITLES:
        for row in rows(dry, step):
            assert "failed" not in row, (step, row)
            if "skipped" in row:
                assert len(row["skipped"]) > 10
                reasons.setdefault(step, set()).add(row["skipped"])
    assert rows(dry, "test")[0]["passed"] > 0
    assert rows(dry, "test")[-1]["collected"] > 700
    assert "not collected: there is no ase" in rows(dry, "test")[-1]["left_out"]
    assert reasons["build"] == {"a dry run leaves the tree as it is; nvcc was not called"}
    assert "there is no GPU to watch" in reasons["sanitize"]
    assert "CUDA graphs need a GPU" in reasons["compiled"]
    page = (dry / "README.md").read_text()
    assert all(reason in page for found in reasons.values() for reason in found)


@pytest.mark.parametrize("step", MEASURED)
def test_every_row_has_its_time_error_and_share_of_the_ceiling(dry, step):
    done = [row for row in rows(dry, step) if "skipped" not in row]
    assert done
    for row in done:
        assert row["ms"] > 0
        if row.get("contestant") != "products":
            assert math.isfinite(row["error"])
            assert row["error"] < 1e-3
        share = row.get("gemm_share") or row.get("copy_share")
        assert share > 0
        assert row.get("mfu") is None  # there is no datasheet of this


@pytest.mark.parametrize("step", MEASURED)
def test_a_history_takes_what_a_step_measured(dry, step):
    """As `ejmp bench history add` reads it: one record per measured row, each under a name of its own."""
    done = [row for row in rows(dry, step) if "skipped" not in row]
    read = schema.records_of(dry / "campaign.json")
    assert not read.problems
    found = [record for record in read.records if record.suite == f"gpu_{step}_dry"]
    assert len({record.series for record in found}) == len(found) == len(done)
    for row, record in zip(done, found, strict=True):
        assert record.median == pytest.approx(1e-3 * row["ms"])
        assert (record.error, record.dtype) == (row.get("error"), row.get("precision", "fp32"))
        assert record.machine["device"] == "cpu"
        if row.get("tflops"):
            assert record.gflop == pytest.approx(row["tflops"] * row["ms"])
            assert record.product_share == pytest.approx(row["gemm_share"])
        if row.get("x of reference"):
            assert record.speedup == pytest.approx(row["x of reference"])


def test_launch_settings_are_tried(dry):
    """Each kernel of a forward pass, and the tables have what the rows say."""
    done = [row for row in rows(dry, "tune") if "skipped" not in row]
    assert {"linear_activate", "quadruplet", "triplet"} <= {row["what"] for row in done}
    assert all(0 < row["ratio"] <= 1 for row in done)
    tables = json.loads((dry / "configs.json").read_text())
    for row in done:
        assert row["settings"].items() <= tables["interpreter float32"].get(row["what"], {}).items(), row


def test_every_backend_is_measured(dry):
    there = {"reference"}
    if availability.why_unavailable() is None:
        there.add("native")
    if importlib.util.find_spec("triton"):
        there.add("triton")
    for step, key in (("ops", "backend"), ("chain", "contestant"), ("compare", "way"), ("train", "backend")):
        done = {row[key] for row in rows(dry, step) if "skipped" not in row}
        assert there - {"reference"} <= done, step
    done = [row for row in rows(dry, "ops") if "skipped" not in row]
    for backend, order in itertools.product(there, ("forward", "backward", "second")):
        ops = {row["op"] for row in done if (row["backend"], row["order"]) == (backend, order)}
        assert ops == set(gpu_ops.bench_kernels.OPS)
    assert {"throughput", "torch.compile(reference)"} <= {r["way"] for r in rows(dry, "compiled") if "ms" in r}
    done = [row for row in rows(dry, "train") if "skipped" not in row]
    assert len(done) == 2 * len(there)
    assert {row["kind"] for row in done} == {"energy and gradient forces", "distillation"}
    assert {row["blocks"] for row in rows(dry, "blocks")} == {2, 3}


def test_counts_of_the_dry_run_are_the_models(dry):
    """Rates are of the model's own work, whatever ran it."""
    (row, *_) = [r for r in rows(dry, "blocks") if r["blocks"] == 3 and r["structures"] == 2]
    assert row["tflops"] == pytest.approx(2e-3 * row["gmac"] / (1e-3 * row["ms"]))
    two = next(r for r in rows(dry, "blocks") if r["blocks"] == 3 and r["structures"] == 1)
    assert row["gmac"] == 2 * two["gmac"]
    assert row["edges"] == 2 * two["edges"]


@pytest.fixture
def setting(tmp_path):
    return gpu_setting.Setting(device=torch.device("cpu"), dry=True, out=tmp_path, seconds=60)


def test_a_row_that_fails_says_why_and_the_next_one_runs(setting):
    step = gpu_step.Step("trial", setting)
    with step.row(way="a"):
        raise torch.OutOfMemoryError
    with step.row(way="b"):
        raise ValueError("no such thing")
    with step.row(way="c") as row:
        row["ms"] = 1.0
    found = rows(setting.out, "trial")
    assert found[:2] == [
        {"way": "a", "skipped": "out of memory"},
        {"way": "b", "failed": "ValueError: no such thing"},
    ]
    assert (found[2]["way"], found[2]["ms"]) == ("c", 1.0)
    with step.row(way="d"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    with step.row(way="e"):
        step.require_time()
    assert "broke the CUDA context" in rows(setting.out, "trial")[-1]["skipped"]


def test_a_step_ends_with_its_time(tmp_path):
    setting = gpu_setting.Setting(device=torch.device("cpu"), dry=True, out=tmp_path, seconds=-1)
    step = gpu_step.Step("trial", setting)
    with step.row(way="a"):
        step.require_time()
    assert "were used up" in rows(tmp_path, "trial")[0]["skipped"]


def test_what_is_wrong_is_not_timed(setting, monkeypatch):
    monkeypatch.setattr(gpu_ops.Inputs, "checked", lambda *_: (float("nan"), None))
    monkeypatch.setattr(gpu_ops.bench_kernels, "OPS", {"activate": gpu_ops.bench_kernels.OPS["activate"]})
    gpu_ops.run_ops(setting)
    found = rows(setting.out, "ops")
    assert all("ms" not in row for row in found)
    assert any("not timed" in row.get("failed", "") for row in found)


def test_wrong_models_are_not_timed(setting, monkeypatch):
    monkeypatch.setattr(gpu_models.Exact, "error", lambda *_: 1.0)
    gpu_models.run_blocks(setting)
    assert all("not timed" in row["failed"] and "ms" not in row for row in rows(setting.out, "blocks"))


def test_a_step_that_is_ended_keeps_what_each_way_showed(setting, monkeypatch):
    """Ways are timed by turns when all are ready; until then each is on disk with its error and a time of its own."""

    def end(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_models, "milliseconds_or_why", end)
    with pytest.raises(KeyboardInterrupt):
        gpu_models.run_compare(setting)
    found = {row["way"]: row for row in gpu_step.read_steps(setting.out)["compare"]["unfinished"]}
    assert set(found) == set(gpu_models.WAYS)
    assert found["reference"]["ms_alone"] > 0
    assert found["reference"]["error"] < 1e-3


def test_errors_of_energies_are_seen(setting):
    model = gpu_setting.make_model(setting, 1)
    exact = gpu_models.Exact(setting, model)
    graph = setting.graph(2)
    with torch.no_grad():
        energy = model(graph).energy
    assert 0 < exact.error(energy) < 1e-5
    assert exact.error(energy + 0.1 * exact.scale) == pytest.approx(0.1, rel=1e-3)


def test_sizes_of_batches_are_multiples(setting):
    big = gpu_setting.Setting(device=torch.device("cpu"), dry=False, out=setting.out, seconds=1)
    assert ejmp.measure.flops.graph_sizes(big.graph(8)) == big.sizes(8)
    assert len({id(s) for s in big.workload(8).structures}) == 4


def test_tests_that_lack_a_package_are_left_out_and_the_others_run(tmp_path, setting, monkeypatch):
    """What a test imports, and what its helpers import; an import inside a test fails there."""
    (tmp_path / "tests" / "support").mkdir(parents=True)
    (tmp_path / "tests" / "support" / "helper.py").write_text("import nosuchhelper\n")
    texts = {
        "test_a": "import os, nosuchpackage.part\n",
        "test_b": "def test_x():\n    pass\ndef test_y():\n    import nosuchpackage\n",
        "test_c": "from support.helper import x\n",
        "test_d": "def test_x(:\n",
    }
    for name, text in texts.items():
        (tmp_path / "tests" / f"{name}.py").write_text(text)
    monkeypatch.setattr(gpu_campaign, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_campaign, "DRY_TESTS", ("test_*.py",))
    gpu_campaign.run_test(setting)
    found = {row["file"]: row for row in rows(setting.out, "test")}
    assert found["test_a"]["left_out"] == {"not collected: there is no nosuchpackage": 1}
    assert found["test_c"]["left_out"] == {"not collected: there is no nosuchhelper": 1}
    assert (found["test_b"]["passed"], found["test_b"]["failures"]) == (1, ["test_y"])
    assert found["test_d"]["failed"] == "1 tests failed"
    monkeypatch.setattr(gpu_campaign, "TESTS", ("test_[abc].py",))
    left_out = {f"not collected: there is no nosuch{name}": 1 for name in ("helper", "package")}
    assert gpu_campaign.collected() == {"collected": 2, "left_out": left_out}
    monkeypatch.setattr(gpu_campaign, "TESTS", ("test_*.py",))
    assert "SyntaxError" in gpu_campaign.collected()["failed"]


def test_every_pattern_of_tests_names_a_file():
    for pattern in (*gpu_campaign.TESTS, gpu_campaign.DRY_TESTS[0]):
        assert list((ROOT / "tests").glob(pattern)), pattern


def test_results_of_tests_are_counted_by_file(tmp_path):
    report = tmp_path / "r.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.model.test_a" name="x" time="0.5"/>'
        '<testcase classname="tests.model.test_a" name="y"><failure/></testcase>'
        '<testcase classname="tests.graph.test_b" name="z"><skipped message="needs a GPU"/></testcase>'
        "</testsuite></testsuites>"
    )
    found = gpu_campaign.count_tests(report)
    assert found["test_a"]["passed"] == 1
    assert found["test_a"]["failures"] == ["y"]
    assert found["test_a"]["failed"] == "1 tests failed"
    assert found["test_b"]["left_out"] == {"needs a GPU": 1}
    assert "failed" not in found["test_b"]


def test_results_of_tests_that_did_not_end_are_counted():
    log = "tests/model/test_a.py::test_x[1-a] PASSED [ 1%]\ntests/model/test_a.py::test_y FAILED [ 2%]\n"
    log += "tests/graph/test_b.py::test_z SKIPPED (no GPU) [ 3%]\ntests/graph/test_b.py::test_w "
    found = gpu_campaign.count_lines(log)
    assert found["test_a"] == {"passed": 1, "failures": ["test_y"], "left_out": {}, "failed": "1 tests failed"}
    assert found["test_b"] == {"passed": 0, "failures": [], "left_out": {"?": 1}}


def test_claims_are_held_against_what_was_measured():
    chain = [
        {"precision": "bf16", "contestant": "triton", "ms": 1.0, "of_products": 0.93, "error": 3e-3},
        {"precision": "bf16", "contestant": "eager", "ms": 1.0, "of_products": 0.99},
        {"precision": "fp32", "contestant": "native", "ms": 1.0, "of_products": 0.98},
    ]
    whole = [
        {"precision": "bf16", "way": "reference", "ms": 9.0, "mfu": 0.9, "x of as shipped": 9.0},
        {"precision": "bf16", "way": "latency", "ms": 1.0, "mfu": 0.47, "x of as shipped": 3.5, "error": 1e-2},
        {"precision": "bf16", "way": "triton", "skipped": "out of memory"},
    ]
    lines = gpu_report.claims({"chain": {"rows": chain}, "compare": {"rows": whole}})
    assert "(at least 90): 93 (triton, error 3.0e-03)" in lines[0]
    assert "(at least 45): 47 (latency" in lines[1]
    assert "(at least 3): 3.5" in lines[2]
    assert "not measured" in lines[3]


def test_the_campaign_refuses_to_run_without_a_gpu(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_campaign.main(["ops", "--out", str(tmp_path)]) == 2
    assert "--dry" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_make_has_a_target_per_step():
    make = shutil.which("make")
    if make is None:
        pytest.skip("there is no make")
    names = ["gpu", "gpu-dry", *(f"gpu-{step}" for step in gpu_campaign.SECONDS)]
    command = [make, "-n", "--no-print-directory", "RESULTS=/tmp/x", "BUDGET=9", *names]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(names)
    assert all("--out /tmp/x --seconds 9" in line and ".venv" not in line for line in lines)
    assert "--dry" in lines[1]
    assert sum(gpu_campaign.SECONDS.values()) < 800
    assert max(gpu_campaign.SECONDS.values()) <= gpu_campaign.HARD < 540


def test_the_script_under_the_sanitizer_uses_every_op():
    require_native()
    command = [sys.executable, ROOT / "benchmarks/gpu_native.py", "--device", "cpu", "--tiny"]
    paths = [ROOT, ROOT / "kernels", ROOT / "tests", ROOT / "benchmarks"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "largest error" in done.stdout
