"""The GPU campaign: everything that needs a GPU, in one command or step by step (see the Makefile's gpu targets).

    PYTHONPATH=.:kernels:benchmarks python3 benchmarks/gpu_campaign.py all [--dry] [--out FOLDER] [--seconds N]
    PYTHONPATH=.:kernels:benchmarks python3 benchmarks/gpu_campaign.py ceilings ops ...

It needs torch, triton, numpy and pytest, and no network. Each step writes its part of FOLDER/campaign.json after every
row, and the page FOLDER/README.md is made of the steps that are there. A step that cannot run, or a part of one, says
why in it.
--dry goes through all of it on the CPU, with Triton's interpreter and tiny sizes: it proves the command, not the speed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from ejmp_kernels import availability

ROOT = Path(__file__).resolve().parents[1]
SECONDS = {
    "build": 240, "test": 90, "sanitize": 60, "ceilings": 20, "ops": 60, "chain": 25, "blocks": 60, "compare": 50,
    "compiled": 100, "train": 40, "tune": 25, "profile": 15, "report": 10,
}  # fmt: skip
"""Budget of each step, in s, after which it starts nothing new; the sanitizer's is for each of its tools."""
HARD = 530
"""Time after which a step is ended, whatever it does, in s."""
TOTAL = 585
"""Time that `all` shares out, in s; a step that comes late gets less, and records what it left out."""
TESTS = (
    "kernels/test_ops.py", "kernels/test_triton*.py", "kernels/test_gemm.py", "model/test_backend.py",
    "model/test_golden.py", "model/test_model.py", "model/test_compile*.py", "model/test_no_waiting.py",
    "model/test_triton_model.py", "graph/test_padding*.py", "measure/test_profile.py",
)  # fmt: skip
"""Patterns of the test files, below tests/, that are run on a GPU."""
DRY_TESTS = ("measure/test_profile.py", "-k", "cards")
"""The test file of a dry run, and pytest's options."""


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a subprocess, which finds the project's folders without an installation."""
    paths = [str(ROOT / name) for name in (".", "kernels", "tests", "benchmarks")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH")]))} | more


def run_command(command: list[str], seconds: float, **env: str) -> tuple[int | None, str]:
    """Return the exit status, None if time ran out, and what was printed."""
    with tempfile.TemporaryFile("w+") as output:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment(**env), stdout=output, stderr=subprocess.STDOUT, timeout=seconds,
                check=False,
            )  # fmt: skip
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = None
        output.seek(0)
        return status, output.read()


def run_build(setting) -> None:
    """Build the CUDA extension in place; without it, the campaign goes on with Triton."""
    from gpu_step import Skip, Step

    step = Step("build", setting)
    with step.row(what="extension") as row:
        if setting.dry:
            raise Skip("a dry run leaves the tree as it is; nvcc was not called")
        start, jobs = time.perf_counter(), str(os.cpu_count() or 1)
        command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
        status, log = run_command(command, HARD - 60, MAX_JOBS=jobs, NVCC_APPEND_FLAGS="--threads 3")
        row.update({"ms": 1e3 * (time.perf_counter() - start), "status": status, "log_tail": log[-3000:]})
        code = "from ejmp_kernels import availability; print(availability.why_unavailable('cuda') or 'there')"
        row["native_on_cuda"] = run_command([sys.executable, "-c", code], 60)[1].strip().splitlines()[-1]
        if row["native_on_cuda"] != "there":
            raise RuntimeError(f"the CUDA extension is not there, Triton's kernels are: {row['native_on_cuda']}")


def run_test(setting) -> None:
    """Run the tests of ops and models on the GPU, with compiled Triton."""
    from gpu_step import Step

    step = Step("test", setting, triton_interpret="1" if setting.dry else "0")
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
        files = test_files(DRY_TESTS[:1] if setting.dry else TESTS)
        command += ["--continue-on-collection-errors", f"--junitxml={report}", *files]
        command += DRY_TESTS[1:] if setting.dry else []
        interpret = step.result["triton_interpret"]
        status, log = run_command(command, min(HARD, setting.seconds), TRITON_INTERPRET=interpret, PYTHONUNBUFFERED="1")
        step.result |= {"status": status, "log_tail": log[-6000:]}
        counts = count_tests(report) if report.exists() else count_lines(log)
    for name, row in counts.items():
        step.add({"file": name, **row})
    if status is None:
        step.add({"file": "what came after", "skipped": f"the step's {setting.seconds:.0f} s were used up"})
    elif not counts:
        step.add({"file": "all", "failed": f"pytest ended with {status}"})
    if setting.dry:
        step.add({"file": "what a GPU would run", **collected()})


def test_files(patterns: Iterable[str]) -> list[str]:
    """Return the test files that patterns below tests/ name."""
    return [str(file) for file in sorted({file for pattern in patterns for file in (ROOT / "tests").glob(pattern)})]


def collected() -> dict[str, Any]:
    """Collect the tests that a GPU would run; a file may be left out for a package that is not there, and only so."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", *test_files(TESTS)]
    _, log = run_command(command, HARD, TRITON_INTERPRET="1")
    count = re.search(r"(\d+)(?:/\d+)? tests? collected", log)
    errors = re.findall(r"^ERROR (\S+)", log, re.MULTILINE)
    lacking = re.findall(r"^E +ModuleNotFoundError: (?:No module named '|import of )(\w+)", log, re.MULTILINE)
    row: dict[str, Any] = {"collected": int(count[1]) if count else 0}
    row["left_out"] = {f"not collected: there is no {name}": lacking.count(name) for name in lacking}
    return row if count and len(errors) == len(lacking) else row | {"failed": log[-2000:]}


def count_lines(log: str) -> dict[str, dict]:
    """Count results by file in what `pytest -v` printed before it was ended."""
    found: dict[str, dict] = {}
    for file, test, result in re.findall(
        r"^tests/(?:\w+/)*(\w+)\.py::(\S+) (PASSED|FAILED|ERROR|SKIPPED)", log, re.MULTILINE
    ):
        row = found.setdefault(file, {"passed": 0, "failures": [], "left_out": {}})
        if result == "PASSED":
            row["passed"] += 1
        elif result == "SKIPPED":
            row["left_out"]["?"] = row["left_out"].get("?", 0) + 1
        else:
            row["failures"].append(test)
            row["failed"] = f"{len(row['failures'])} tests failed"
    return found


def count_tests(report: Path) -> dict[str, dict]:
    """Count results by file in the report that pytest has just written."""
    found: dict[str, dict] = {}
    for case in ET.parse(report).iter("testcase"):  # noqa: S314
        name = (case.get("classname") or case.get("name") or "").split(".")
        file = next((part for part in name if part.startswith("test_")), ".".join(name))
        row = found.setdefault(file, {"passed": 0, "failures": [], "left_out": {}, "ms": 0.0})
        row["ms"] += 1e3 * float(case.get("time") or 0)
        error = case.find("error")
        lacking = None if error is None else re.search(r"ModuleNotFoundError: No module named '(\w+)", error.text or "")
        if lacking:
            reason = f"not collected: there is no {lacking[1]}"
            row["left_out"][reason] = row["left_out"].get(reason, 0) + 1
        elif case.find("failure") is not None or error is not None:
            row["failures"].append(case.get("name"))
        elif (skipped := case.find("skipped")) is not None:
            reason = skipped.get("message") or ""
            row["left_out"][reason] = row["left_out"].get(reason, 0) + 1
        else:
            row["passed"] += 1
    for row in found.values():
        if row["failures"]:
            row["failed"] = f"{len(row['failures'])} tests failed"
    return found


def run_sanitize(setting) -> None:
    """Watch the native kernels with compute-sanitizer, where it exists."""
    from gpu_step import Skip, Step

    step = Step("sanitize", setting)
    script = [sys.executable, "benchmarks/gpu_native.py", "--device", setting.device.type]
    script += ["--tiny"] if setting.dry else []
    with step.row(tool="none") as row:
        step.require_time()
        if availability.why_unavailable(setting.device.type) is not None:
            raise Skip(f"no native kernels: {availability.why_unavailable(setting.device.type)}")
        start = time.perf_counter()
        status, log = run_command(script, setting.seconds)
        row.update({"ms": 1e3 * (time.perf_counter() - start), "status": status, "log_tail": log[-2000:]})
        if status != 0:
            raise RuntimeError(f"the script ended with {status}: {log[-300:]}")
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    for name in ("memcheck", "racecheck"):
        with step.row(tool=name) as row:
            if setting.dry or setting.device.type != "cuda":
                raise Skip("there is no GPU to watch")
            if tool is None:
                raise Skip("compute-sanitizer is not there")
            if "status" not in step.result["rows"][0]:
                raise Skip("the script did not run without it")
            options = ["--tool", name, "--error-exitcode", "9", "--kernel-regex", "kns=ejmp"]
            start = time.perf_counter()
            status, log = run_command([tool, *options, *script], setting.seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            if status is None:
                raise Skip(f"it did not end within {setting.seconds:.0f} s")
            summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY.*)", log)
            row.update({"ms": 1e3 * (time.perf_counter() - start), "status": status, "log_tail": log[-3000:]})
            row["summary"] = summary[-1] if summary else None
            if status != 0 or not summary:
                raise RuntimeError(f"{name} ended with {status}: {summary or log[-300:]}")


def run_report(setting) -> None:
    """Write the page of the results that are there."""
    from gpu_report import page

    (setting.out / "README.md").write_text(page(setting.out))
    print(f"{setting.out / 'README.md'}")


def steps() -> dict[str, Callable]:
    """Return the function that runs each step, by name, in the order of a campaign."""
    import gpu_models
    import gpu_ops
    import gpu_train

    return {
        "build": run_build,
        "test": run_test,
        "sanitize": run_sanitize,
        "ceilings": gpu_ops.run_ceilings,
        "ops": gpu_ops.run_ops,
        "chain": gpu_ops.run_chain,
        "blocks": gpu_models.run_blocks,
        "compare": gpu_models.run_compare,
        "compiled": gpu_models.run_compiled,
        "train": gpu_train.run_train,
        "tune": gpu_train.run_tune,
        "profile": gpu_train.run_profile,
        "report": run_report,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "steps", nargs="+", choices=("all", *SECONDS), metavar="STEP", help=f"all, {', '.join(SECONDS)}"
    )
    parser.add_argument("--dry", action="store_true", help="on the CPU, interpreted, tiny")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/GPU, dry: build/gpu-dry")
    parser.add_argument("--seconds", type=float, help="of each named step, instead of its own budget")
    options = parser.parse_args(arguments)
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from gpu_provenance import folder_name
    from gpu_setting import Setting

    device = torch.device("cpu" if options.dry else "cuda")
    if not options.dry and not torch.cuda.is_available():
        print("there is no GPU here; --dry (make gpu-dry) goes through it without one", file=sys.stderr)
        return 2
    out = options.out or (ROOT / "build/gpu-dry" if options.dry else ROOT / "benchmarks/results" / folder_name(device))
    names = list(SECONDS) if "all" in options.steps else options.steps
    if len(names) > 1 and not options.dry:
        return one_by_one(names, options, out)
    for name in names:
        seconds = options.seconds or (HARD if options.dry else SECONDS[name])
        print(f"{name} ({seconds:.0f} s)", flush=True)
        steps()[name](Setting(device=device, dry=options.dry, out=out, seconds=seconds))
    return 0


def one_by_one(names: list[str], options: argparse.Namespace, out: Path) -> int:
    """Run each step in a process of its own: one that breaks the GPU's context does not break the next."""
    worst, start = 0, time.perf_counter()
    for name in names:
        left = TOTAL - (time.perf_counter() - start) if "all" in options.steps else HARD
        seconds = options.seconds or max(1.0, min(SECONDS[name], left))
        command = [sys.executable, __file__, name, "--out", str(out), "--seconds", f"{seconds:.0f}"]
        try:
            status = subprocess.run(command, cwd=ROOT, env=environment(), check=False, timeout=HARD).returncode
        except subprocess.TimeoutExpired:
            status = 1
            print(f"{name}: ended after {HARD} s; the rows it had are in {out}", flush=True)
        worst = max(worst, abs(status))
        print(f"{name}: {'done' if status == 0 else 'FAILED'}, {time.perf_counter() - start:.0f} s in all", flush=True)
    return min(worst, 1)


if __name__ == "__main__":
    sys.exit(main())
