"""The log of a run: JSON lines for programs, a progress bar for people, tensorboard and wandb if asked for."""

import importlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

Tracker = Literal["tensorboard", "wandb"]
"""Service that gets the numbers of the log as well."""


class Log:
    """Writes lines of JSON to a file, their numbers to trackers, and the progress to the terminal.

    Args:
        path: file, which is appended to; None (on all ranks but 0): nothing is written or shown.
        steps: number of steps of the run, for the progress bar.
        trackers: services that get the numbers as well.

    Raises:
        ModuleNotFoundError: if a tracker is not installed.
    """

    def __init__(self, path: Path | None, steps: int, trackers: tuple[Tracker, ...] = ()) -> None:
        self._file = None if path is None else path.open("a", buffering=1)
        self._trackers: list[Any] = []
        self._bar: Any = None
        self._task: Any = None
        self._steps = steps
        if path is None:
            return
        if "tensorboard" in trackers:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

            writer = SummaryWriter(str(path.parent / "tensorboard"))
            self._trackers.append(lambda numbers, step: [writer.add_scalar(k, v, step) for k, v in numbers.items()])
        if "wandb" in trackers:
            run = importlib.import_module("wandb").init(dir=str(path.parent), name=path.parent.name)
            self._trackers.append(lambda numbers, step: run.log(numbers, step=step))

    def __enter__(self) -> Self:
        if self._file is not None and sys.stderr.isatty():
            from rich.console import Console  # noqa: PLC0415
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=self._steps)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            self._file.close()

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Write a line that says what happened, at which step, with which values."""
        if self._file is None:
            return
        line = {"event": event, "step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(line) + "\n")
        numbers = {f"{event}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        for track in self._trackers:
            track(numbers, step)

    def show(self, step: int, text: str) -> None:
        """Move the progress bar; without a terminal, write a line to stderr."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif self._file is not None:
            sys.stderr.write(f"{step}/{self._steps} {text}\n")
            sys.stderr.flush()
