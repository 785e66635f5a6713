"""What every benchmark writes, in one versioned layout: a `Record`, one line of JSON each.

pytest-benchmark's JSON carries records in `extra_info["record"]` and stays what it is; `records_of` reads it, and older
files without records as far as they go.
"""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ejmp.track.machine import machine_key

VERSION = 1
"""Version of the layout; a reader takes this one alone, and names and skips others."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement of one benchmark.

    Raises:
        ValueError: if a field is not of its type, or there is no positive time.
    """

    suite: str
    """Suite that measured it; a history has a file per suite."""
    name: str
    """Name of the benchmark in its suite, such as "pair/forward"."""
    seconds: tuple[float, ...]
    """Seconds of a call, one per block."""
    machine: dict[str, Any]
    """What `ejmp.track.machine.describe` says."""
    commit: str
    """Commit of the code, "unknown" if nobody knows."""
    date: str
    """When it was measured, in ISO 8601."""
    dirty: bool = False
    """Whether the code differs from the commit."""
    sizes: dict[str, int | float] = field(default_factory=dict)
    """Sizes of what was computed, such as atoms, edges, blocks."""
    dtype: str = "fp32"
    """Type of features, or precision of a model."""
    backend: str = ""
    """Backend that was measured."""
    reference_seconds: tuple[float, ...] = ()
    """Seconds of the plain-torch reference in the same rounds."""
    error: float | None = None
    """Largest error against float64, over the largest value."""
    gflop: float | None = None
    """Work of a call, 10^9 floating-point operations."""
    gbytes: float | None = None
    """Bytes a call reads and writes at least, 10^9."""
    product_gflops: float | None = None
    """Rate of the machine's matrix product in the same minutes, 10^9 operations per second."""
    copy_gbytes_per_s: float | None = None
    """Rate of copying memory in the same minutes, 10^9 bytes read and written per second."""
    peak_bytes: int | None = None
    """Most bytes a call holds beyond what was there before."""
    source: str | None = None
    """Hash of the sources that make it."""
    state: dict[str, float] = field(default_factory=dict)
    """Load and clocks, as `ejmp.track.machine.state` says."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of what is not part of the machine."""

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("suite", "name", "commit", "date", "dtype", "backend"):
            _expect(name, getattr(self, name), str)
        for name in ("machine", "sizes", "state", "versions"):
            _expect(name, getattr(self, name), dict)
        _expect("dirty", self.dirty, bool)
        for name in ("error", "gflop", "gbytes", "product_gflops", "copy_gbytes_per_s", "peak_bytes"):
            if getattr(self, name) is not None:
                _expect(name, getattr(self, name), int | float)
        if not self.seconds:
            raise ValueError("seconds: expected one or more, got none")
        for value in (*self.seconds, *self.reference_seconds):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"seconds: expected positive numbers, got {value!r}")
        for name in ("suite", "name"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a name, got nothing")

    @property
    def key(self) -> str:
        """The machine's name in a history."""
        return machine_key(self.machine)

    @property
    def median(self) -> float:
        """Median seconds of a call."""
        return statistics.median(self.seconds)

    @property
    def speedup(self) -> float | None:
        """Seconds of the reference over seconds of the call: the median over rounds, if both have as many."""
        if not self.reference_seconds:
            return None
        if len(self.reference_seconds) != len(self.seconds):
            return statistics.median(self.reference_seconds) / self.median
        return statistics.median(r / s for r, s in zip(self.reference_seconds, self.seconds, strict=True))

    @property
    def product_share(self) -> float | None:
        """Rate of the work over that of the machine's matrix product."""
        if not self.gflop or not self.product_gflops:
            return None
        return self.gflop / self.median / self.product_gflops

    @property
    def copy_share(self) -> float | None:
        """Rate of the traffic over that of copying memory."""
        if not self.gbytes or not self.copy_gbytes_per_s:
            return None
        return self.gbytes / self.median / self.copy_gbytes_per_s

    @property
    def ceiling_share(self) -> float | None:
        """Share of what the machine allows by its product and copy rates (a roofline): the larger of the two shares."""
        return max(filter(None, (self.product_share, self.copy_share)), default=None)

    @property
    def series(self) -> tuple[str, str, str]:
        """What a trend is drawn of, besides machine and suite: name, type, backend."""
        return self.name, self.dtype, self.backend

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return {"schema": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Make a record of what `to_dict` gave.

        Raises:
            ValueError: if it is something else, or of another version.
        """
        if not isinstance(values, dict) or "schema" not in values:
            raise ValueError("foreign: not a record of ejmp")
        if values["schema"] != VERSION:
            age = "older" if isinstance(values["schema"], int) and values["schema"] < VERSION else "newer or foreign"
            raise ValueError(f"{age}: of schema {values['schema']!r}, not {VERSION}")
        given = {name: value for name, value in values.items() if name != "schema"}
        for name in ("seconds", "reference_seconds"):
            given[name] = tuple(given.get(name, ()))
        try:
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"foreign: {error}") from error


def _expect(name: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = getattr(kind, "__name__", "number")
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was found in a file."""

    records: tuple[Record, ...]
    problems: tuple[str, ...]
    """Lines that were skipped, each as "FILE:LINE: reason"."""


def read_lines(path: Path) -> Reading:
    """Read a file of records, one per line; what is damaged, foreign or of another version is named and skipped."""
    records, problems = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError:  # not JSON, or not even text
            problems.append(f"{path}:{number}: damaged: not JSON")
            continue
        try:
            records.append(Record.from_dict(values))
        except (ValueError, TypeError) as error:
            problems.append(f"{path}:{number}: {error}")
    return Reading(records=tuple(records), problems=tuple(problems))


def records_of(path: Path) -> Reading:
    """Read records of any file a benchmark writes.

    These are lines of records, pytest-benchmark's JSON, a comparison's result, and a GPU campaign's.

    Raises:
        ValueError: if it is none of these.
    """
    if path.suffix == ".jsonl":
        return read_lines(path)
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON of a benchmark ({error})") from error
    if isinstance(content, dict) and content.get("benchmark") == "compare" and "rows" in content:
        return Reading(records=tuple(of_comparison(content)), problems=())
    if isinstance(content, dict) and content.get("benchmark") == "gpu_campaign" and "steps" in content:
        rows = [row["record"] for step in content["steps"].values() for row in step["rows"] if "record" in row]
        return Reading(records=tuple(map(Record.from_dict, rows)), problems=())
    if not isinstance(content, dict) or not isinstance(content.get("benchmarks"), list):
        raise ValueError(  # noqa: TRY004 - of a file, not of an argument
            f"{path}: expected JSON of pytest-benchmark, of a comparison or of a GPU campaign, or .jsonl"
        )
    records, problems = [], []
    for number, bench in enumerate(content["benchmarks"]):
        try:
            records.append(of_pytest(bench, content))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            name = bench.get("name", number) if isinstance(bench, dict) else number
            problems.append(f"{path}: {name}: {error}")
    return Reading(records=tuple(records), problems=tuple(problems))


def of_comparison(result: Mapping[str, Any]) -> Iterable[Record]:
    """Yield a record of HEAD for each benchmark of a comparison's result that was timed."""
    rows = {row["name"]: row for row in result["rows"] if row["head_seconds"]}
    product = rows.get("machine/product")
    rate = None if product is None else 2e-9 * 384**3 / statistics.median(product["head_seconds"])
    for name, row in rows.items():
        yield Record(
            suite="compare",
            name=name,
            seconds=tuple(row["head_seconds"]),
            machine=result["machine"],
            commit=result["head"]["commit"],
            dirty=result["head"]["dirty"],
            date=result["date"],
            product_gflops=rate,
        )


def of_pytest(bench: Mapping[str, Any], content: Mapping[str, Any]) -> Record:
    """Return the record of one benchmark of pytest-benchmark's JSON.

    Args:
        bench: an item of its list "benchmarks".
        content: the whole file.

    Raises:
        ValueError: if it has no time, or a damaged record.
        KeyError: if it is no benchmark of pytest-benchmark.
    """
    info = bench["extra_info"]
    if "record" in info:
        return Record.from_dict(info["record"])
    stats = bench["stats"]
    commit = str(info.get("commit") or content.get("commit_info", {}).get("id") or "unknown")
    suite = str(bench.get("fullname", "")).rpartition("/")[2].partition("::")[0].removesuffix(".py")
    return of_measured(
        suite=suite.removeprefix("bench_") or "unknown",
        name=str(bench["name"]),
        seconds=stats.get("data") or [stats["median"]],
        info={"date": content.get("datetime", "unknown"), **info, "commit": commit},
        machine=_old_machine(info, content),
    )


def _old_machine(info: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    there = content.get("machine_info", {})
    cpu = there.get("cpu", {}) if isinstance(there.get("cpu"), dict) else {}
    found = {"cpu": info.get("cpu") or cpu.get("brand_raw", "unknown"), "cores": info.get("cores") or cpu.get("count")}
    found |= {name: info.get(name) for name in ("threads", "torch", "python", "triton", "gpu")}
    return found | {"device": "cuda" if info.get("gpu") else "cpu"}


def of_measured(
    *, suite: str, name: str, seconds: Sequence[float], info: Mapping[str, Any], machine: dict[str, Any]
) -> Record:
    """Return a record of what a suite of benchmarks/ notes in `extra_info`.

    Times by turns ("ms", "reference_ms") are taken before pytest-benchmark's own, which come from other minutes.

    Args:
        suite: name of the suite.
        name: name of the benchmark.
        seconds: of a call, one per round.
        info: what the benchmark noted, and where it ran.
        machine: where it ran.

    Raises:
        ValueError: if a value is not of its type.
    """
    by_turns = isinstance(info.get("ms"), int | float) and isinstance(info.get("reference_ms"), int | float)
    used = (1e-3 * info["ms"],) if by_turns else tuple(seconds)
    median = statistics.median(used)
    peak = info.get("peak_mib", info.get("peak_memory_mib"))
    rates = {name: info.get(name) for name in ("gflops", "gbytes_per_s", "share_of_gemm_rate", "share_of_copy_rate")}
    commit = str(info.get("commit", "unknown"))
    return Record(
        suite=suite,
        name=name,
        seconds=used,
        reference_seconds=(1e-3 * info["reference_ms"],) if by_turns else (),
        machine=machine,
        commit=commit.removesuffix("-dirty"),
        dirty=commit.endswith("-dirty"),
        date=str(info.get("date", "unknown")),
        sizes={n: info[n] for n in ("atoms", "edges", "blocks", "parameters") if isinstance(info.get(n), int | float)},
        dtype=str(info.get("precision", "fp32")),
        backend=str(info.get("backend", "")),
        error=info.get("error_vs_float64"),
        gflop=rates["gflops"] and rates["gflops"] * median,
        gbytes=rates["gbytes_per_s"] and rates["gbytes_per_s"] * median,
        product_gflops=_ceiling(rates["gflops"], rates["share_of_gemm_rate"]) or info.get("product_gflops"),
        copy_gbytes_per_s=_ceiling(rates["gbytes_per_s"], rates["share_of_copy_rate"]),
        peak_bytes=round(peak * 2**20) if isinstance(peak, int | float) else None,
        source=info.get("source"),
        state={"load": info["load_before"]} if "load_before" in info else {},
        versions={name: str(info[name]) for name in ("ejmp", "python") if name in info},
    )


def _ceiling(rate: float | None, share: float | None) -> float | None:
    return rate / share if rate and share else None
