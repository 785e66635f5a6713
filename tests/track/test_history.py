"""Histories: two writers lose nothing, machines stay apart, changes are found where they were made, and the page."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from support.inputs import environment
from support.pages import Page
from support.track_cases import MACHINE, record

from ejmp import cli
from ejmp.track import history
from ejmp.track.page import write_page

WRITER = """
import sys
from pathlib import Path
from ejmp.track import history
from ejmp.track.schema import Record
about = {"suite": "quick", "name": "pair/forward", "machine": {"cpu": "x"}, "date": "2026"}
for i in range(100):
    history.add(Path(sys.argv[1]), [Record(commit=f"{sys.argv[2]}-{i}", seconds=(1e-3,) * 200, **about)])
"""


def test_two_writers_lose_nothing(tmp_path):
    command = [sys.executable, "-c", WRITER, tmp_path]
    writers = [subprocess.Popen([*command, name], env=environment()) for name in ("a", "b")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    (reading,) = history.read(tmp_path).values()
    assert not reading.problems
    assert sorted(r.commit for r in reading.records) == sorted(f"{n}-{i}" for n in "ab" for i in range(100))


def test_a_torn_line_costs_nothing_but_itself(tmp_path):
    history.add(tmp_path, [record(commit="one")])
    (path,) = tmp_path.rglob("*.jsonl")
    with path.open("ab") as file:
        file.write(b'{"schema": 1, "sui')  # a writer that was killed
    history.add(tmp_path, [record(commit="two")])
    (reading,) = history.read(tmp_path).values()
    assert [r.commit for r in reading.records] == ["one", "two"]
    assert reading.problems == (f"{path}:2: damaged: not JSON",)


def test_machines_stay_apart(tmp_path):
    other = record(machine=MACHINE | {"torch": "2.14.0"})
    history.add(tmp_path, [record(), other, record(suite="ops")])
    found = history.read(tmp_path)
    assert set(found) == {record().key, other.key}
    assert len(history.series_of(found)) == 3
    stray = tmp_path / record().key / "stray.jsonl"
    stray.write_text(json.dumps(other.to_dict()) + "\n")
    reading = history.read(tmp_path)[record().key]
    assert len(reading.records) == 2
    assert "foreign" in reading.problems[0]


def test_dirty_code_is_left_out(tmp_path):
    history.add(tmp_path, [record(), record(dirty=True)])
    found = history.read(tmp_path)
    assert [len(one.records) for one in history.series_of(found)] == [1]
    assert [len(one.records) for one in history.series_of(found, clean=False)] == [2]


def trend(factors, *, rates=None):
    """A series of runs of 1 ms times each factor, beside a product whose rate may change."""
    rates = rates or [100.0] * len(factors)
    pairs = zip(factors, rates, strict=True)
    return [record(seconds=(1e-3 * f,), commit=f"c{i}", product_gflops=r) for i, (f, r) in enumerate(pairs)]


def series(tmp_path, records):
    history.add(tmp_path, records)
    (one,) = history.series_of(history.read(tmp_path))
    return one


def test_a_slow_day_of_the_machine_is_no_change(tmp_path):
    """All that takes twice as long on some days, the product included, leaves the trend where it was."""
    slow = [1.0] * 5 + [2.0] * 5
    one = series(tmp_path, trend(slow, rates=[100 / f for f in slow]))
    assert one.values == pytest.approx([math.log(0.1)] * 10)


def test_changes_are_found_where_they_were_made(tmp_path):
    pytest.importorskip("ruptures")
    noise = np.random.default_rng(0).normal(0, 0.01, 30)
    factors = [math.exp(x + (math.log(1.2) if i >= 18 else 0)) for i, x in enumerate(noise)]
    (change,) = history.changes(series(tmp_path / "a", trend(factors)))
    assert change.index == 18
    assert change.ratio == pytest.approx(1.2, rel=0.02)
    assert "slower) from c17 to c18" in change.line
    assert not history.changes(series(tmp_path / "b", trend([math.exp(x) for x in noise])))
    assert not history.changes(series(tmp_path / "c", trend(factors[:5])))


def test_check_exits_1_if_the_newest_is_slower(tmp_path, capsys):
    pytest.importorskip("ruptures")
    steps = [1.0, 1.01, 0.99, 1.0, 1.01, 0.99, 1.0, 1.01]
    history.add(tmp_path, trend([*steps, *(1.3 * s for s in steps)]))
    assert cli.main(["bench", "history", "check", "--folder", str(tmp_path)]) == 1
    assert "x 1.300 (slower) from c7 to c8" in capsys.readouterr().out


def test_page(tmp_path):
    pytest.importorskip("matplotlib")
    name = "<script>/forward"
    made = trend([1.0, 1.0, 1.2])
    rates = {"gflop": 0.011, "product_gflops": 100.0, "gbytes": 0.0055, "copy_gbytes_per_s": 10.0}
    made += [record(name, commit="c0", reference_seconds=(3e-3, 3.3e-3, 3.6e-3), dtype="bf16", **rates)]
    history.add(tmp_path, made)
    all_series = history.series_of(history.read(tmp_path))
    change = history.Change(series=all_series[0], index=2, ratio=1.2, p_value=1e-4)
    path = tmp_path / "out" / "page.html"
    write_page(path, all_series, [change], ["quick.jsonl:3: damaged"])
    page = Page(path.read_text())
    page.check()
    assert name in page.text
    assert "x 1.200 (slower) from c1 to c2" in page.text
    assert "quick.jsonl:3: damaged" in page.text
    assert {"show-type-fp32", "show-type-bf16", "show-op-pair"} <= set(page.values("id"))
    for box in (attributes for attributes in page.named("input")):
        assert f"main:has(#{box['id']}:not(:checked)) .{box['id'].removeprefix('show-')} " in path.read_text()
    cells = dict(zip(page.cells[:7], page.cells[7:14], strict=True))
    assert (cells["of the first"], cells["% of ceiling"]) == ("1.20", "-")
    other = dict(zip(page.cells[:7], page.cells[14:21], strict=True))
    # a call of 1.1 ms: 10% of the product's rate, half of the copy rate, which is the nearer of the two limits
    assert (other["x of reference"], other["% of ceiling"]) == ("3.00", "50")
    with pytest.raises(ValueError, match="expected records to show"):
        write_page(path, [], [], [])
