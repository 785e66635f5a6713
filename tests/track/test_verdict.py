"""Verdicts against known truths: tables of t and Holm by hand, and simulated comparisons whose answer is known."""

import math

import numpy as np
import pytest
from scipy import stats

from ejmp.track import verdict
from ejmp.track.verdict import LOOKS, holm, interval, look, outcome, p_beyond, tolerance_log


def test_interval_is_scipys():
    samples = [0.01, 0.03, -0.02, 0.05]
    found = interval(samples, 0.05)
    expected = stats.ttest_1samp(samples, 0.0).confidence_interval(0.95)
    assert (found.lower, found.upper) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert p_beyond(samples, 0.01) == pytest.approx(stats.ttest_1samp(samples, 0.01, alternative="greater").pvalue)


def test_equal_samples_are_certain():
    assert p_beyond([0.2] * 4, 0.1) == 0
    assert p_beyond([0.2] * 4, 0.3) == 1


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match="samples: expected two or more, got 1"):
        interval([0.1], 0.05)


def test_holm_by_hand():
    """Of 4 hypotheses at 0.05 the limits are 0.0125, 0.0167, 0.025, 0.05; the first that fails ends it."""
    p = {"a": 0.01, "b": 0.016, "c": 0.03, "d": 0.04}
    assert holm(p, 0.05, 4) == {"a", "b"}
    assert holm({"a": 0.01}, 0.05, 4) == {"a"}
    assert holm({"a": 0.013}, 0.05, 4) == set()


def test_all_looks_spend_the_level():
    assert sum(map(verdict.level_of_look, LOOKS)) == pytest.approx(verdict.LEVEL)
    with pytest.raises(ValueError, match="pairs: expected one of 4, 6"):
        verdict.level_of_look(5)


def test_floor():
    """Of a call of 100 us 20 us are tolerated, of one of 10 ms the share."""
    assert tolerance_log(0.05, 100e-6) == pytest.approx(math.log(1.2))
    assert tolerance_log(0.05, 10e-3) == pytest.approx(math.log(1.05))


def test_verdicts_without_noise():
    limit = math.log(1.05)
    samples = {"slow": 0.1, "fast": -0.1, "same": 0.01}
    jitter = np.array([-1, 1, -1, 1]) * 1e-4
    found = look({n: list(x + jitter) for n, x in samples.items()}, dict.fromkeys(samples, limit), 3)
    assert found == {"slow": "SLOW", "fast": "FAST", "same": "SAME"}


def test_unstable_is_said_at_the_last_look_only():
    rng = np.random.default_rng(0)
    samples = rng.normal(0, 0.5, 12).tolist()
    limit = {"wild": math.log(1.05)}
    assert look({"wild": samples[:4]}, limit, 1) == {"wild": "UNSURE"}
    assert look({"wild": samples}, limit, 1) == {"wild": "UNSTABLE"}


def simulate(rng, truth, spread):
    """Run the looks and the repetition of a comparison of benchmarks with known log ratios; return its verdicts."""
    limits = {name: math.log(1.05) for name in truth}
    samples = {name: [] for name in truth}
    final, going = {}, list(truth)
    for pairs in LOOKS:
        for name in going:
            samples[name] += rng.normal(truth[name], spread, pairs - len(samples[name])).tolist()
        final |= look({name: samples[name] for name in going}, limits, len(truth))
        going = [name for name in going if final[name] == "UNSURE"]
        if not going:
            break
    slow = [name for name, found in final.items() if found == "SLOW"]
    again, kept = {name: rng.normal(truth[name], spread, LOOKS[-1]).tolist() for name in slow}, set()
    for pairs in LOOKS:
        going = {name: again[name][:pairs] for name in slow if name not in kept}
        kept |= verdict.confirmed(going, limits, len(slow)) if going else set()
    return final | {name: "UNSURE" for name in slow if name not in kept}


def test_no_false_alarm_in_simulated_comparisons():
    """200 comparisons of 50 benchmarks each, of which a half sit on the limit itself: at most 1 run in 40 may alarm."""
    rng = np.random.default_rng(1)
    truth = {f"b{i}": (math.log(1.05) if i % 2 else 0.0) for i in range(50)}
    alarms = sum("SLOW" in simulate(rng, truth, 0.03).values() for _ in range(200))
    assert alarms <= 5


def test_slowdowns_are_found_in_simulated_comparisons():
    """One of 50 benchmarks is slower, pairs spread by 1.5%: 20% is found always, 10% in 18 of 20."""
    for slowdown, least in ((1.20, 40), (1.10, 36)):
        rng = np.random.default_rng(2)
        truth = {f"b{i}": 0.0 for i in range(49)} | {"bad": math.log(slowdown)}
        found = [simulate(rng, truth, 0.015) for _ in range(40)]
        assert sum(verdicts["bad"] == "SLOW" for verdicts in found) >= least
        assert not [verdicts for verdicts in found if any(v == "SLOW" for n, v in verdicts.items() if n != "bad")]


def test_tolerances_from_the_spread_of_the_same_code():
    assert verdict.spread_of([0.03, -0.03, 0.03]) == pytest.approx(0.03)
    assert verdict.tolerance_of(0.001) == 0.03
    assert verdict.tolerance_of(0.02) == pytest.approx(math.exp(0.06) - 1)
    assert verdict.tolerance_of(0.5) == 0.10
    assert not verdict.is_unstable(0.05)
    assert verdict.is_unstable(0.2)


def test_outcomes():
    def came_to(verdicts, **options):
        return outcome(verdicts, **({"controls": (), "unstable": (), "broken": False} | options))

    assert came_to({"a": "SAME", "b": "FAST"}) == "nothing"
    assert came_to({"a": "SLOW", "b": "SAME"}) == "slow"
    assert came_to({"a": "SLOW", "b": "SAME"}, controls=["b"]) == "slow"
    assert came_to({"a": "SLOW", "b": "SLOW"}, controls=["b"]) == "noisy"
    assert came_to({"a": "SLOW", "b": "SAME"}, unstable=["a"]) == "nothing"
    assert came_to({"a": "UNSURE", "b": "SAME"}) == "noisy"
    assert came_to({"a": "SLOW", "b": "SAME"}, broken=True) == "broken"
    assert list(verdict.STATUS.values()) == [0, 1, 2, 3]
