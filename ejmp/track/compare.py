"""Two sides compared: correctness first, then exact facts, then times until each benchmark is decided.

Times follow `ejmp.track.verdict`: 4 pairs of processes for all benchmarks, more for those that are UNSURE, and for
those that are SLOW fresh pairs, again 4 or more, that must say so again.
"""

import contextlib
import datetime as dt
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ejmp
from ejmp.track import exact
from ejmp.track import verdict as rules
from ejmp.track.machine import describe, machine_key
from ejmp.track.pairs import ROUNDS, Sample, Setting, WorkerError, measure, pair
from ejmp.track.schema import VERSION
from ejmp.track.side import Report, Side, prepare, workspace
from ejmp.track.sources import op_modules, source_hash
from ejmp.track.tolerances import Tolerances

ALLOWED_ERROR = 1e-3
"""Largest error against float64, over the largest value."""


@dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """A request to compare two sides.

    Raises:
        ValueError: if a number is not positive, or a known slowdown is not a share.
    """

    base: str
    """Commit, or folder of a checkout: what the other one is held against."""
    head: str
    """Commit, or folder of a checkout."""
    only: tuple[str, ...] = ("*",)
    """Globs of the benchmarks to compare, such as "pair/*"."""
    cores: tuple[int, ...] = ()
    """Cores of the workers; empty: all."""
    device: str = "cpu"
    """Device as torch names it."""
    backend: str = "native"
    """Backend whose ops are compared."""
    budget_seconds: float = 900.0
    """Time after which no further pairs begin."""
    rounds: int = ROUNDS
    """Rounds of each pair."""
    tolerances: Path | None = None
    """File of what A/A runs have shown; None: the default tolerance for all."""
    kernels: bool = False
    """Whether to compile the Triton kernels of both sides and compare what they need."""
    exact_only: bool = False
    """Whether to time nothing."""
    slow_head: dict[str, float] = field(default_factory=dict)
    """Shares by which benchmarks of HEAD are slowed down on purpose."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, value in (("budget", self.budget_seconds), ("rounds", self.rounds)):
            if not value > 0:
                raise ValueError(f"--{name}: expected a positive number, got {value}")
        for name, share in self.slow_head.items():
            if not 0 < share <= 10:
                raise ValueError(f"--slow-head: expected a share between 0 and 10 for {name}, got {share}")


@dataclass(kw_only=True)
class Row:
    """A benchmark of a comparison."""

    name: str
    control: bool
    """Whether its sources are the same on both sides."""
    limit: float = 0.0
    """Tolerated log ratio."""
    unstable: bool = False
    """Whether A/A runs say that it cannot resolve 10%."""
    samples: list[Sample] = field(default_factory=list)
    again: list[Sample] = field(default_factory=list)
    """Fresh pairs of a benchmark that was SLOW."""
    verdict: rules.Verdict = "UNSURE"
    note: str = ""

    def ratios(self) -> list[float]:
        """Return the log ratios of the pairs that decided."""
        return [sample.log_ratio for sample in self.samples]

    def to_dict(self) -> dict[str, Any]:
        """Return what a result says of it; times in ms, ratios of HEAD's to BASE's."""
        found: dict[str, Any] = {"name": self.name, "verdict": self.verdict, "control": self.control}
        found |= {"unstable": self.unstable, "tolerance": math.expm1(self.limit), "note": self.note}
        if len(self.samples) > 1:
            bounds = rules.interval(self.ratios(), rules.level_of_look(len(self.samples)))
            found |= {"ratio": math.exp(bounds.mean), "lower": math.exp(bounds.lower), "upper": math.exp(bounds.upper)}
            found["base_ms"] = 1e3 * statistics.median(s.base_seconds for s in self.samples)
            found["head_ms"] = 1e3 * statistics.median(s.head_seconds for s in self.samples)
        found["log_ratios"] = self.ratios()
        found["repeated_log_ratios"] = [sample.log_ratio for sample in self.again]
        found["head_seconds"] = [sample.head_seconds for sample in self.samples]
        return found


def checkout() -> Path:
    """Return the checkout this package runs from.

    Raises:
        ValueError: if it runs from somewhere else.
    """
    root = Path(str(ejmp.__file__)).resolve().parents[1]
    if not (root / "benchmarks" / "op_cases.py").exists():
        raise ValueError(f"ejmp: expected to run from a checkout, which has benchmarks/op_cases.py, not from {root}")
    return root


def compare(request: CompareRequest, report: Report = lambda _line: None) -> dict[str, Any]:
    """Compare two sides and return everything that was found, ready for JSON.

    Args:
        request: what to compare.
        report: called with a line about what is happening.

    Raises:
        ValueError: if a side does not exist or no benchmark is asked for.
    """
    root = checkout()
    tolerances = Tolerances.read(request.tolerances)
    with workspace() as folder:
        base = prepare(request.base, folder / "base", root, report)
        head = prepare(request.head, folder / "head", root, report)
        setting = Setting(
            benchmarks=root / "benchmarks",
            cores=request.cores,
            device=request.device,
            backend=request.backend,
            slow=request.slow_head,
            rounds=request.rounds,
        )
        return _Comparison(request, base, head, setting, tolerances, report).run()


class _Comparison:
    """A comparison that is going on."""

    def __init__(
        self, request: CompareRequest, base: Side, head: Side, setting: Setting, tolerances: Tolerances, report: Report
    ) -> None:
        self.request, self.base, self.head, self.setting = request, base, head, setting
        self.tolerances, self.report = tolerances, report
        self.rows: dict[str, Row] = {}
        self.broken: list[str] = []
        self.new: dict[str, str] = {}
        self.gone: dict[str, str] = {}
        self.facts: tuple[exact.Facts, exact.Facts] = {}, {}
        self.start = time.perf_counter()

    def run(self) -> dict[str, Any]:
        """Make the comparison."""
        machine = describe(self.request.device, cores=self.request.cores)
        try:
            self._check()
            self.report(f"{len(self.rows)} benchmarks are right on both sides, {self._passed():.0f} s")
            if not self.request.exact_only and self.rows:
                self._time()
        except WorkerError as error:
            self.broken.append(str(error))
        verdicts: dict[str, rules.Verdict] = {}
        if not self.request.exact_only:
            verdicts |= {name: row.verdict for name, row in self.rows.items()}
        found = rules.outcome(
            verdicts,
            controls=[name for name, row in self.rows.items() if row.control],
            unstable=[name for name, row in self.rows.items() if row.unstable],
            broken=bool(self.broken),
        )
        return {
            "schema": VERSION,
            "benchmark": "compare",
            "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "base": _about(self.base),
            "head": _about(self.head),
            "machine": machine,
            "key": machine_key(machine),
            "outcome": found,
            "status": rules.STATUS[found],
            "broken": self.broken,
            "new": self.new,
            "gone": self.gone,
            "exact": exact.differences(*self.facts),
            "rows": [row.to_dict() for row in self.rows.values()],
            "seconds": self._passed(),
        }

    def _passed(self) -> float:
        return time.perf_counter() - self.start

    def _check(self) -> None:
        """Find the benchmarks that both sides have, check their results, and collect the facts."""
        with pair(self.base, self.head, self.setting) as (base, head):
            globs = [*self.request.only, "machine/product"]
            there, here = (worker.ask("names", only=globs) for worker in (base, head))
            names = list({**here, **there})
            if names == ["machine/product"] and "machine/product" not in self.request.only:
                raise ValueError(f"--only: no benchmark is named like {', '.join(self.request.only)}")
            modules = op_modules(self.setting.benchmarks)
            for name in names:
                reasons = there.get(name, "not there"), here.get(name, "not there")
                if reasons == (None, None):
                    self._gate(name, base, head, modules)
                elif reasons[1] is None:
                    self.new[name] = str(reasons[0])
                else:
                    self.gone[name] = str(reasons[1])
            for facts, worker in zip(self.facts, (base, head), strict=True):
                facts.update(exact.facts_of(worker, list(self.rows)))
        for facts, side in zip(self.facts, (self.base, self.head), strict=True):
            facts.update(exact.launch_settings(side.root))
            if self.request.kernels:
                self._compile(side, facts)
        if not self.rows:
            self.broken.append(f"no benchmark runs on both sides: {self.gone or self.new}")
        if self.head.why_no_extension and not self.base.why_no_extension:
            self.broken.append(f"{self.head.name} has no extension: {self.head.why_no_extension}")

    def _compile(self, side: Side, facts: exact.Facts) -> None:
        """Compile the Triton kernels of a side, and its CUDA sources where nvcc is, and collect what they need."""
        nvcc, folder = exact.cuda_compiler(), side.root.parent / f"{side.root.name}-kernels"
        cuda = "and its CUDA sources" if nvcc else "alone: there is no nvcc for its CUDA sources"
        self.report(f"{side.name}: compiling its Triton kernels {cuda}")
        facts.update(exact.compiled_kernels(side, exact.triton_script(checkout()), folder))
        if nvcc:
            facts.update(exact.cuda_kernels(side.root, nvcc, folder))

    def _gate(self, name: str, base: Any, head: Any, modules: dict[str, tuple[str, ...]]) -> None:
        """Take up a benchmark whose results are right on both sides."""
        errors = base.ask("error", case=name), head.ask("error", case=name)
        for side, error in zip((self.base, self.head), errors, strict=True):
            if not error <= ALLOWED_ERROR:
                self.broken.append(f"{side.name}, {name}: error {error:.1e} against float64")
                return
        same = [source_hash(side.root, name, modules) for side in (self.base, self.head)]
        self.rows[name] = Row(name=name, control=same[0] == same[1] and name not in self.request.slow_head)

    def _more(self, names: Sequence[str]) -> dict[str, Sample]:
        """Measure benchmarks in one more pair of processes."""
        with pair(self.base, self.head, self.setting) as (base, head):
            return measure(base, head, names, self.setting.rounds)

    def _time(self) -> None:
        """Add pairs until every benchmark is decided or the budget is used up; repeat what is SLOW."""
        family, going = len(self.rows), list(self.rows)
        key = machine_key(describe(self.request.device, cores=self.request.cores))
        for pairs in rules.LOOKS:
            if pairs > rules.LOOKS[0] and self._passed() > self.request.budget_seconds:
                self.report("the budget is used up")
                break
            while len(self.rows[going[0]].samples) < pairs:
                for name, sample in self._more(going).items():
                    self.rows[name].samples.append(sample)
            for name in going:
                self._set_limit(self.rows[name], key)
            limits = {name: self.rows[name].limit for name in going}
            found = rules.look({name: self.rows[name].ratios() for name in going}, limits, family)
            for name, value in found.items():
                self.rows[name].verdict = value
            going = [name for name, value in found.items() if value == "UNSURE"]
            self.report(f"{pairs} pairs, {self._passed():.0f} s: {len(going)} benchmarks undecided")
            if not going:
                break
        self._repeat()

    def _set_limit(self, row: Row, key: str) -> None:
        seconds = statistics.median(sample.base_seconds for sample in row.samples)
        spread = self.tolerances.spread(key, row.name)
        share = rules.TOLERANCE if spread is None else rules.tolerance_of(spread)
        row.limit = rules.tolerance_log(share, seconds)
        row.unstable = spread is not None and rules.is_unstable(spread)

    def _repeat(self) -> None:
        """Let benchmarks stay SLOW only if fresh pairs say it again."""
        slow = [name for name, row in self.rows.items() if row.verdict == "SLOW"]
        if not slow:
            return
        self.report(f"slow, and measured again: {', '.join(slow)}")
        going = list(slow)
        for pairs in rules.LOOKS:
            if not going or (pairs > rules.LOOKS[0] and self._passed() > self.request.budget_seconds):
                break
            while len(self.rows[going[0]].again) < pairs:
                for name, sample in self._more(going).items():
                    self.rows[name].again.append(sample)
            again = {name: [sample.log_ratio for sample in self.rows[name].again] for name in going}
            kept = rules.confirmed(again, {name: self.rows[name].limit for name in going}, len(slow))
            going = [name for name in going if name not in kept]
        for name in going:
            self.rows[name].verdict, self.rows[name].note = "UNSURE", "was slow, but not again in fresh pairs"


def _about(side: Side) -> dict[str, Any]:
    return {"name": side.name, "commit": side.commit, "dirty": side.dirty, "no_extension": side.why_no_extension}


def read_slow(words: Sequence[str]) -> dict[str, float]:
    """Read "CASE=SHARE" words.

    Raises:
        ValueError: if a word is not of that form.
    """
    found = {}
    for word in words:
        name, _, share = word.partition("=")
        with contextlib.suppress(ValueError):
            found[name] = float(share)
        if name not in found:
            raise ValueError(f"--slow-head: expected CASE=SHARE such as pair/forward=0.1, got {word}")
    return found
