"""The folders of runs and their results, which are there completely or not at all."""

import json
from pathlib import Path
from typing import Any

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
