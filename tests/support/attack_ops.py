"""Call every registered op with what it must not be called with: `python -m support.attack_ops`, or `make attack`.

A call follows from its number: an op, a kind of damage, and an argument of the small valid call in `op_calls` that is
damaged. Calls are made in processes of their own, which note each before they make it, so that one that ends or stops
the process is known. An op may refuse a call with a ValueError, RuntimeError or TypeError that names an argument, or
run; some kinds it has to refuse, and some must not change the result by a bit. `--call NUMBER` makes one call here.
"""

import argparse
import collections
import importlib
import mmap
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import torch

from ejmp_kernels import registry
from support.inputs import environment
from support.interpreter import patch_once
from support.op_calls import arguments_of, calls, names_of
from support.op_damage import KINDS, MUST_REFUSE, MUST_RUN, NotMadeError, damage, suits

SECONDS, BATCH, ROOM = 60, 50_000, 2 << 30
"""A call may take so long (s) and so much memory (bytes); calls per process."""
NAMESPACES = {"native": "ejmp", "triton": "ejmp_triton", "emulated": "ejmp_emulated"}
OUTCOMES = (
    "", "started", "not made", "ran", "refused", "by torch", "memory", "unnamed", "wrong error", "silent", "differs",
    "crashed", "hung",
)  # fmt: skip
"""What became of a call. By torch: no kernel for a layout, a wrong Python type. Memory: more than there is.

Bad are those from "unnamed" on: an error that names no argument, one of another type, damage that was not noticed, a
result that should be the same and is not, and calls that end or stop the process.
"""
BAD = OUTCOMES[OUTCOMES.index("unnamed") :]
NIGHTLY = {"native": 1_000_000, "emulated": 100_000, "triton": 3_000}
WRAPPERS = (
    "activation", "dense", "edge_embedding", "linear", "pair", "quadruplet", "radial", "sums", "triplet",
)  # fmt: skip
"""Modules that register what ops need beside their kernels."""
BY_TORCH = (
    "Could not run", "with Meta tensors", "Expected a value of type", "expected at most", "cannot be cast",
    "missing value for",
)  # fmt: skip


class Ops:
    """The ops of a backend with their valid calls and results."""

    def __init__(self, backend, library=None):
        for name in WRAPPERS:
            importlib.import_module(f"ejmp_kernels.{name}")
        if backend == "triton":
            registry.load_backend("triton")
            patch_once()
        if library:
            torch.ops.load_library(library)
        self.namespace = NAMESPACES[backend]
        self.names, made = names_of(self.namespace), calls()
        self.arguments = {name: arguments_of(self.namespace, name, made) for name in self.names}
        self.suited = {kind: [n for n in self.names if suits(kind, self.arguments[n])] or self.names for kind in KINDS}
        self.results = {name: self.call(name, self.valid(name)) for name in self.names}

    def call(self, name, arguments):
        """Return the results of an op."""
        result = getattr(getattr(torch.ops, self.namespace), name)(*arguments.values())
        return [result] if isinstance(result, torch.Tensor | str) else list(result)

    def valid(self, name):
        """Return the arguments of a valid call, which an op that overwrites them may have."""
        fields = self.arguments[name].items()
        return {key: x.clone() if name.endswith("_") and isinstance(x, torch.Tensor) else x for key, x in fields}

    def choose(self, number):
        """Return the op, the kind of damage, and the random numbers of a call."""
        rng = random.Random(number)
        kind = rng.choice(KINDS)
        return rng.choice(self.suited[kind]), kind, rng

    def attempt(self, name, kind, rng):
        """Make a call and return its outcome."""
        try:
            arguments, damaged = damage(kind, self.valid(name), rng)
        except NotMadeError:
            return "not made", ""
        try:
            result = self.call(name, arguments)
        except (ValueError, RuntimeError, TypeError) as error:
            return self.judge(kind, str(error), arguments), f"{damaged}: {error}"
        except Exception as error:  # noqa: BLE001 - it is what is looked for
            return "wrong error", f"{damaged}: {type(error).__name__} {error}"
        if kind in MUST_REFUSE:
            return "silent", damaged
        return ("ran" if kind not in MUST_RUN or self.same(name, result) else "differs"), damaged

    def judge(self, kind, message, arguments):
        """Return the outcome of a call that raised."""
        if kind in MUST_RUN and "must be contiguous" not in message:  # what is overwritten has to be
            return "differs"
        if any(text in message for text in ("allocate", "bad_alloc", "Storage size", "overflow", "vector::")):
            return "memory"
        if any(text in message for text in BY_TORCH):
            return "by torch"
        names = "|".join(arguments)
        return "refused" if re.search(rf"(?<!\w)({names}) must |: ({names}): ", message) else "unnamed"

    def same(self, name, results):
        """Return whether results are those of the valid call, to the last bit where no vendor's product decides."""
        exact = name not in ("matmul", "product", "linear_activate")
        return all(equal(x, y, exact=exact) for x, y in zip(results, self.results[name], strict=True))


def equal(x, y, *, exact):
    if not isinstance(x, torch.Tensor):
        return x == y
    return torch.equal(x, y) if exact else torch.allclose(x, y, rtol=1e-5, atol=1e-6)


def make_calls(backend, first, count, notes, library):
    """Make calls one after another and note what became of each: its kind and its outcome in a byte each."""
    warnings.simplefilter("ignore")
    ops = Ops(backend, library)
    with Path(notes).open("r+b") as file:
        noted = mmap.mmap(file.fileno(), 2 * count)
    if "ASAN_OPTIONS" not in os.environ:  # its shadow memory is larger than any limit
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + ROOM,) * 2)
    for i in range(count):
        name, kind, rng = ops.choose(first + i)
        noted[2 * i : 2 * i + 2] = bytes([KINDS.index(kind), OUTCOMES.index("started")])
        if os.environ.get("ATTACK_CRASHES") == str(first + i):  # for the test of this file
            os.kill(os.getpid(), signal.SIGSEGV)
        outcome, _ = ops.attempt(name, kind, rng)
        noted[2 * i + 1] = OUTCOMES.index(outcome)


def watch(process, notes):
    """Wait for a process; return how it ended: "", "crashed", "hung" or "failed"."""
    last, since = None, time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        state = notes.read_bytes()
        if state != last or not any(state):
            last, since = state, time.monotonic() if any(state) else since
        if time.monotonic() - since > (SECONDS if any(state) else 10 * SECONDS):
            process.kill()
            process.wait()
            return "hung"
    if process.returncode == 1:  # an error of this file, and no call
        return "failed"
    return "crashed" if process.returncode else ""


def attack(backend, count, first=0, library=None):
    """Make calls; return how many there were of each kind and outcome, and the numbers of those that went wrong."""
    counts, bad, number = collections.Counter(), [], first
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes"
        while number < first + count:
            size = min(BATCH, first + count - number)
            notes.write_bytes(bytes(2 * size))
            command = [sys.executable, "-m", "support.attack_ops", "--backend", backend, "--notes", str(notes)]
            command += ["--first", str(number), "--count", str(size), *(["--library", library] if library else [])]
            with (Path(folder) / "said").open("w+") as said:
                with subprocess.Popen(command, env=environment(), stderr=said) as process:
                    ended = watch(process, notes)
                said.seek(0)
                report = said.read()
            if ended == "failed":
                raise RuntimeError(f"{backend}: {report[-20_000:]}")
            state = notes.read_bytes()
            done = size
            for i in range(size):
                kind, outcome = KINDS[state[2 * i]], OUTCOMES[state[2 * i + 1]]
                if outcome in ("", "started"):
                    sys.stdout.write(report[:4000])
                    done, outcome = i + 1, ended
                counts[kind, outcome] += 1
                if outcome in BAD:
                    bad.append((number + i, kind, outcome))
                if done == i + 1 and ended:
                    break
            number += done
    return counts, bad


def table(counts):
    """Return the counts as lines of kinds and outcomes."""
    seen = [outcome for outcome in OUTCOMES if any(key[1] == outcome for key in counts)]
    lines = ["| kind | attempts | " + " | ".join(seen) + " |", "|" + "---|" * (len(seen) + 2)]
    for kind in [kind for kind in KINDS if any(key[0] == kind for key in counts)]:
        row = [counts[kind, outcome] for outcome in seen]
        lines.append(f"| {kind} | {sum(row)} | " + " | ".join(str(n or "") for n in row) + " |")
    total = [sum(n for (_, outcome), n in counts.items() if outcome == name) for name in seen]
    return "\n".join([*lines, f"| all | {sum(total)} | " + " | ".join(map(str, total)) + " |"])


def explain(backend, number, library):
    """Make one call here and say what it was."""
    ops = Ops(backend, library)
    name, kind, rng = ops.choose(number)
    sys.stdout.write(f"{name}, {kind}: ")
    sys.stdout.flush()
    sys.stdout.write(": ".join(ops.attempt(name, kind, rng)) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=NAMESPACES)
    parser.add_argument("--count", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--library", help="library of the emulated CUDA ops (support.build_native)")
    parser.add_argument("--notes")
    parser.add_argument("--call", type=int)
    options = parser.parse_args()
    if options.call is not None:
        return explain(options.backend, options.call, options.library)
    if options.notes:
        return make_calls(options.backend, options.first, options.count, options.notes, options.library)
    failed = False
    for backend in [options.backend] if options.backend else NIGHTLY:
        if backend == "emulated" and not options.library:
            from support.build_native import build_emulated

            options.library = str(build_emulated())
        start = time.perf_counter()
        library = options.library if backend == "emulated" else None
        counts, bad = attack(backend, options.count or NIGHTLY[backend], options.first, library)
        sys.stdout.write(f"{backend}: {time.perf_counter() - start:.0f} s\n{table(counts)}\n")
        for number, kind, outcome in bad[:20]:
            sys.stdout.write(f"  {outcome}: --backend {backend} --call {number} ({kind})\n")
        sys.stdout.flush()
        failed |= bool(bad)
    sys.exit(failed)


if __name__ == "__main__":
    main()
