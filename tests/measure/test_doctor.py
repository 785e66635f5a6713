"""`ejmp doctor` says how much of the machine other work takes."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from ejmp import cores
from ejmp.measure import doctor

TEXT = """cpu  1 2 3 4 5 6 7 8 0 0
cpu2 {user} 0 5 {idle} 0 0 0 0 0 0
cpu5 7 0 {system} 100 0 0 0 {steal} 0 0
cpu22 {elsewhere} 0 0 0 0 0 0 0 0 0
intr 9 9
"""


@pytest.mark.parametrize(
    ("passed", "expected"),
    [
        ({"idle": 200}, 0.0),
        ({"user": 130, "own": 50, "idle": 70}, 0.8),
        ({"user": 150, "idle": 50}, 1.5),
        ({"user": 90, "system": 10, "steal": 30, "idle": 70}, 1.3),
        ({"idle": 200, "elsewhere": 100}, 0.0),
    ],
)
def test_what_others_do_is_read_from_the_system(tmp_path, monkeypatch, passed, expected):
    """In one second, on cores 2 and 5 of many, ticks of 1/100 s, some of which this process used itself ("own")."""
    stat, clock, counts = (
        tmp_path / "stat",
        [5.0],
        {"user": 1000, "system": 500, "idle": 9000, "steal": 7, "elsewhere": 3},
    )
    stat.write_text(TEXT.format(**counts))

    def sleep(seconds):
        clock[0] += seconds
        stat.write_text(TEXT.format(**{name: value + passed.get(name, 0) for name, value in counts.items()}))

    def times():
        return SimpleNamespace(user=3 + (passed.get("own", 0) / 100 if clock[0] > 5 else 0), system=1)

    monkeypatch.setattr(cores, "STAT", stat)
    monkeypatch.setattr(cores, "available", lambda: {2, 5})
    monkeypatch.setattr(cores.os, "times", times)
    monkeypatch.setattr(cores.os, "sysconf", lambda _: 100)
    monkeypatch.setattr(cores.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(cores.time, "sleep", sleep)
    assert cores.busy_elsewhere(1.0) == pytest.approx(expected)


def test_a_busy_neighbour_is_seen():
    if not cores.STAT.exists():
        pytest.skip("the system does not tell")
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        try:
            assert cores.busy_elsewhere(0.5) > 0.25
        finally:
            neighbour.kill()


@pytest.mark.parametrize(
    ("busy", "words"),
    [(None, "not known here"), (0.1, "other work keeps 0.1 busy"), (1.2, "timings mean little now")],
)
def test_a_loaded_machine_is_named(busy, words):
    assert words in doctor.load_line(busy)
    assert ("mean little" in doctor.load_line(busy)) == (busy == 1.2)
