"""The training loop: steps, averages, validation, checkpoints, logs, and a clean end when it is told to stop."""

import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ejmp.data import MixSampler
from ejmp.data.store.durable import write_json
from ejmp.lock import locked
from ejmp.model.checkpoint import save
from ejmp.train import checkpoint
from ejmp.train.config import TrainConfig
from ejmp.train.description import NAME as DESCRIPTION
from ejmp.train.description import describe, differences
from ejmp.train.distributed import Preemption, Ranks, any_rank
from ejmp.train.ema import EMA
from ejmp.train.engine import Engine, StepResult, deepspeed_json
from ejmp.train.evaluate import Errors, evaluate, score
from ejmp.train.groups import LayerFactors, parameter_groups, scale_shared_gradients
from ejmp.train.logs import Log, Tracker
from ejmp.train.objective import Objective
from ejmp.train.schedule import EarlyStop, Schedule, cut_short
from ejmp.train.sources import TaskData, at_most, loader_of
from ejmp.train.threads import fitting_threads

FINAL = "final"
"""The folder of a run that holds the trained model."""
CHECKPOINTS = "checkpoints"
"""The folder of a run that holds its checkpoints."""
LOCK = "run.lock"
"""The file of a run by which a second process notices the first."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained, on what, and where it is kept."""

    objective: Objective
    """What is minimised, with the model that is trained."""
    sources: Sequence[TaskData]
    """Datasets with their splits, graphs and tasks, in the order of their dataset numbers."""
    config: TrainConfig
    """Settings of the training loop."""
    directory: Path
    """Folder of the run."""
    ranks: Ranks
    """This process among all of the run."""
    factors: LayerFactors | None = None
    """Learning-rate factors by part of the model; None: 1 everywhere."""
    trackers: tuple[Tracker, ...] = ()
    """Services that get the logged numbers as well."""
    validate_first: bool = True
    """Whether the errors before the first step are measured."""
    force: bool = False
    """Whether it goes on although settings, data or code are not those that it was begun with."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended."""

    step: int
    """Number of steps taken."""
    finished: bool
    """False if it was told to stop before its last step; a resumed run goes on."""
    before: Errors
    """Validation errors before the first step; empty if they were not asked for."""
    after: Errors
    """Errors of the best validation, whose weights are in the run's folder `final`."""


def train(run: Run, *, resume: bool | None = False) -> Result:
    """Train until the last step, an early stop, the end of the training time, or SIGTERM.

    Rank 0 says on stderr if the last step comes before the end of the learning rate's warm-up and cosine. Threads are
    left to other work as `fitting_threads` says.

    Args:
        run: what to train and where. Its folder gets run.json, deepspeed.json, log.jsonl, checkpoints and the final
            model.
        resume: go on from the newest whole checkpoint in the folder; None: if there is one.

    Raises:
        ValueError: if the folder holds a run and resume is not asked for, another process trains in it, it was begun
            with other settings, data or code, or it has no whole checkpoint of this model.
        FileNotFoundError: if there is no checkpoint to resume from.
        RuntimeError: if too many steps in a row are not finite, or a reader or a worker process fails.
    """
    with ExitStack() as stack:
        if run.ranks.rank == 0 and not stack.enter_context(locked(run.directory / LOCK, wait=False)):
            raise ValueError(f"run: another process trains in {run.directory}")
        if resume is None:
            resume = bool(checkpoint.steps(run.directory / CHECKPOINTS))
        stack.enter_context(fitting_threads(run.ranks, run.directory, resume=resume))
        return _train(run, stack.enter_context(Preemption()), resume=resume)


def _train(run: Run, preemption: Preemption, *, resume: bool) -> Result:
    checkpoints = run.directory / CHECKPOINTS
    first_rank = run.ranks.rank == 0
    if not resume and checkpoint.steps(checkpoints):
        raise ValueError(
            f"run: {run.directory} holds a run already; --resume goes on with it, or choose another folder"
        )
    if not resume and first_rank and checkpoints.exists():  # a run was ended before its first checkpoint
        shutil.rmtree(checkpoints, ignore_errors=True)
        (run.directory / "log.jsonl").unlink(missing_ok=True)
    run = _in_steps(run)
    problem = cut_short(run.config)
    if first_rank and problem:
        sys.stderr.write(f"{problem}\n")
    trainer = _Trainer(run, preemption)
    description = describe(run.objective, run.sources, run.config, run.ranks) if first_rank else {}
    if resume:
        if first_rank and not run.force:
            _check_same(run.directory, description)
        trainer.restore(checkpoints)
    if first_rank:
        checkpoints.mkdir(parents=True, exist_ok=True)
        finish_save(run.directory / FINAL)
        write_json(run.directory / DESCRIPTION, description)
        write_json(run.directory / "deepspeed.json", deepspeed_json(run.config, run.ranks.world_size))
    path = run.directory / "log.jsonl" if first_rank else None
    with Log(path, run.config.steps, run.trackers, description, run.config.validate_every) as log:
        return trainer.go(log, checkpoints)


def _check_same(folder: Path, description: Mapping[str, Any]) -> None:
    found = differences(folder, description)
    if found:
        raise ValueError(f"run: {folder} was begun otherwise: {'; '.join(found)}. --force goes on as it is now")


def finish_save(path: Path) -> None:
    """Put right what a save of a model left that was killed: the old model is put back if no new one is in its place.

    Args:
        path: the model's folder, in a folder that nobody but the run writes to.
    """
    aside = path.with_name(f"{path.name}.old")
    if aside.exists() and not path.exists():
        aside.rename(path)
    for left_over in (aside, *path.parent.glob(f".{path.name}.*")):
        shutil.rmtree(left_over, ignore_errors=True)


def _sampler(run: Run) -> MixSampler:
    datasets = [source.split("train") for source in run.sources]
    return MixSampler(
        sizes=[len(dataset) for dataset in datasets],
        seed=run.config.seed,
        batch_size=run.config.batch_size,
        world_size=run.ranks.world_size,
        rank=run.ranks.rank,
        costs=[dataset.num_edges for dataset in datasets],
    )


def _in_steps(run: Run) -> Run:
    """Return the run with the settings in steps where they count epochs of its data, or structures."""
    sampler = _sampler(run)
    config = run.config.in_steps(epoch_size=sampler.epoch_size, step_size=sampler.step_size)
    return dataclasses.replace(run, config=config)


class _Trainer:
    """The parts of a run and how far it is."""

    def __init__(self, run: Run, preemption: Preemption) -> None:
        self.run, self.config, self.preemption = run, run.config, preemption
        torch.manual_seed(run.config.seed)
        model = run.objective.model
        self.model = model.train()
        scale_shared_gradients(model)
        groups = parameter_groups(model, lr=run.config.lr, weight_decay=run.config.weight_decay, factors=run.factors)
        self.engine = Engine(run.objective, groups, run.config, run.ranks)
        self.ema = None if run.config.ema is None else EMA(dict(model.named_parameters()), run.config.ema)
        self.schedule = Schedule(run.config)
        self.stopper = EarlyStop(run.config.early_stop or 10**9)
        self.sampler = _sampler(run)
        self.loader = loader_of(
            run.sources,
            "train",
            self.sampler,
            dtype=model.dtype,
            device=run.ranks.device,
            num_workers=run.config.num_workers,
        )
        count, seed = run.config.val_structures, run.config.seed
        self.validation = [at_most(source, "val", count, seed=seed) for source in run.sources]
        self.step, self.position = 0, 0
        self.seconds = 0.0
        """Training time so far, s; on rank 0 what counts."""
        self.noted = time.perf_counter()
        """When the last line of the log was written."""
        self.before: Errors = {}
        self.best: Errors = {}

    def go(self, log: Log, checkpoints: Path) -> Result:
        """Train to the end, or until told to stop."""
        config = self.config
        if self.step == 0 and self.run.validate_first:
            self.before = self.validate()
            log.write("validation", 0, self.before)
        stop = self.position + (config.steps - self.step) * self.sampler.step_size
        told, clock = False, time.perf_counter()
        self.noted = clock
        for batch in () if self._ended() else self.loader.batches(self.position, stop):
            self.engine.set_lr(partial(self.schedule.lr, self.step))
            self.run.objective.progress = self.step / config.steps
            result = self.engine.step(batch)
            self.step, self.position = self.step + 1, batch.position
            if self.ema is not None and not result.skipped:
                self.ema.update()
            if self.step % config.log_every == 0 or result.skipped:
                self._note(log, result)
            self.seconds += time.perf_counter() - clock
            last = self.step == config.steps or (self.step % config.log_every == 0 and self._out_of_time())
            if self.step % config.validate_every == 0 or last:
                self._validated(log)
            told = self.preemption.requested()
            ended = last or self._stopped_early()
            if told or ended or self.step % config.checkpoint_every == 0:
                self._save(checkpoints)
            if told or ended:
                break
            clock = time.perf_counter()
        return Result(step=self.step, finished=not told, before=self.before, after=self.best)

    def _ended(self) -> bool:
        """Return whether nothing is left to do for a run that is resumed."""
        return self.step >= self.config.steps or self._stopped_early() or self._out_of_time()

    def _stopped_early(self) -> bool:
        return self.config.early_stop is not None and self.stopper.stop

    def _out_of_time(self) -> bool:
        limit = self.config.max_seconds
        return limit is not None and any_rank(self.run.ranks.rank == 0 and self.seconds >= limit)

    def validate(self) -> Errors:
        """Return the errors of the present weights on the validation splits."""
        return evaluate(self.model, self.validation, self.run.ranks, num_workers=self.config.num_workers)

    def _validated(self, log: Log) -> None:
        """Validate the averaged weights, save them if they are the best, and tell the schedule."""
        if self.ema is None:
            self._judge(log)
        else:
            with self.ema.swapped_in():
                self._judge(log)

    def _judge(self, log: Log) -> None:
        errors = self.validate()
        value = score(errors)
        log.write("validation", self.step, {**errors, "score": value if math.isfinite(value) else None})
        self.schedule.validated(self.step, value)
        if self.stopper.update(value) or not self.best:
            self.best = errors
            if self.run.ranks.rank == 0:
                save(self.model, self.run.directory / FINAL, overwrite=True)

    def _note(self, log: Log, result: StepResult) -> None:
        now = time.perf_counter()
        rate = self.config.log_every * self.sampler.step_size / max(now - self.noted, 1e-9)
        self.noted = now
        parts = {name: float(value) for name, value in result.losses.parts.items()}
        values = {
            "loss": result.loss,
            **parts,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "structures_per_s": rate,
        }
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        log.write("skipped" if result.skipped else "train", self.step, {**finite, "suspects": list(result.suspects)})
        log.show(self.step, f"loss {result.loss:.4g}  {rate:.3g} structures/s")

    def _save(self, checkpoints: Path) -> None:
        state = {
            "sampler": self.sampler.state(self.position),
            "schedule": self.schedule.state_dict(),
            "stopper": self.stopper.state_dict(),
            "seconds": self.seconds,
            "before": self.before,
            "best": self.best,
        }
        ema = None if self.ema is None else self.ema.state_dict()
        checkpoint.save(self.engine, checkpoints, self.step, state, ema=ema)

    def restore(self, checkpoints: Path) -> None:
        """Go on from the newest checkpoint that is whole."""
        restored = checkpoint.resume(self.engine, checkpoints)
        state = restored.state
        self.step = restored.step
        self.position = self.sampler.resume(state["sampler"])
        self.schedule.load_state_dict(state["schedule"])
        self.stopper.load_state_dict(state["stopper"])
        self.seconds = state.get("seconds", 0.0)  # checkpoints of earlier versions have none
        self.before, self.best = state["before"], state["best"]
        if self.ema is not None:
            if restored.ema is None:
                raise ValueError(f"{restored.path}: there are no averaged weights; resume with --ema none")
            self.ema.load_state_dict(restored.ema)
