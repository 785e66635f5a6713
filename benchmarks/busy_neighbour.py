r"""What one other process that keeps a core busy costs a training, and what helps: threads and how they wait.

    python benchmarks/busy_neighbour.py OUT.json            # three minutes, on a machine with nothing else to do

Each way runs in a process of its own: steps of training of the demo's model on energies and gradient forces, 16 random
molecules a step. The neighbour multiplies matrices on one thread, and may run on any core.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from track_rates import busy
from training_steps import train_on_gradient_forces

import ejmp
from ejmp.provenance import provenance
from ejmp.train.demo import demo_config
from ejmp.train.distributed import Ranks
from ejmp.train.threads import fitting_threads
from ejmp_kernels.allocator import keep_freed_memory

FOLDER = Path(__file__).resolve().parent
CHOSEN = "as training commands choose"
WAYS: dict[str, dict[str, str]] = {
    "as many threads as cores": {},
    CHOSEN: {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
"""Environment variables of the training by what the result calls them."""


def train(seconds: float, *, choose: bool) -> None:
    """Train for some seconds, on all threads or as many as a training command chooses; print structures per second."""
    keep_freed_memory()
    alone = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    with fitting_threads(alone, FOLDER, resume=False) if choose else nullcontext():
        print(structures_per_second(seconds))


def structures_per_second(seconds: float) -> float:
    """Train for some seconds."""
    torch.manual_seed(0)
    model = ejmp.JMP(dataclasses.replace(demo_config(), num_tasks=1, direct_forces=False))
    random = np.random.default_rng(0)
    molecules = [ejmp.Structure(numbers=[6] * 9 + [1] * 9, positions=random.uniform(0, 6, (18, 3))) for _ in range(16)]
    graph = ejmp.build_graph(molecules, 3.2, 8)
    for _ in range(3):
        train_on_gradient_forces(model, graph)
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        train_on_gradient_forces(model, graph)
        steps += 1
    return len(molecules) * steps / (time.perf_counter() - start)


def main() -> None:
    """Measure every way without and with a neighbour, by turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each training")
    options = parser.parse_args()
    made = provenance(torch.device("cpu"))
    found: dict[str, dict[str, list[float]]] = {way: {"alone": [], "neighbour": []} for way in WAYS}
    call = f"import busy_neighbour as b; b.train({options.seconds}, choose={{}})"
    for _ in range(options.rounds):
        for state, cores in (("alone", ()), ("neighbour", os.sched_getaffinity(0))):
            with busy(cores):
                time.sleep(3 if cores else 0)  # until it is under way
                for way, variables in WAYS.items():
                    environment = os.environ | variables
                    command = [sys.executable, "-c", call.format(way == CHOSEN)]
                    done = subprocess.run(
                        command, env=environment, cwd=FOLDER, capture_output=True, text=True, check=True
                    )
                    found[way][state].append(float(done.stdout))
    rows = [
        {"way": way, **{f"{state}_structures_per_s": statistics.median(values) for state, values in states.items()}}
        | {"samples": states}
        for way, states in found.items()
    ]
    for row in rows:
        alone, beside = row["alone_structures_per_s"], row["neighbour_structures_per_s"]
        print(f"{row['way']}: {alone:.1f} structures/s alone, {beside:.1f} beside a neighbour")
    options.output.write_text(json.dumps({"provenance": made, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
