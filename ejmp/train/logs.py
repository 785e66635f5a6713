"""The log of a run: JSON lines for programs, a progress bar for people, tensorboard and wandb if asked for."""

import importlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

Tracker = Literal["tensorboard", "wandb"]
"""Service that gets the numbers of the log as well."""


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


class Log:
    """Writes lines of JSON to a file, their numbers to trackers, and the progress to the terminal.

    Args:
        path: file, which is appended to; None (on all ranks but 0): nothing is written or shown.
        steps: number of steps of the run, for the progress bar.
        trackers: services that get the numbers and the configuration as well.
        config: what the run is, as JSON can write it.

    Raises:
        ModuleNotFoundError: if a tracker is not installed.
    """

    def __init__(
        self,
        path: Path | None,
        steps: int,
        trackers: tuple[Tracker, ...] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._file = None if path is None else path.open("a", buffering=1)
        self._trackers: list[_Tensorboard | _Wandb] = []
        self._bar: Any = None
        self._task: Any = None
        self._steps = steps
        if path is None:
            return
        for name in trackers:
            try:
                self._trackers.append(_SERVICES[name](path.parent, config or {}))
            except ModuleNotFoundError as error:
                text = f"--track {name}: {error}; pip install ejmp[track] brings it"
                raise ModuleNotFoundError(text, name=error.name) from error

    def __enter__(self) -> Self:
        if self._file is not None and sys.stderr.isatty():
            from rich.console import Console  # noqa: PLC0415
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=self._steps)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)
        if self._file is not None:
            self._file.close()

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Write a line that says what happened, at which step, with which values."""
        if self._file is None:
            return
        line = {"event": event, "step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(line) + "\n")
        numbers = dict(_numbers(event, values))
        for tracker in self._trackers:
            tracker.log(numbers, step)

    def show(self, step: int, text: str) -> None:
        """Move the progress bar; without a terminal, write a line to stderr."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif self._file is not None:
            sys.stderr.write(f"{step}/{self._steps} {text}\n")
            sys.stderr.flush()


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested mappings, by their names joined with "/"."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _numbers(f"{name}/{key}", below)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
