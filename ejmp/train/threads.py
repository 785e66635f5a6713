"""How many threads a training takes where nobody says."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ejmp import cores
from ejmp.train.description import NAME
from ejmp.train.distributed import Ranks

SAID_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables by which a user says how many threads there are."""


@contextmanager
def fitting_threads(ranks: Ranks, folder: Path, *, resume: bool) -> Iterator[None]:
    """Leave to other work the cores that it keeps busy, while the body of a `with` statement runs.

    Threads wait for each other in every operation, so that one without a core of its own holds up all. A run that goes
    on takes as many threads as it was begun with: their number can change the last digits. Nothing is done where the
    user says how many there are, on a GPU, and with several ranks, which are each other's neighbours.

    Args:
        ranks: this process among all.
        folder: folder of the run.
        resume: whether the run goes on.
    """
    threads = torch.get_num_threads()
    if (
        ranks.world_size > 1
        or ranks.device.type != "cpu"
        or threads == 1
        or any(name in os.environ for name in SAID_BY)
    ):
        yield
        return
    taken = _begun_with(folder) if resume else None
    if taken is None or taken > threads:
        busy = cores.busy_elsewhere() or 0.0
        taken = min(threads, cores.free(busy))
        if taken < threads:
            sys.stderr.write(
                f"other work keeps {busy:.1f} of {len(cores.available())} cores busy: {taken} of {threads} threads are "
                "used; set OMP_NUM_THREADS to say otherwise\n"
            )
    torch.set_num_threads(taken)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _begun_with(folder: Path) -> int | None:
    """Return the number of threads that a run was begun with, if it is known."""
    try:
        threads = json.loads((folder / NAME).read_text())["machine"]["threads"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return threads if type(threads) is int and threads > 0 else None
