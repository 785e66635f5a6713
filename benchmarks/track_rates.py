"""How often `ejmp bench compare` calls equal code slower, and how often it finds a slowdown that is really there.

    python benchmarks/track_rates.py --equal 50 --slowed 20 --core 0 --output benchmarks/results/track_cpu.json

compares HEAD with itself, first all benchmarks of the quick suite, then some of them while two wait 10% and 20% of
their time after each call. Each comparison is written to the output as it ends, and a run that finds the file goes on
after what it holds, so it can be stopped at any time. `--busy CORE` keeps a core busy with matrix products meanwhile.
"""

import argparse
import contextlib
import datetime as dt
import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ejmp.data.store.durable import write_json
from ejmp.track.compare import CompareRequest, compare

SLOWED = ("pair/second", "quadruplet/forward", "edge_to_atom/backward", "activate/second")
"""Benchmarks that are slowed down: in each comparison one by 10% and the next one by 20%."""
BESIDE = ("radial/backward", "activate/forward", "graph/build")
"""Benchmarks that are measured beside them and are the same on both sides."""
SPIN = """
import os, sys, torch
os.sched_setaffinity(0, map(int, sys.argv[1:]))
torch.set_num_threads(1)
a = torch.randn(512, 512)
while True: a @ a
"""


@contextlib.contextmanager
def busy(cores: Collection[int]) -> Iterator[None]:
    """Keep one of some cores busy for the length of the context; with none, leave all alone."""
    if not cores:
        yield
        return
    neighbour = subprocess.Popen([sys.executable, "-c", SPIN, *map(str, cores)])
    try:
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


def shares_of(number: int) -> dict[str, float]:
    """Return what is slowed down in the slowed comparison of this number, and by which share."""
    return {SLOWED[number % len(SLOWED)]: 0.10, SLOWED[(number + 1) % len(SLOWED)]: 0.20}


def summary(kind: str, busy_core: int | None, shares: dict[str, float], load: float, found: dict[str, Any]) -> dict:
    """Return what is kept of a comparison."""
    rows = {row["name"]: row for row in found["rows"]}
    keys = ("verdict", "ratio", "lower", "upper", "note")
    noted = {
        name: {key: row.get(key) for key in keys} | {"pairs": len(row["log_ratios"])}
        for name, row in rows.items()
        if name in shares or row["verdict"] != "SAME"
    }
    kept = {"kind": kind, "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), "load_before": load}
    kept |= {"busy_core": busy_core, "shares": shares, "outcome": found["outcome"], "seconds": found["seconds"]}
    kept |= {"commit": found["head"]["commit"], "dirty": found["head"]["dirty"], "broken": found["broken"]}
    return kept | {"machine": found["machine"], "benchmarks": len(rows), "not_same": noted}


def main() -> None:
    """Make the comparisons that the output does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--equal", type=int, default=50, help="comparisons of HEAD with itself (default: 50)")
    parser.add_argument("--slowed", type=int, default=20, help="comparisons with known slowdowns (default: 20)")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="which benchmarks --equal compares")
    parser.add_argument("--core", type=int, nargs="+", default=[0], help="cores of the workers (default: 0)")
    parser.add_argument("--busy", type=int, metavar="CORE", help="core to keep busy meanwhile")
    parser.add_argument("--commit", default="HEAD", help="what is compared with itself (default: HEAD)")
    parser.add_argument("--output", type=Path, required=True, help="file of the results, read first if it exists")
    options = parser.parse_args()
    held = json.loads(options.output.read_text()) if options.output.exists() else {"comparisons": []}
    with busy([] if options.busy is None else [options.busy]):
        for kind, wanted in (("slowed", options.slowed), ("equal", options.equal)):
            mine = [x for x in held["comparisons"] if (x["kind"], x["busy_core"]) == (kind, options.busy)]
            for number in range(len(mine), wanted):
                shares = shares_of(number) if kind == "slowed" else {}
                request = CompareRequest(
                    base=options.commit,
                    head=options.commit,
                    only=(*SLOWED, *BESIDE) if shares else tuple(options.only),
                    cores=tuple(options.core),
                    slow_head=shares,
                )
                load = os.getloadavg()[0]
                found = compare(request, report=lambda line: print(line, file=sys.stderr, flush=True))
                held["comparisons"].append(summary(kind, options.busy, shares, load, found))
                write_json(options.output, held)
                print(f"{kind} {number + 1} of {wanted}: {found['outcome']}, {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
