"""Pairs of live worker processes, one per side, on the same cores: what they are asked, and the samples they give."""

import contextlib
import json
import math
import random
import statistics
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ejmp.track.side import Side

WORKER = Path(__file__).with_name("worker.py")
ROUNDS = 20
"""Rounds of a pair; the median of their log ratios is the pair's sample."""
BLOCK_SECONDS = 3e-3
"""How long a block of calls lasts about; with longer ones the two sides no longer see the same moment."""
LONG_SECONDS = 10 * BLOCK_SECONDS
"""A call that lasts longer is timed in every third round only."""
PATIENCE_SECONDS = 300.0
"""After this time without an answer a worker is ended."""


class WorkerError(RuntimeError):
    """A worker died, or did not answer."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What both workers of a pair are told."""

    benchmarks: Path
    """Folder of op_cases.py, of the running checkout."""
    cores: tuple[int, ...] = ()
    """Cores that both workers run on; empty: all."""
    device: str = "cpu"
    """Device as torch names it."""
    backend: str = "native"
    """Backend whose ops are measured."""
    slow: Mapping[str, float] = field(default_factory=dict)
    """Shares of its time that a case of HEAD waits after each call, by name: a known slowdown."""
    rounds: int = ROUNDS
    """Rounds of a pair."""


class Worker:
    """A process that measures one side; a context that ends it.

    Args:
        side: whose code it runs.
        setting: what it is told.
        slow: shares by which cases are slowed down on purpose.
        log: file for what it prints.
    """

    def __init__(self, side: Side, setting: Setting, slow: Mapping[str, float], log: Path) -> None:
        told = {
            "root": str(side.root),
            "benchmarks": str(setting.benchmarks),
            "cores": setting.cores,
            "device": setting.device,
            "backend": setting.backend,
            "slow": dict(slow),
        }
        environment = side.environment()
        if setting.cores:
            environment["OMP_NUM_THREADS"] = str(len(setting.cores))
        self.side, self.log = side, log
        with log.open("w") as printed:
            self.process = subprocess.Popen(  # noqa: S603
                [side.python, "-P", str(WORKER), json.dumps(told)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                text=True,
                env=environment,
                cwd=log.parent,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def ask(self, what: str, **about: Any) -> Any:
        """Return the answer to a question.

        Raises:
            WorkerError: if the process died or was ended because it did not answer.
            ValueError: if the case failed, with the reason.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        watch = threading.Timer(PATIENCE_SECONDS, self.process.kill)
        watch.start()
        try:
            self.process.stdin.write(json.dumps({"ask": what, **about}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        finally:
            watch.cancel()
        if not line:
            said = self.log.read_text(errors="replace").strip()[-500:]
            raise WorkerError(f"{self.side.name}: the worker ended at {what} {about.get('case', '')}: {said}")
        found = json.loads(line)
        if "failed" in found:
            raise ValueError(f"{self.side.name}, {about.get('case', what)}: {found['failed']}")
        return found["answer"]


@contextlib.contextmanager
def pair(base: Side, head: Side, setting: Setting) -> Iterator[tuple[Worker, Worker]]:
    """Give a live worker of each side, in an order of start that is random; both end with the body.

    Raises:
        WorkerError: if one of them runs other code than its side's.
    """
    folder = head.root.parent
    begin = {
        "base": lambda: Worker(base, setting, {}, folder / "base.log"),
        "head": lambda: Worker(head, setting, setting.slow, folder / "head.log"),
    }
    names = random.sample(list(begin), 2)
    with begin[names[0]]() as first, begin[names[1]]() as second:
        workers = {names[0]: first, names[1]: second}
        for worker in workers.values():
            files = worker.ask("about")["files"]
            if not all(Path(file).is_relative_to(worker.side.root.resolve()) for file in files):
                raise WorkerError(f"{worker.side.name}: the worker imported {', '.join(files)}")
        yield workers["base"], workers["head"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one pair says of one benchmark."""

    log_ratio: float
    """Median over rounds of log(seconds of HEAD / seconds of BASE)."""
    base_seconds: float
    """Median over rounds of the seconds of what is timed: a call, or of small ops several together."""
    head_seconds: float
    """Median seconds of the same on the other side."""


def measure(base: Worker, head: Worker, cases: Sequence[str], rounds: int) -> dict[str, Sample]:
    """Time cases on both sides by turns: in every round all cases in random order, in each a random side first.

    Cases with long calls take part in every third round.

    Args:
        base: worker of one side.
        head: worker of the other.
        cases: names.
        rounds: how often each side is timed; one more round before is not counted.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    long: set[str] = set()
    for number in range(rounds + 1):
        going = [name for name in cases if name not in long or number % 3 == 1]
        for name in random.sample(going, len(going)):
            found = {}
            for worker in random.sample([base, head], 2):
                found[worker] = worker.ask("time", case=name, seconds=BLOCK_SECONDS)
            if number:
                seconds[name].append((found[base], found[head]))
            elif max(found.values()) > LONG_SECONDS:
                long.add(name)
    return {
        name: Sample(
            log_ratio=statistics.median(math.log(h / b) for b, h in values),
            base_seconds=statistics.median(b for b, _ in values),
            head_seconds=statistics.median(h for _, h in values),
        )
        for name, values in seconds.items()
    }
