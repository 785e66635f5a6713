"""How many cores there are, and how many of them other work leaves free."""

import math
import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
"""Where Linux counts what each of its processors did, in ticks."""
LOADED = 0.3
"""Number of cores that others may keep busy before timings mean little."""


def available() -> set[int]:
    """Return the numbers of the cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def busy_elsewhere(seconds: float = 0.3) -> float | None:
    """Return how many of the cores that this process may use others kept busy, or None where the system does not tell.

    Args:
        seconds: how long to look.
    """
    if not STAT.exists():
        return None
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    return max(0.0, after[1] - before[1]) / max(after[0] - before[0], 1e-9)


def _ticks() -> tuple[float, float]:
    """Return the time in s, and the seconds for which others were on this process's cores since the machine started."""
    names, busy = {f"cpu{number}" for number in available()}, 0
    for line in STAT.read_text().splitlines():
        name, *ticks = line.split()
        if name in names:
            user, nice, system, _idle, _waiting, *interrupts = map(int, ticks[:8])
            busy += user + nice + system + sum(interrupts)
    own = os.times()
    return time.monotonic(), busy / os.sysconf("SC_CLK_TCK") - own.user - own.system


def free(busy: float) -> int:
    """Return how many cores are left, at least one, if others keep so many busy."""
    return max(1, len(available()) - max(0, math.ceil(busy - LOADED)))
