"""Calls timed by turns, and what memory they need."""

import itertools
import time

import pytest
import torch
from support.inputs import load_golden

from ejmp.measure.memory import peak_memory, tensors_of
from ejmp.measure.timing import Rounds, by_turns, median_ratio, summarise

CPU = torch.device("cpu")


def recorder():
    seen = []
    return seen, {name: lambda name=name: seen.append(name) for name in "ab"}


def test_calls_take_turns_after_warming_up():
    seen, calls = recorder()
    found = by_turns(calls, CPU, Rounds(least=3, warm_ups=2), after_round=lambda number, _: seen.append(number))
    assert seen == [*"abab", "a", "b", 1, "a", "b", 2, "a", "b", 3]
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 3, "b": 3}
    assert all(s >= 0 for s in itertools.chain(*found.values()))


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        (Rounds(least=2, most=5, seconds=0.0), 2),
        (Rounds(least=2, most=5, seconds=60.0), 5),
        (Rounds(least=6, most=5, seconds=60.0), 6),
    ],
)
def test_rounds_end(rounds, expected):
    _, calls = recorder()
    assert {len(seconds) for seconds in by_turns(calls, CPU, rounds).values()} == {expected}


def test_rounds_end_when_time_is_up():
    found = by_turns({"sleep": lambda: time.sleep(0.02)}, CPU, Rounds(least=1, most=50, seconds=0.05, warm_ups=0))
    assert 2 <= len(found["sleep"]) <= 3
    assert min(found["sleep"]) >= 0.02


def test_statistics():
    assert median_ratio([2.0, 9.0, 8.0], [1.0, 1.0, 2.0]) == 4.0
    assert summarise([3.0, 1.0, 2.0]) == {"median": 2.0, "p95": 3.0, "samples": 3}


def test_known_tensors_need_no_memory(tiny):
    graph = load_golden("ethanol").graph()
    kept = []
    used = tiny.backbone.out_mlp_E.out_mlp[0].linear.weight
    peak = peak_memory(lambda: kept.extend([used.detach(), graph.main.vector.view(-1)]), CPU, tensors_of(tiny, graph))
    assert peak == 0
    assert peak_memory(lambda: kept.append(graph.main.vector.clone()), CPU, ()) == graph.main.vector.nbytes
