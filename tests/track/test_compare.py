"""Comparisons with made-up workers whose times are known: what they come to, and with how many pairs."""

import contextlib
import fnmatch
import random

import numpy as np
import pytest
from support.inputs import ROOT

from ejmp import cli
from ejmp.track import compare
from ejmp.track.bisect import commits_between, search
from ejmp.track.compare import CompareRequest, read_slow
from ejmp.track.compare_report import markdown
from ejmp.track.pairs import WorkerError, measure
from ejmp.track.side import Side
from ejmp.track.tolerances import Tolerances

BASE_SECONDS = {"machine/product": 2e-3, "pair/forward": 5e-3, "linear/forward": 8e-3, "activate/forward": 1e-3}


class Fake:
    """A worker with known times: each process has a state of its own, and each block some jitter."""

    def __init__(self, side, ratios, spread, errors=(), lacks=()):
        self.side, self.ratios, self.errors, self.lacks = side, ratios, errors, lacks
        self.state = {name: np.exp(RNG.normal(0, spread)) for name in BASE_SECONDS}
        self.asked = []

    def ask(self, what, case=None, only=(), **_):
        self.asked.append((what, case))
        if what == "names":
            names = [name for name in BASE_SECONDS if any(fnmatch.fnmatchcase(name, glob) for glob in only)]
            return {name: ("there is no such op" if name in self.lacks else None) for name in names}
        if what == "error":
            return 1.0 if case in self.errors else 1e-6
        if what == "facts":
            return {"dispatches": 10 + (case in self.ratios)}
        return BASE_SECONDS[case] * self.ratios.get(case, 1.0) * self.state[case] * np.exp(RNG.normal(0, 0.01))


RNG = np.random.default_rng(0)


@pytest.fixture
def world(monkeypatch, tmp_path):
    """Sides whose workers are made up; returns what to set, and counts pairs."""
    RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state
    random.seed(5)
    truth = {"ratios": {}, "spread": 0.01, "errors": (), "lacks": {"base": (), "head": ()}, "pairs": 0, "same": False}

    def prepare(name, folder, _repository, _report):
        folder.mkdir()
        return Side(name=name, root=folder, commit="c" * 40, dirty=False, python="python", why_no_extension=None)

    @contextlib.contextmanager
    def pair(base, head, _setting):
        truth["pairs"] += 1
        spread = truth["spread"] / 2**0.5
        yield (
            Fake(base, {}, spread, lacks=truth["lacks"]["base"]),
            Fake(head, truth["ratios"], spread, truth["errors"], truth["lacks"]["head"]),
        )

    def source_hash(root, case, _modules):
        changed = case in truth["ratios"] and root.name == "head" and not truth["same"]
        return f"{case} {changed}"

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, value in (("prepare", prepare), ("pair", pair), ("source_hash", source_hash)):
        monkeypatch.setattr(compare, name, value)
    return truth


def run(**options):
    return compare.compare(CompareRequest(base="a", head="b", rounds=9, **options))


def verdicts(result):
    return {row["name"]: row["verdict"] for row in result["rows"]}


@pytest.mark.usefixtures("world")
def test_same_code(tmp_path):
    result = run()
    assert set(verdicts(result).values()) <= {"SAME", "UNSURE"}
    assert list(verdicts(result).values()).count("SAME") >= 3
    assert (result["outcome"], result["status"]) == ("nothing", 0)
    assert all(row["control"] for row in result["rows"])
    assert result["exact"] == []
    assert list(tmp_path.iterdir()) == []


def test_a_slowdown_is_found_and_repeated(world):
    world["ratios"] = {"pair/forward": 1.25}
    result = run()
    assert verdicts(result)["pair/forward"] == "SLOW"
    assert (result["outcome"], result["status"]) == ("slow", 1)
    (row,) = [row for row in result["rows"] if row["name"] == "pair/forward"]
    assert row["ratio"] == pytest.approx(1.25, rel=0.02)
    assert len(row["repeated_log_ratios"]) == 4
    assert row["base_ms"] == pytest.approx(5, rel=0.03)
    assert not row["control"]
    assert result["exact"] == [("pair/forward dispatches", 10, 11)]
    text = markdown(result)
    assert text.startswith("# Slower: pair/forward\n")
    assert "- pair/forward dispatches: 10 -> 11, x 1.1" in text
    assert "| pair/forward | SLOW | 1.2" in text


def test_a_speedup_fails_nothing(world):
    world["ratios"] = {"pair/forward": 0.8}
    result = run()
    assert verdicts(result)["pair/forward"] == "FAST"
    assert result["status"] == 0


def test_small_slowdowns_below_the_floor_are_tolerated(world):
    """15 us more of 1 ms is below 20 us; 15% of 5 ms is not."""
    world["ratios"] = {"activate/forward": 1.015, "pair/forward": 1.15}
    found = verdicts(run())
    assert found["activate/forward"] == "SAME"
    assert found["pair/forward"] == "SLOW"


def test_more_pairs_only_for_what_is_undecided(world):
    world["ratios"] = {"pair/forward": 1.05}  # on the tolerance: neither inside nor beyond
    result = run()
    counts = {row["name"]: len(row["log_ratios"]) for row in result["rows"]}
    assert counts["pair/forward"] == 12
    assert verdicts(result)["pair/forward"] == "UNSURE"
    assert min(counts.values()) < 12
    assert result["status"] == 0


def test_budget(world):
    world["ratios"] = {"pair/forward": 1.05}
    result = run(budget_seconds=1e-9)
    assert {len(row["log_ratios"]) for row in result["rows"]} == {4}


def test_a_slow_control_makes_it_void(world):
    world["ratios"], world["same"] = {"pair/forward": 1.3}, True
    result = run()
    assert (result["outcome"], result["status"]) == ("noisy", 3)
    assert markdown(result).startswith("# Void: pair/forward became slower although its sources are the same")


def test_too_noisy(world):
    world["spread"] = 0.3
    result = run()
    assert result["status"] == 3
    assert markdown(result).startswith("# Too noisy: ")
    assert "SLOW" not in verdicts(result).values()


def test_wrong_results_are_broken_and_not_timed(world):
    world["errors"] = ("pair/forward",)
    result = run()
    assert result["status"] == 2
    assert result["broken"] == ["b, pair/forward: error 1.0e+00 against float64"]
    assert "pair/forward" not in verdicts(result)


def test_new_and_gone_are_no_errors(world):
    world["lacks"] = {"base": ("pair/forward",), "head": ("linear/forward",)}
    result = run()
    assert result["new"] == {"pair/forward": "there is no such op"}
    assert result["gone"] == {"linear/forward": "there is no such op"}
    assert result["status"] == 0
    assert "## New\n\n- pair/forward (BASE: there is no such op)" in markdown(result)


@pytest.mark.usefixtures("world")
def test_a_dying_worker_is_broken(monkeypatch):
    def die(*_, **__):
        raise WorkerError("b: the worker ended at time pair/forward")

    monkeypatch.setattr(compare, "measure", die)
    result = run()
    assert result["status"] == 2
    assert markdown(result).startswith("# Broken: 1 problem(s)")


def test_benchmarks_by_name(world):
    result = run(only=("pair/*",), exact_only=True)
    assert list(verdicts(result)) == ["machine/product", "pair/forward"]
    assert result["status"] == 0
    assert world["pairs"] == 1
    with pytest.raises(ValueError, match="--only: no benchmark is named like nothing"):
        run(only=("nothing",))


def test_rounds_are_by_turns():
    """Every round asks each case of both sides once, and which side is first differs from round to round."""
    log = []

    class Logged(Fake):
        def ask(self, what, case=None, **more):
            log.append((case, self.side))
            return super().ask(what, case, **more)

    names = list(BASE_SECONDS)
    found = measure(Logged("base", {}, 0), Logged("head", {"pair/forward": 2.0}, 0), names, rounds=8)
    assert found["pair/forward"].log_ratio == pytest.approx(np.log(2), abs=0.02)
    assert found["pair/forward"].base_seconds == pytest.approx(5e-3, rel=0.02)
    rounds = [log[i : i + 2 * len(names)] for i in range(0, len(log), 2 * len(names))]
    assert len(rounds) == 9
    for asked in rounds:
        assert sorted(asked) == sorted((name, side) for name in names for side in ("base", "head"))
        assert all(asked[i][0] == asked[i + 1][0] for i in range(0, len(asked), 2))
    assert {asked[0][1] for asked in rounds} == {"base", "head"}
    assert len({tuple(case for case, _ in asked) for asked in rounds}) > 1


def test_calibration(world, tmp_path):
    world["spread"] = 0.03
    result = run()
    path = tmp_path / "noise.json"
    Tolerances.read(path).joined(result).joined(result).write(path)
    spread = Tolerances.read(path).spread(result["key"], "pair/forward")
    assert 0.01 < spread < 0.06
    assert Tolerances.read(path).spread("another machine", "pair/forward") is None
    again = run(tolerances=path)
    limits = {row["name"]: row["tolerance"] for row in again["rows"]}
    assert limits["pair/forward"] == pytest.approx(min(max(0.03, np.expm1(3 * spread)), 0.1), rel=1e-3)
    world["ratios"] = {"pair/forward": 1.2}
    with pytest.raises(ValueError, match="--calibrate: expected the same code on both sides, got another of pair/forw"):
        Tolerances.read(path).joined(run())
    path.write_text('{"x": 1}')
    with pytest.raises(ValueError, match=r"noise\.json: expected log ratios of A/A runs"):
        Tolerances.read(path)


def test_requests_are_checked(capsys):
    assert read_slow(["pair/forward=0.1"]) == {"pair/forward": 0.1}
    with pytest.raises(ValueError, match="--slow-head: expected CASE=SHARE such as"):
        read_slow(["pair/forward"])
    with pytest.raises(ValueError, match="--budget: expected a positive number, got 0"):
        CompareRequest(base="a", head="b", budget_seconds=0)
    with pytest.raises(ValueError, match="--slow-head: expected a share between 0 and 10"):
        CompareRequest(base="a", head="b", slow_head={"x": -1.0})
    assert cli.main(["bench", "compare", "no-such-commit", str(ROOT)]) == 2
    assert "no-such-commit: expected a commit" in capsys.readouterr().err


@pytest.mark.parametrize("culprit", range(7))
@pytest.mark.parametrize("unsure", [(), (0, 3), (5,)])
def test_search_finds_the_culprit(culprit, unsure):
    """Positions that cannot be decided are passed over; the culprit is the first SLOW one, or among those before it."""
    asked = []

    def state(index):
        asked.append(index)
        return "UNSURE" if index in unsure and index < 6 else "SLOW" if index >= culprit else "SAME"

    good, bad = search(7, state)
    assert good < culprit <= bad
    assert set(range(good + 1, bad)) <= set(unsure)
    assert not unsure or len(asked) <= 7
    if not unsure:
        assert len(asked) <= 3


def test_commits_between():
    with pytest.raises(ValueError, match=r"nowhere\.\.HEAD: expected two commits"):
        commits_between(ROOT, "nowhere", "HEAD")
