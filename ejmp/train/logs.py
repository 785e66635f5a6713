"""The log of a run: JSON lines for programs, progress for people, tensorboard and wandb if asked for."""

import importlib
import json
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Self

from ejmp.progress import terminal_bar

Tracker = Literal["tensorboard", "wandb"]
"""Service that gets the numbers of the log as well."""
SECONDS_BETWEEN_LINES = {"terminal": 5.0, "file": 120.0}
"""Shortest time between two lines of progress: on a terminal without rich, and in the files of batch systems."""


class _Tensorboard:
    """Event files for tensorboard; the configuration is a text in them."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self, *, failed: bool) -> None:
        del failed  # which event files do not tell
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases, online or (WANDB_MODE=offline) in the folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(dir=str(folder), name=folder.name, config=dict(config))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


_SERVICES = {"tensorboard": _Tensorboard, "wandb": _Wandb}


class Pace:
    """Says how long a run still takes, from what its last steps and its last validation took.

    Args:
        steps: number of steps of the run.
        validate_every: number of steps between two validations; None: there are none.
        now: time at which the run begins, s.
    """

    def __init__(self, steps: int, validate_every: int | None, now: float) -> None:
        self._steps, self._every = steps, validate_every
        self._marks: deque[tuple[int, float]] = deque(maxlen=20)  # step, and seconds spent on steps until then
        self._last: tuple[int | None, float] = (None, now)  # step and time of the last call
        self._validation = self._validating = 0.0  # seconds of the last validation, and of all
        self._validated: int | None = None

    def stepped(self, step: int, now: float) -> None:
        """Note that so many steps are done."""
        self._marks.append((step, now - self._validating))
        self._last = (step, now)

    def validated(self, step: int, now: float) -> None:
        """Note that the validation after so many steps is done."""
        last, since = self._last
        if last is not None or step == 0:  # what a resumed run has done before is not known
            steps = 0.0 if last is None else (step - last) * (self._seconds_per_step() or 0.0)
            self._validation = max(0.0, now - since - steps)
            self._validating += self._validation
        self._marks.append((step, now - self._validating))
        self._last, self._validated = (step, now), step

    def left(self, step: int) -> float | None:
        """Return how long the steps and validations after a step take, s; None as long as that is not known."""
        seconds = self._seconds_per_step()
        if seconds is None:
            return None
        return (self._steps - step) * seconds + self._validations_after(step) * self._validation

    def _seconds_per_step(self) -> float | None:
        if len(self._marks) < 2 or self._marks[0][0] == self._marks[-1][0]:
            return None
        (first, begin), (last, end) = self._marks[0], self._marks[-1]
        return (end - begin) / (last - first)

    def _validations_after(self, step: int) -> int:
        """Return the number of validations that are not done: one every so many steps, and one at the end."""
        if self._every is None:
            return 0
        done = step if self._validated is None else self._validated
        ragged = self._steps % self._every != 0 and done < self._steps
        return self._steps // self._every - done // self._every + ragged


def duration(seconds: float) -> str:
    """Return a time in the units that people use for one so long."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


class Log:
    """Writes lines of JSON to a file, their numbers to trackers, and the progress to the terminal.

    Args:
        path: file, which is appended to; None (on all ranks but 0): nothing is written or shown.
        steps: number of steps of the run, for the progress.
        trackers: services that get the numbers and the configuration as well.
        config: what the run is, as JSON can write it.
        validate_every: number of steps between two validations, for the time left; None: there are none.

    Raises:
        ModuleNotFoundError: if a tracker is not installed.
    """

    def __init__(
        self,
        path: Path | None,
        steps: int,
        trackers: tuple[Tracker, ...] = (),
        config: Mapping[str, Any] | None = None,
        validate_every: int | None = None,
    ) -> None:
        self._file = None if path is None else path.open("a", buffering=1)
        self._trackers: list[_Tensorboard | _Wandb] = []
        self._bar, self._draw = ExitStack(), None
        self._steps = steps
        self._pace = Pace(steps, validate_every, time.monotonic())
        self._due = 0.0
        if path is None:
            return
        for name in trackers:
            try:
                self._trackers.append(_SERVICES[name](path.parent, config or {}))
            except ModuleNotFoundError as error:
                text = f"--track {name}: {error}; pip install ejmp[track] brings it"
                raise ModuleNotFoundError(text, name=error.name) from error

    def __enter__(self) -> Self:
        if self._file is not None:
            self._draw = self._bar.enter_context(terminal_bar())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)
        if self._file is not None:
            self._file.close()

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Write a line that says what happened, at which step, with which values."""
        if self._file is None:
            return
        if event == "validation":
            self._pace.validated(step, time.monotonic())
        line = {"event": event, "step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(line) + "\n")
        numbers = dict(_numbers(event, values))
        for tracker in self._trackers:
            tracker.log(numbers, step)

    def show(self, step: int, text: str) -> None:
        """Show how far the run is, a text, and the time left: in the bar on a terminal, in a line now and then else."""
        if self._file is None:
            return
        now = time.monotonic()
        self._pace.stepped(step, now)
        left = self._pace.left(step)
        if left is not None:
            text = f"{text}  {duration(left)} left"
        if self._draw is not None:
            self._draw(step, self._steps, text)
        elif now >= self._due or step >= self._steps:
            self._due = now + SECONDS_BETWEEN_LINES["terminal" if sys.stderr.isatty() else "file"]
            sys.stderr.write(f"step {step} of {self._steps}  {text}\n")
            sys.stderr.flush()


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested mappings, by their names joined with "/"."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _numbers(f"{name}/{key}", below)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
