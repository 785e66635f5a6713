"""How many cores there are, and how many of them other work leaves free."""

import math
import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
"""Where Linux counts what its processors did, in ticks."""
LOADED = 0.3
"""Number of cores that others may keep busy before timings mean little."""


def available() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_elsewhere(seconds: float = 0.3) -> float | None:
    """Return how many cores other processes kept busy meanwhile, or None where the system does not tell."""
    if not STAT.exists():
        return None
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    return max(0.0, after[1] - before[1]) / max(after[0] - before[0], 1e-9)


def _ticks() -> tuple[float, float]:
    """Return the time in s, and the seconds for which other processes were on a core since the machine started."""
    user, nice, system, _idle, _waiting, *interrupts = map(int, STAT.read_text().split("\n", 1)[0].split()[1:9])
    own = os.times()
    busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), busy - own.user - own.system


def free(busy: float) -> int:
    """Return how many cores are left, at least one, if others keep so many busy."""
    return max(1, available() - max(0, math.ceil(busy - LOADED)))
