"""A shard of a study: a process that takes runs which nobody else works on, until none is left for it."""

import shutil
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ejmp.data.store.durable import write_json
from ejmp.lock import locked
from ejmp.provenance import provenance
from ejmp.study.execute import Outcome, carry_out
from ejmp.study.inputs import Inputs
from ejmp.study.plan import RunSpec
from ejmp.study.record import RESULT, is_finished, read_result, run_folder
from ejmp.study.settings import StudySettings
from ejmp.train.faults import session
from ejmp.train.loop import CHECKPOINTS

POLL = 1.0
"""Time in seconds between two looks at the runs of other shards."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One of the processes that a study is spread over."""

    count: int = 1
    """Number of shards."""
    command: str = ""
    """Command line that started the study."""


def work(folder: Path, runs: Sequence[RunSpec], settings: StudySettings, shard: Shard) -> bool:
    """Carry out runs until all are finished or the rest is in the hands of other shards.

    Args:
        folder: folder of the study.
        runs: all runs of the study.
        settings: of the study.
        shard: this process.

    Returns:
        Whether all runs are finished.

    Raises:
        SystemExit: if this process is told to stop (SIGTERM), with a checkpoint to go on from.
    """
    with session() as ranks:
        inputs = Inputs(settings, folder, ranks)
        signal.signal(signal.SIGTERM, _stop)  # a training has its own handler meanwhile
        while not all(is_finished(folder, spec.name) for spec in runs):
            taken = any(_take(spec, inputs, runs, shard) for spec in runs)
            if not taken and not any(_waits(spec, folder) for spec in runs):
                return False
            if not taken:
                time.sleep(POLL)
    return True


def _stop(*_: object) -> None:
    raise SystemExit(0)


def _waits(spec: RunSpec, folder: Path) -> bool:
    """Return whether a run can only start when others are finished."""
    return not is_finished(folder, spec.name) and not all(is_finished(folder, name) for name in spec.needs)


def _take(spec: RunSpec, inputs: Inputs, runs: Sequence[RunSpec], shard: Shard) -> bool:
    """Carry out a run if it is free; return whether it was."""
    study = inputs.folder
    if is_finished(study, spec.name) or _waits(spec, study):
        return False
    folder = run_folder(study, spec.name)
    with locked(folder / "lock", wait=False) as mine:
        if not mine or is_finished(study, spec.name):
            return False
        start = time.time()
        machine = provenance(inputs.ranks.device)
        outcome = carry_out(spec, inputs)
        if outcome is None:
            say(f"{spec.name}: stopped, with a checkpoint that the same command goes on from")
            raise SystemExit(0)
        write_json(folder / RESULT, _result(spec, outcome, time.time() - start, shard, machine))
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    say(progress(study, runs, spec, shard.count))
    return True


def _result(
    spec: RunSpec, outcome: Outcome, seconds: float, shard: Shard, machine: dict[str, object]
) -> dict[str, object]:
    return {
        "name": spec.name,
        "kind": spec.kind,
        "seconds": seconds,
        "steps": outcome.steps,
        "command": shard.command,
        "config": outcome.config,
        "commit": machine["commit"],
        "machine": machine,
        "values": outcome.values,
    }


def progress(study: Path, runs: Sequence[RunSpec], spec: RunSpec, shards: int) -> str:
    """Return a line about a run that has just finished, with the time left judged by finished runs of each kind.

    Args:
        study: folder of the study.
        runs: all runs of the study.
        spec: the run that has finished.
        shards: number of processes that share what is left.
    """
    seconds: dict[str, list[float]] = {}
    left: list[str] = []
    for run in runs:
        if is_finished(study, run.name):
            seconds.setdefault(run.kind, []).append(read_result(study, run.name)["seconds"])
        else:
            left.append(run.kind)
    unknown = sorted({kind for kind in left if kind not in seconds})
    rest = sum(statistics.mean(seconds[kind]) for kind in left if kind in seconds) / shards
    more = f" and what {', '.join(unknown)} takes" if unknown else ""
    took = read_result(study, spec.name)["seconds"]
    end = f"about {duration(rest)} left{more}" if left else "all are finished"
    return f"[{len(runs) - len(left)}/{len(runs)}] {spec.name}: {duration(took)}; {end}"


def duration(seconds: float) -> str:
    """Return a time in words: seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def say(text: str) -> None:
    """Write a line to standard output at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
