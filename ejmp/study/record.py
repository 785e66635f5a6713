"""The folders of runs: their results, which are there completely or not at all, and locks that end with a process."""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ejmp.data.store.durable import written

RESULT = "result.json"
"""The file of a run that is written last."""


def run_folder(study: Path, name: str) -> Path:
    """Return the folder of a run."""
    return study / "runs" / name


def is_finished(study: Path, name: str) -> bool:
    """Return whether a run has its result."""
    return (run_folder(study, name) / RESULT).exists()


def read_result(study: Path, name: str) -> dict[str, Any]:
    """Return the result of a finished run.

    Raises:
        FileNotFoundError: if it is not finished.
    """
    return json.loads((run_folder(study, name) / RESULT).read_text())


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON, which is there completely or not at all."""
    with written(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock while the body runs; the system takes it from a process that ends, however it ends.

    Args:
        path: file of the lock, which stays there.
        wait: wait until no other process holds it.

    Yields:
        Whether the lock is held; always, if it was waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
