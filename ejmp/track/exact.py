"""What can be compared without timing: work, parameters, dispatches, memory, launch settings, compiled kernels.

All of it is exact and needs no GPU: any difference between two sides is one, and is listed.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ejmp.track.pairs import Worker
from ejmp.track.side import Side

Facts = dict[str, Any]
"""Values by a name such as "model/6-blocks multiply_adds"."""
Difference = tuple[str, Any, Any]
"""Name, value at BASE, value at HEAD; None where a side has none."""
UNITS = {"peak_bytes": "bytes", "shared": "bytes", "stack": "bytes", "spilled": "bytes"}
"""Units of facts that are no counts, by the last word of their names."""


def facts_of(worker: Worker, cases: Sequence[str]) -> Facts:
    """Ask a worker for the facts of cases; a fact it cannot give is left out."""
    found: Facts = {}
    for case in cases:
        try:
            found |= {f"{case} {name}": value for name, value in worker.ask("facts", case=case).items()}
        except ValueError:
            continue
    return found


def launch_settings(root: Path) -> Facts:
    """Return the committed launch settings of the Triton kernels, by section, kernel and name."""
    path = root / "kernels" / "ejmp_kernels" / "triton_kernels" / "configs.json"
    if not path.exists():
        return {}
    return {
        f"launch {section}/{kernel} {name}": value
        for section, kernels in json.loads(path.read_text()).items()
        for kernel, settings in kernels.items()
        for name, value in settings.items()
    }


def compiled_kernels(side: Side, script: Path, folder: Path) -> Facts:
    """Compile the Triton kernels of a side for a GPU that is not here; return registers, stack and shared memory.

    Args:
        side: whose kernels.
        script: tests/triton_compile_script.py of the running checkout.
        folder: where the compiler may put files.

    Raises:
        RuntimeError: if they do not compile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "kernels.json"
    environment = side.environment() | {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    asked = ["--architectures", "90", "--types", "bfloat16", "float32", "--json", str(file)]
    command = [side.python, str(script), *asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"{side.name}: its Triton kernels do not compile: {done.stderr.strip()[-500:]}")
    return kernel_facts(json.loads(file.read_text())["kernels"])


def kernel_facts(rows: Sequence[Mapping[str, Any]]) -> Facts:
    """Return facts of compiled kernels; those of one name are numbered in the order in which they were compiled."""
    found: Facts = {}
    seen: dict[str, int] = {}
    for row in rows:
        name = f"kernel {row['architecture']}/{row['dtype']}/{row['op']}/{row['kernel']}"
        seen[name] = seen.get(name, 0) + 1
        found |= {f"{name}#{seen[name]} {what}": row[what] for what in ("registers", "stack", "shared")}
    return found


PTXAS = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<spilled>\d+) bytes spill stores"
    r".*?Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
"""What ptxas says of one kernel with -v."""


def cuda_compiler() -> str | None:
    """Return the path of nvcc, or None if it is not there."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_kernels(root: Path, nvcc: str, folder: Path) -> Facts:
    """Compile the CUDA sources of a checkout for sm_90; return registers, stack, spilled bytes and shared memory.

    Args:
        root: the checkout; one without csrc/cuda has no such facts.
        nvcc: the compiler.
        folder: where the compiler may put files; it must exist.

    Raises:
        RuntimeError: if the sources do not compile.
    """
    found: Facts = {}
    for source in sorted((root / "csrc" / "cuda").glob("*.cu")):
        options = ["-O3", "-std=c++20", "-arch=sm_90", "-Xptxas", "-v", "-cubin", "-o", str(folder / "kernels.cubin")]
        done = subprocess.run([nvcc, *options, str(source)], capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise RuntimeError(f"{source}: it does not compile: {done.stderr.strip()[-500:]}")
        found |= ptxas_facts(done.stderr + done.stdout)
    return found


def ptxas_facts(printed: str) -> Facts:
    """Return facts of the kernels in what ptxas printed; names are those of the source where c++filt is there."""
    rows = [match.groupdict(default="0") for match in PTXAS.finditer(printed)]
    names = [row["kernel"] for row in rows]
    if shutil.which("c++filt"):
        words = ["c++filt", "-p", *names]
        names = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()  # noqa: S603
    return {
        f"kernel sm_90/cuda/{name.replace('(anonymous namespace)::', '').removeprefix('ejmp::cuda::')} {what}": int(
            row[what]
        )
        for name, row in zip(names, rows, strict=True)
        for what in ("registers", "stack", "spilled", "shared")
    }


def differences(base: Facts, head: Facts) -> list[Difference]:
    """Return every fact that is not the same on both sides, in the order of HEAD's; those HEAD lacks come last."""
    names = [*head, *(name for name in base if name not in head)]
    return [(name, base.get(name), head.get(name)) for name in names if base.get(name) != head.get(name)]


def shown(difference: Difference) -> str:
    """Return a difference as a line of text."""
    name, before, after = difference
    unit = UNITS.get(name.rpartition(" ")[2], "")
    if before is None or after is None:
        return f"{name}: {'new' if before is None else 'gone'} ({before if after is None else after})"
    ratio = f", x {after / before:.4g}" if _are_counts(before, after) and before else ""
    return f"{name}: {before} -> {after}{' ' if unit else ''}{unit}{ratio}"


def _are_counts(*values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def triton_script(root: Path) -> Path:
    """Return the script that compiles all Triton kernels.

    Raises:
        ValueError: if the package does not run from a checkout, which alone has it.
    """
    path = root / "tests" / "triton_compile_script.py"
    if not path.exists():
        raise ValueError(f"--kernels: expected a checkout with {path.relative_to(root)}, got {os.fspath(root)}")
    return path
