"""The history of a machine: records in append-only files of JSON lines, FOLDER/MACHINE KEY/SUITE.jsonl, and trends.

The folder can be a branch's work tree or an artefact. Numbers of two machines are in two folders and never meet. A
trend follows the time of a call over that of a matrix product in the same minutes, so that a machine that is slower on
one day does not look like a change. Change points are found by ruptures (PELT: Killick et al., J. Am. Stat. Assoc.
107, 1590 (2012)), with a penalty from the noise between neighbouring records.
"""

import importlib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ejmp.lock import locked
from ejmp.track.schema import Reading, Record, read_lines

LEAST_CHANGE = 0.05
"""Changes of the mean smaller than this share are not reported."""
LARGEST_P = 0.001
"""Largest p-value of a change point."""
LEAST_SEGMENT = 3
"""Records that a segment of a trend has at least."""
LEAST_POINTS = 2 * LEAST_SEGMENT
"""A trend with fewer records is not searched."""
PENALTY = 3.0
"""What a further segment costs, in units of the noise's variance and of the logarithm of the number of records."""
LEAST_NOISE = 0.005
"""Standard deviation of neighbouring records that is assumed at least, as a share of the time."""


def add(folder: Path, records: Iterable[Record]) -> dict[Path, int]:
    """Append records to the files they belong to; return how many went into each.

    Writers wait for each other, and what a killed one left is cut off from the next line.
    """
    by_file: dict[Path, list[Record]] = {}
    for record in records:
        suite = re.sub(r"[^\w.-]+", "-", record.suite)
        by_file.setdefault(folder / record.key / f"{suite}.jsonl", []).append(record)
    for path, found in by_file.items():
        _append(path, "".join(json.dumps(record.to_dict()) + "\n" for record in found).encode())
    return {path: len(found) for path, found in by_file.items()}


def _append(path: Path, lines: bytes) -> None:
    with locked(path, wait=True), path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                lines = b"\n" + lines
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[str, Reading]:
    """Read a whole history, by machine key.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        readings = [read_lines(path) for path in sorted(place.glob("*.jsonl"))]
        if readings:
            records, problems = [], [line for reading in readings for line in reading.problems]
            for record in (record for reading in readings for record in reading.records):
                if record.key == place.name:
                    records.append(record)
                else:
                    problems.append(f"{place}: foreign: a record of {record.key}, named {record.name}")
            found[place.name] = Reading(records=tuple(records), problems=tuple(problems))
    return found


@dataclass(frozen=True, kw_only=True)
class Series:
    """The records of one benchmark on one machine, in the order in which they were added."""

    key: str
    suite: str
    name: str
    dtype: str
    backend: str
    records: tuple[Record, ...]

    @property
    def values(self) -> list[float]:
        """Logarithms of time over the same-minute product's, or of the time in s where a product is missing."""
        if all(record.product_gflops for record in self.records):
            return [math.log(record.median * (record.product_gflops or 1.0)) for record in self.records]
        return [math.log(record.median) for record in self.records]

    @property
    def title(self) -> str:
        """What tells it from the others of its machine."""
        return " ".join(filter(None, (self.suite, self.name, self.dtype, self.backend)))


def series_of(history: dict[str, Reading], *, clean: bool = True) -> list[Series]:
    """Return every series of a history.

    Args:
        history: what `read` gave.
        clean: leave out records of code that differed from its commit.
    """
    found: dict[tuple[str, str, tuple[str, str, str]], list[Record]] = {}
    for key, reading in history.items():
        for record in reading.records:
            if not (clean and record.dirty):
                found.setdefault((key, record.suite, record.series), []).append(record)
    return [
        Series(key=key, suite=suite, name=name, dtype=dtype, backend=backend, records=tuple(records))
        for (key, suite, (name, dtype, backend)), records in found.items()
    ]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A place where a trend changes."""

    series: Series
    index: int
    """Position of the first record after the change."""
    ratio: float
    """Mean after it over the mean before it; more than 1 is slower."""
    p_value: float

    @property
    def line(self) -> str:
        """What is said of it."""
        before, after = (self.series.records[i].commit[:12] for i in (self.index - 1, self.index))
        word = "slower" if self.ratio > 1 else "faster"
        return f"{self.series.key}: {self.series.title}: x {self.ratio:.3f} ({word}) from {before} to {after}"


def changes(series: Series) -> list[Change]:
    """Return the places where the mean of a series changes by `LEAST_CHANGE` or more.

    Raises:
        ModuleNotFoundError: if ruptures is not installed.
    """
    from scipy.stats import ttest_ind  # noqa: PLC0415

    values = series.values
    if len(values) < LEAST_POINTS:
        return []
    found = []
    ends = [0, *_ends_of_segments(values)]
    for start, index, end in zip(ends, ends[1:], ends[2:], strict=False):
        before, after = values[start:index], values[index:end]
        step = math.fsum(after) / len(after) - math.fsum(before) / len(before)
        test: Any = ttest_ind(before, after, equal_var=False)
        if abs(step) >= math.log1p(LEAST_CHANGE) and float(test.pvalue) <= LARGEST_P:
            found.append(Change(series=series, index=index, ratio=math.exp(step), p_value=float(test.pvalue)))
    return found


def _ends_of_segments(values: Sequence[float]) -> list[int]:
    """Return where segments of constant mean end; the last one ends with the values."""
    import numpy as np  # noqa: PLC0415

    try:
        ruptures = importlib.import_module("ruptures")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; pip install ejmp[history] brings it", name=error.name) from error
    # the median of differences is not moved by a step: 0.954 is that of |x - y| for normal numbers of deviation 1
    noise = float(np.median(np.abs(np.diff(values)))) / 0.954
    penalty = PENALTY * max(noise, LEAST_NOISE) ** 2 * math.log(len(values))
    search = ruptures.Pelt(model="l2", min_size=LEAST_SEGMENT, jump=1).fit(np.asarray(values))
    return [int(end) for end in search.predict(pen=penalty)]
