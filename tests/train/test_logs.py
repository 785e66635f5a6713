"""What a run tells the outside: JSON lines, tensorboard's event files, and calls of wandb."""

import json
import sys
from types import SimpleNamespace

import pytest

from ejmp.train.logs import Log, Pace, duration

CONFIG = {"config": {"lr": 0.5, "ema": None}, "datasets": {"methanol": {"cutoff": 5.0, "tags": "none"}}}
EVENTS = [
    ("validation", 0, {"methanol": {"energy_meV": 3.5, "forces_meV_per_A": 40.0}, "score": None}),
    ("train", 1, {"loss": 2.0, "lr": 0.25, "grad_norm": None, "suspects": ["id"], "done": True}),
    ("validation", 2, {"methanol": {"energy_meV": 1.5, "forces_meV_per_A": 30.0}, "score": 30.0}),
]
EXPECTED = {
    "validation/methanol/energy_meV": {0: 3.5, 2: 1.5},
    "validation/methanol/forces_meV_per_A": {0: 40.0, 2: 30.0},
    "validation/score": {2: 30.0},
    "train/loss": {1: 2.0},
    "train/lr": {1: 0.25},
}
"""Every number of the events, by name and step."""


def write(folder, *trackers):
    folder.mkdir(exist_ok=True)
    with Log(folder / "log.jsonl", 2, trackers, CONFIG) as log:
        for event in EVENTS:
            log.write(*event)


def test_lines(tmp_path):
    write(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line.pop("event"), line.pop("step"), line.pop("time") and line) for line in lines] == EVENTS


def test_tensorboard(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, "tensorboard")
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}
    assert found == EXPECTED
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text.removeprefix("```json").removesuffix("```")) == CONFIG


class FakeRun:
    """A run of wandb that takes what wandb takes: numbers by text, at steps that never fall, until it is finished."""

    def __init__(self):
        self.numbers, self.step, self.exit_code = {}, 0, None

    def log(self, data, *, step):
        assert self.exit_code is None
        assert step >= self.step
        self.step = step
        for name, number in data.items():
            assert type(number) in (int, float)
            self.numbers.setdefault(name, {})[step] = number

    def finish(self, *, exit_code):
        assert self.exit_code is None
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for wandb; its list has each run with the arguments it was begun with."""
    runs = []

    def init(*, dir, name, config):  # noqa: A002 - as wandb calls it
        runs.append((FakeRun(), dir, name, config))
        return runs[-1][0]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return runs


def test_wandb(tmp_path, wandb):
    write(tmp_path / "run", "wandb")
    [(run, folder, name, config)] = wandb
    assert (folder, name, config) == (str(tmp_path / "run"), "run", CONFIG)
    assert run.numbers == EXPECTED
    assert run.exit_code == 0


def test_wandb_is_told_of_a_failure(tmp_path, wandb):
    with pytest.raises(RuntimeError), Log(tmp_path / "log.jsonl", 2, ("wandb",)):
        raise RuntimeError
    assert wandb[0][0].exit_code == 1


def test_other_ranks_tell_nothing(wandb):
    with Log(None, 2, ("wandb",)) as log:
        log.write(*EVENTS[0])
    assert not wandb


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"--track wandb: .*pip install ejmp\[track\]"):
        write(tmp_path, "wandb")


class Clock:
    """A clock that the test winds."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr("ejmp.train.logs.time.monotonic", lambda: self.now)


def test_time_left(monkeypatch, tmp_path, capsys):
    """A run of 100 steps of 2 s each and a validation of 30 s before, every 25 steps and at the end, line by line."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    clock, shown = Clock(monkeypatch), {}
    with Log(tmp_path / "log.jsonl", 100, validate_every=25) as log:
        clock.now += 30
        log.write("validation", 0, {})
        for step in range(1, 101):
            clock.now += 2
            if step % 10 == 0:
                log.show(step, "loss 1")
                printed = capsys.readouterr().err
                if printed:  # at 1050, 1210 and 1320 s: 1160 s is too early
                    shown[step] = printed
            if step % 25 == 0:
                clock.now += 30
                log.write("validation", step, {})
    expected = {10: 2 * 90 + 30 * 4, 60: 2 * 40 + 30 * 2, 100: 30}  # the last validation comes after the last step
    assert shown.keys() == expected.keys()  # at least two minutes between two lines, and the last step
    assert shown[10] == "step 10 of 100  loss 1  5 min 00 s left\n"
    for step, line in shown.items():
        assert line == f"step {step} of 100  loss 1  {duration(expected[step])} left\n"


def test_time_left_follows_recent_steps():
    pace = Pace(1000, None, 0.0)
    assert pace.left(0) is None
    now = 0.0
    for step in range(1, 201):
        now += 1.0 if step <= 100 else 3.0
        if step % 5 == 0:
            pace.stepped(step, now)
    assert pace.left(200) == pytest.approx(800 * 3.0)


def test_time_left_of_a_resumed_run():
    """It began elsewhere: the first validation that it sees is not taken for one that lasted since the beginning."""
    pace = Pace(100, 10, 0.0)
    for step, now in ((45, 9.0), (50, 14.0)):
        pace.stepped(step, now)
    assert pace.left(50) == pytest.approx(50.0)
    pace.validated(50, 21.0)
    assert pace.left(50) == pytest.approx(50 * 1.0 + 5 * 7.0)
    alone = Pace(100, 10, 0.0)
    alone.validated(50, 99.0)
    alone.stepped(55, 104.0)
    assert alone.left(55) == pytest.approx(45 * 1.0)


def test_ragged_end_is_validated():
    """The 25 steps end between two validations every 10, so after step 20 there is one more."""
    pace = Pace(25, 10, 0.0)
    pace.validated(0, 4.0)
    pace.stepped(20, 24.0)
    pace.validated(20, 28.0)
    assert pace.left(20) == pytest.approx(5 * 1.0 + 4.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_lines_on_a_terminal(monkeypatch, tmp_path, capsys):
    """Without rich there is a line every five seconds; with it one bar that says the same."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for rich in (None, sys.modules.get("rich") or pytest.importorskip("rich")):
        monkeypatch.setitem(sys.modules, "rich", rich)
        clock = Clock(monkeypatch)
        with Log(tmp_path / "log.jsonl", 20) as log:
            for step in range(1, 21):
                clock.now += 1
                log.show(step, "31 structures/s")
        printed = capsys.readouterr().err
        if rich is None:
            assert [int(line.split()[1]) for line in printed.splitlines()] == [1, 6, 11, 16, 20]
            assert "step 11 of 20  31 structures/s  9 s left" in printed
        else:
            assert "20/20" in printed
            assert "31 structures/s  0 s left" in printed
