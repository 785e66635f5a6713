"""Attempts to do harm with a file, each in a process of its own with limits of time and memory."""

import contextlib
import json
import os
import resource
import select
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 20
"""Time that an attempt may compute; it may last three times as long, where others compute beside it."""
MEMORY = 4 << 30
RESIDENT = 700 << 20
"""Most resident memory that an attempt may add, bytes: contents of FLOOR bytes, and what becomes of them."""


@dataclass(frozen=True)
class Attempt:
    """One file, and what reads it."""

    kind: str
    name: str
    make: Any
    use: Any
    outcome: str = "refused"
    short: bool = True
    """Whether it belongs to the part that tests run."""


def run(attempt, folder):
    """Return outcome and explanation of an attempt, in a process of its own."""
    path = attempt.make(folder)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(_in_child(attempt, path)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    ready = select.select([reader], [], [], 3 * SECONDS)[0]
    found = os.read(reader, 1 << 16) if ready else b""
    os.close(reader)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not ready or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return "too slow", f"more than {SECONDS} s"
    return json.loads(found) if found else ("crash", f"status {status}")


def _in_child(attempt, path):
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, 2 * SECONDS))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
    ):
        try:
            outcome = ["read", str(attempt.use(path))]
        except (ValueError, OSError) as error:
            named = path.name in str(error)
            outcome = ["refused" if named else "refused without its name", f"{type(error).__name__}: {error}"[:400]]
        except BaseException as error:  # noqa: BLE001
            outcome = ["another error", f"{type(error).__name__}: {error}"[:400]]
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return ["too much memory", f"{more / 1024:.0f} MiB; {outcome}"] if more << 10 > RESIDENT else outcome


def attack(attempts, out=None):
    """Run attempts; return how many had which outcome by kind, and the failures."""
    counts, failures = {}, []
    for attempt in attempts:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            outcome, why = run(attempt, Path(folder))
        counts.setdefault(attempt.kind, Counter())[outcome] += 1
        if outcome != attempt.outcome:
            failures.append(f"{attempt.kind}: {attempt.name}: {outcome}: {why}")
        if out is not None:
            out.write(
                f"{attempt.kind:14} {attempt.name:45} {outcome:10} {time.perf_counter() - start:6.2f} s  {why[:300]}\n"
            )
            out.flush()
    return counts, failures
