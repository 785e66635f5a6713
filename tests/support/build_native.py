"""Builds of csrc beside the package's own, straight with g++: CUDA kernels emulated on the CPU, and with sanitizers.

`python -m support.build_native sanitized` makes build/sanitize/ejmp_kernels, a copy of the package whose extension is
compiled with AddressSanitizer and UndefinedBehaviorSanitizer, and build/sanitize/emulated.so; `emulated` makes
build/emulated/kernels.so.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
EMULATED = [CSRC / "bindings/cuda.cpp", *KERNELS]
NATIVE = [CSRC / "bindings/cpu.cpp", CSRC / "bindings/dense.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
SANITIZERS = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
SANITIZERS += ["-fno-sanitize=vptr", "-fopenmp"]  # which wants the type information that torch hides


def run_compiler(*command):
    """Run a compiler and return what it says.

    Raises:
        RuntimeError: if it fails, with what it says.
    """
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout + done.stderr


def build(sources, library, flags, jobs=None):
    """Compile and link a library of torch ops; only what is older than a source is compiled again."""
    flags = ["-fPIC", "-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi", *flags]
    flags += ["-fvisibility=hidden", *(f"-I{path}" for path in include_paths()), "-x", "c++"]
    links = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    links += [flag for flag in flags if flag.startswith("-fsanitize") or flag == "-fopenmp"]
    library.parent.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in CSRC.rglob("*") if path.is_file())
    objects = {source: library.with_name(f"{source.parent.name}-{source.name}.o") for source in sources}
    old = [s for s, made in objects.items() if not made.exists() or made.stat().st_mtime < newest]
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        list(pool.map(lambda source: run_compiler("g++", *flags, "-c", source, "-o", objects[source]), old))
    run_compiler("g++", "-shared", *objects.values(), *links, "-o", library)
    return library


def build_emulated(library=ROOT / "build/emulated/kernels.so", flags=(), jobs=None):
    """Build the CUDA ops of csrc/bindings/cuda.cpp for the CPU, as torch.ops.ejmp_emulated."""
    return build(EMULATED, library, ["-DEJMP_EMULATE", *flags], jobs)


def build_sanitized(folder=ROOT / "build/sanitize", jobs=None):
    """Build a copy of the package with sanitizers, and the emulated ops."""
    package = folder / "ejmp_kernels"
    shutil.copytree(
        ROOT / "kernels/ejmp_kernels", package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    made = build(NATIVE, folder / "objects/_C.so", SANITIZERS, jobs)
    shutil.copy(made, package / "_C.so")
    return build_emulated(folder / "emulated.so", SANITIZERS, jobs)


if __name__ == "__main__":
    {"sanitized": build_sanitized, "emulated": build_emulated}[sys.argv[1]](jobs=int(os.environ.get("JOBS", "1")))
