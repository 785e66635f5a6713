"""Verdicts on speed from pairs of processes: arithmetic alone, which times nothing.

A sample is the median, over the rounds of one pair of worker processes, of log(seconds of HEAD / seconds of BASE). Two
processes of the same code differ by their memory layout for as long as they live, so the pair and not the call is the
unit of the statistics. A benchmark's samples give a t-interval of its mean; with more than one benchmark and more than
one look at the growing samples, the level is divided so that all of a comparison's looks together have a chance of at
most `LEVEL` / 2 to call anything SLOW that is not: over the looks in proportion to the pairs they add (a linear
alpha-spending function with the union bound), over the benchmarks by Holm's procedure.

Sources: Holm, Scand. J. Statist. 6, 65 (1979); Lan and DeMets, Biometrika 70, 659 (1983).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["SLOW", "FAST", "SAME", "UNSURE", "UNSTABLE"]
LOOKS = (4, 6, 8, 10, 12)
"""Numbers of pairs after which verdicts are given; only benchmarks that are UNSURE go on to the next."""
LEVEL = 0.05
"""Chance that the intervals of all looks leave out the truth, on both sides together."""
RESOLUTION = math.log(1.10)
"""A benchmark whose interval is wider than this on each side after the last look cannot resolve 10%."""
TOLERANCE = 0.05
"""Tolerated slowdown of a benchmark without A/A runs, as a share of its time."""
TOLERANCE_RANGE = (0.03, 0.10)
"""Smallest and largest tolerance that A/A runs can give a benchmark."""
FLOOR_SECONDS = 20e-6
"""Slowdowns smaller than this are tolerated, whatever share they are of what is timed: a call, or several together."""
NOISY_SHARE = 1 / 3
"""A comparison with a larger share of undecided benchmarks is too noisy to pass or fail."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Mean of the samples with the bounds of its t-interval, as logarithms of a ratio of times."""

    mean: float
    lower: float
    upper: float

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return (self.upper - self.lower) / 2


def tolerance_log(share: float, base_seconds: float) -> float:
    """Return the log ratio up to which a benchmark counts as the same: its tolerance, or the floor if that is more."""
    return math.log1p(max(share, FLOOR_SECONDS / base_seconds))


def level_of_look(pairs: int) -> float:
    """Return the part of `LEVEL` that the look after so many pairs may use.

    Raises:
        ValueError: if there is no look after that number.
    """
    if pairs not in LOOKS:
        raise ValueError(f"pairs: expected one of {', '.join(map(str, LOOKS))}, got {pairs}")
    before = max((look for look in LOOKS if look < pairs), default=0)
    return LEVEL * (pairs - before) / LOOKS[-1]


def _moments(samples: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error.

    Raises:
        ValueError: if there are fewer than two samples.
    """
    n = len(samples)
    if n < 2:
        raise ValueError(f"samples: expected two or more, got {n}")
    mean = math.fsum(samples) / n
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in samples) / (n - 1) / n)


def interval(samples: Sequence[float], level: float) -> Interval:
    """Return the two-sided t-interval of the mean, which misses the truth with the chance `level`."""
    from scipy.stats import t  # noqa: PLC0415

    mean, error = _moments(samples)
    half = float(t.isf(level / 2, len(samples) - 1)) * error
    return Interval(mean=mean, lower=mean - half, upper=mean + half)


def p_beyond(samples: Sequence[float], limit: float) -> float:
    """Return the one-sided p-value of the hypothesis that the mean is at most `limit`."""
    from scipy.stats import t  # noqa: PLC0415

    mean, error = _moments(samples)
    if error == 0:
        return 0.0 if mean > limit else 1.0
    return float(t.sf((mean - limit) / error, len(samples) - 1))


def holm(p_values: Mapping[str, float], level: float, family: int) -> set[str]:
    """Return the names whose hypotheses Holm's procedure rejects.

    Args:
        p_values: by name.
        level: chance of rejecting any true hypothesis.
        family: number of hypotheses; those without a p-value here count as not rejected.
    """
    rejected: set[str] = set()
    for name in sorted(p_values, key=lambda name: p_values[name]):
        if p_values[name] > level / (family - len(rejected)):
            break
        rejected.add(name)
    return rejected


def look(samples: Mapping[str, Sequence[float]], limits: Mapping[str, float], family: int) -> dict[str, Verdict]:
    """Give the verdicts of one look at benchmarks that were undecided so far.

    Args:
        samples: log ratios by name of the benchmark, one per pair; all have as many, a number of `LOOKS`.
        limits: tolerated log ratio by name, from `tolerance_log`.
        family: number of benchmarks of the whole comparison.

    Returns:
        SLOW or FAST where the mean is beyond the limit by Holm's procedure, SAME where the whole interval is inside,
        UNSTABLE where the last look leaves an interval that cannot resolve 10%, else UNSURE.
    """
    level = level_of_look(len(next(iter(samples.values()))))
    slow = holm({name: p_beyond(x, limits[name]) for name, x in samples.items()}, level / 2, family)
    fast = holm({name: p_beyond([-v for v in x], limits[name]) for name, x in samples.items()}, level / 2, family)
    found: dict[str, Verdict] = {}
    for name, values in samples.items():
        bounds = interval(values, level)
        if name in slow:
            found[name] = "SLOW"
        elif name in fast:
            found[name] = "FAST"
        elif -limits[name] < bounds.lower and bounds.upper < limits[name]:
            found[name] = "SAME"
        elif len(values) == LOOKS[-1] and bounds.half > max(RESOLUTION, limits[name]):
            found[name] = "UNSTABLE"
        else:
            found[name] = "UNSURE"
    return found


def confirmed(samples: Mapping[str, Sequence[float]], limits: Mapping[str, float], family: int) -> set[str]:
    """Return which of the benchmarks that were SLOW are so again at one look at fresh pairs.

    Args:
        samples: log ratios of the fresh pairs by name; all have as many, a number of `LOOKS`.
        limits: tolerated log ratio by name.
        family: number of benchmarks that were SLOW.
    """
    level = level_of_look(len(next(iter(samples.values()))))
    return holm({name: p_beyond(x, limits[name]) for name, x in samples.items()}, level, family)


def spread_of(samples: Sequence[float]) -> float:
    """Return the standard deviation of log ratios of the same code against itself, whose mean is 0 by construction."""
    return math.sqrt(math.fsum(x * x for x in samples) / len(samples))


def tolerance_of(spread: float) -> float:
    """Return the tolerance of a benchmark whose A/A samples have a standard deviation: three of it, within limits."""
    least, most = TOLERANCE_RANGE
    return min(max(least, math.expm1(3 * spread)), most)


def is_unstable(spread: float) -> bool:
    """Return whether A/A samples say that even the last look cannot resolve 10%."""
    from scipy.stats import t  # noqa: PLC0415

    n = LOOKS[-1]
    return float(t.isf(level_of_look(n) / 2, n - 1)) * spread / math.sqrt(n) > RESOLUTION


Outcome = Literal["nothing", "slow", "broken", "noisy"]
STATUS: dict[Outcome, int] = {"nothing": 0, "slow": 1, "broken": 2, "noisy": 3}
"""Exit status of the command by what a comparison came to."""


def outcome(
    verdicts: Mapping[str, Verdict], *, controls: Iterable[str], unstable: Iterable[str], broken: bool
) -> Outcome:
    """Return what a comparison comes to.

    Args:
        verdicts: the last verdict on each benchmark; SLOW is one that was repeated.
        controls: benchmarks whose sources are the same on both sides: one that is SLOW makes all verdicts void.
        unstable: benchmarks that A/A runs say cannot resolve 10%: they are shown and decide nothing.
        broken: whether a side gives wrong results, or none where the other gives some.
    """
    controls, ignored = set(controls), set(unstable)
    counted = {name: verdict for name, verdict in verdicts.items() if name not in ignored}
    slow = {name for name, verdict in counted.items() if verdict == "SLOW"}
    undecided = sum(verdict in ("UNSURE", "UNSTABLE") for verdict in counted.values())
    if broken:
        return "broken"
    if slow & controls:
        return "noisy"
    if slow:
        return "slow"
    return "noisy" if undecided > NOISY_SHARE * len(counted) else "nothing"
