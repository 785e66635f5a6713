"""Trainings to which something happens at any moment: `python -m support.attack_runs`, or `make attack`.

Small trainings, of one process, of one with two loader workers, and of two ranks, are hit again and again: by signals,
by the death of a worker or a rank, by a disk that takes no more, by a clock that is set back, by files that are deleted
from a checkpoint, by other settings or other data. Each is started again until it is finished. Then its weights must
be, to the last bit, those of a training that nothing happened to; no more steps may be lost than since the last
checkpoint; and all processes must have ended soon after, but for ranks that wait for one that died before all had met:
these the campaign ends, as a launcher does.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import ejmp
from ejmp.data.store.durable import hash_file
from ejmp.train import checkpoint
from ejmp.train.config import TrainConfig
from ejmp.train.faults import session
from ejmp.train.loop import FINAL, Run, train
from ejmp.train.objective import Supervised
from ejmp.train.sources import demo_mix, tasks_of
from ejmp.train.start import new_model
from support.few import few
from support.inputs import shared_file
from support.launching import free_port

CONFIG = TrainConfig(
    steps=12, batch_size=4, warmup_steps=2, validate_every=4, checkpoint_every=3, log_every=1, zero_stage=0, ema=0.9
)
SHAPES = {"one process": (1, 0), "with loader workers": (1, 2), "two ranks": (2, 0)}
"""Numbers of ranks and of loader workers of each."""
SIGNALS = {s.name: s for s in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)}
KINDS = (*SIGNALS, "worker killed", "disk full", "clock set back", "files deleted", "other settings", "other data")
PATIENCE = 30.0
"""Seconds within which all processes end after something happened."""
NIGHTLY = 300
FORK = multiprocessing.get_context("fork")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """How a training is started."""

    folder: Path
    shape: str
    clock: float = float("inf")
    """Reading of the clock after which it jumps back by an hour."""
    lr: float = CONFIG.lr
    structures: int = 8


def set_back(moment):
    """Let the clock on the wall jump back by an hour at a moment."""
    real = time.time
    time.time = lambda: real() - 3600 * (real() > moment)


def go(start, rank, port):
    """Train, from the newest checkpoint if there is one: the body of a rank's process."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # as in a terminal, whoever started this
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = (start.folder / f"said-{rank}").open("a", buffering=1)  # pytest's would keep what is written to it
    os.dup2(sys.stderr.fileno(), 2)
    world, workers = SHAPES[start.shape]
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    set_back(start.clock)
    torch.set_num_threads(1)
    sources = few(demo_mix(), start.structures)
    config = dataclasses.replace(CONFIG, num_workers=workers, lr=start.lr)
    tiny = ejmp.JMPConfig.from_upstream(json.loads(shared_file("golden/tiny.json").read_text()))
    with session("cpu") as ranks:
        (start.folder / f"met-{rank}").touch()
        objective = Supervised(new_model(dataclasses.replace(tiny, num_tasks=4), sources, seed=0), tasks_of(sources))
        run = Run(objective=objective, sources=sources, config=config, directory=start.folder / "run", ranks=ranks)
        train(run, resume=bool(checkpoint.steps(run.directory / "checkpoints")))


def started(start):
    """Return the processes of a training."""
    port = free_port()
    (start.folder / "run").mkdir(parents=True, exist_ok=True)
    for path in start.folder.glob("met-*"):
        path.unlink()
    processes = [FORK.Process(target=go, args=(start, rank, port)) for rank in range(SHAPES[start.shape][0])]
    for process in processes:
        process.start()
    return processes


def wait(processes, seconds):
    """Wait until all processes have ended, or for so long; return whether they have."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    return all(process.exitcode is not None for process in processes)


def of_session(number):
    """Return the processes of a session that are not zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, in_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(in_session) == number and state != "Z":
                found.append(int(path.parent.name))
    return found


def children(number):
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
    return []


def happen(kind, processes, rng):
    """Do something to running processes; return whether it could be done."""
    chosen = rng.choice(processes)
    if kind == "files deleted":
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        return True
    if kind == "worker killed":
        workers = children(chosen.pid)
        if not workers:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(workers), signal.SIGKILL)
        return True
    if kind == "disk full":
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, hard))
        return True
    os.kill(chosen.pid, SIGNALS[kind])
    return True


def last_step(folder):
    """The last step that the log has."""
    log = folder / "run" / "log.jsonl"
    steps = []
    for line in log.read_text().splitlines() if log.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # cut off by a kill
            found = json.loads(line)
            steps += [found["step"]] if found["event"] == "train" else []
    return max(steps, default=0)


def saved(folder):
    """The steps of the checkpoints, the newest first."""
    return [int(path.name.removeprefix("step-")) for path in checkpoint.steps(folder / "run" / "checkpoints")]


def delete_some(folder, rng):
    """Delete some files of the newest checkpoint, where there is an older one to go on from."""
    newest, *older = checkpoint.steps(folder / "run" / "checkpoints")
    if not older:  # the newest one before was damaged already, and is set aside
        return
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    for path in rng.sample(files, rng.randint(1, len(files))):
        path.unlink()


def result_of(folder):
    newest = checkpoint.steps(folder / "run" / "checkpoints")[0]
    return [hash_file(folder / "run" / FINAL / "model.safetensors"), hash_file(newest / "ema.safetensors")]


def finished(folder):
    return saved(folder)[:1] == [CONFIG.steps] and (folder / "run" / FINAL / "model.safetensors").exists()


class Campaign:
    """A number of faults, and what became of them.

    Args:
        folder: where the runs go.
        rng: which faults, when.
        shapes: what trainings, of `SHAPES`.
    """

    def __init__(self, folder, rng, shapes=tuple(SHAPES)):
        self.folder, self.rng = folder, rng
        self.met = []
        """Of each fault its kind, the shape, the steps taken before it, the steps lost, and how the processes ended."""
        self.whole = {shape: self.undisturbed(shape) for shape in shapes}

    def undisturbed(self, shape):
        """Return the result of a training that nothing happens to, and how long it takes."""
        start = Start(folder=self.folder / shape, shape=shape)
        begin = time.monotonic()
        processes = started(start)
        assert wait(processes, 600), "it does not end"
        assert [p.exitcode for p in processes] == [0] * len(processes), self.said(start.folder)
        length = time.monotonic() - begin
        sys.stderr.write(f"{shape}: {length:.1f} s\n")
        return result_of(start.folder), length

    @staticmethod
    def said(folder):
        return "\n".join(path.read_text()[-3000:] for path in folder.glob("said-*"))

    def note(self, *fault):
        self.met.append(fault)
        sys.stderr.write(f"{len(self.met)}: {', '.join(map(str, fault))}\n")

    def run(self, count):
        """Let so many faults happen."""
        shapes, number = list(self.whole), 0
        while len(self.met) < count:
            shape = shapes[number % len(shapes)]
            start = Start(folder=self.folder / f"run-{number}", shape=shape)
            while not finished(start.folder):
                self.fault(start, count)
            assert result_of(start.folder) == self.whole[shape][0], f"other weights after {self.met[-5:]}"
            shutil.rmtree(start.folder)
            number += 1

    @staticmethod
    def possible(start):
        """Return the kinds of what can happen to a training now."""
        checkpoints = len(saved(start.folder))
        needed = {"files deleted": 2, "other settings": 1, "other data": 1}
        kinds = [kind for kind in KINDS if needed.get(kind, 0) <= checkpoints]
        return kinds if SHAPES[start.shape][1] else [kind for kind in kinds if kind != "worker killed"]

    def fault(self, start, count):
        """Start a training, let something happen to it at some moment, and wait until it has ended."""
        kind = self.rng.choice(self.possible(start)) if len(self.met) < count else None
        length = self.whole[start.shape][1]
        if kind in ("other settings", "other data"):
            self.refused(kind, start)
            return
        moment = self.rng.uniform(0, 1.2 * length)
        jump = {"clock": time.time() + moment} if kind == "clock set back" else {}
        processes = started(dataclasses.replace(start, **jump))
        if kind in (None, "clock set back"):
            assert wait(processes, 600), f"{kind}: it does not end"
            assert all(p.exitcode == 0 for p in processes), f"{kind}: {self.said(start.folder)}"
            if kind:
                self.note(kind, start.shape, last_step(start.folder), 0, "went on")
            return
        ended = wait(processes, moment)
        met = len(list(start.folder.glob("met-*"))) == len(processes)
        happened = not ended and happen(kind, processes, self.rng)
        if happened and not met and not wait(processes, PATIENCE):  # ranks wait for one that never came
            for process in processes:
                process.kill()
        assert wait(processes, PATIENCE if happened else 600), f"{kind} does not end it: {self.said(start.folder)}"
        self.alone(processes)
        codes = [process.exitcode for process in processes]
        if not happened:
            assert codes == [0] * len(codes), f"it failed of itself: {codes} {self.said(start.folder)}"
            return
        lost = last_step(start.folder) - (saved(start.folder) or [0])[0]
        if kind in ("SIGTERM", "SIGUSR1") and len(codes) == 1:  # saved, or it had not begun to train
            assert codes[0] in (0, -SIGNALS[kind]), self.said(start.folder)
        assert lost <= CONFIG.checkpoint_every, (kind, lost)
        if kind == "files deleted":
            delete_some(start.folder, self.rng)
        how = "went on or was saved" if codes == [0] * len(codes) else "ended"
        self.note(kind, start.shape, last_step(start.folder), lost, how)

    @staticmethod
    def alone(processes):
        """Check that nothing is left of what the processes started."""
        end = time.monotonic() + PATIENCE
        while left := [number for process in processes for number in of_session(process.pid)]:
            assert time.monotonic() < end, f"still there: {left}"
            time.sleep(0.1)

    def refused(self, kind, start):
        """Check that a run does not go on under other settings or on other data, and that it says what differs."""
        other = {"lr": 2 * CONFIG.lr} if kind == "other settings" else {"structures": 7}
        before = saved(start.folder)
        processes = started(dataclasses.replace(start, **other))
        assert wait(processes, 600)
        assert all(process.exitcode for process in processes)
        said = self.said(start.folder)
        assert "was begun otherwise" in said, said
        assert "--force" in said
        assert saved(start.folder) == before
        self.note(kind, start.shape, last_step(start.folder), 0, "refused")


def table(met):
    """Return what happened as lines of kinds and outcomes."""
    outcomes = ("ended", "went on or was saved", "went on", "refused")
    lines = ["| fault | attempts | " + " | ".join(outcomes) + " | steps lost at most |", "| --- " + "| ---: " * 6 + "|"]
    for kind in (*KINDS, "all"):
        mine = [fault for fault in met if kind in (fault[0], "all")]
        counts = collections.Counter(fault[4] for fault in mine)
        cells = [len(mine), *(counts[outcome] or "" for outcome in outcomes), max((f[3] for f in mine), default=0)]
        lines.append(f"| {kind} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=NIGHTLY)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), random.Random(options.seed))
        campaign.run(options.count)
    sys.stdout.write(f"faults of trainings: {time.monotonic() - begin:.0f} s\n{table(campaign.met)}\n")


if __name__ == "__main__":
    main()
