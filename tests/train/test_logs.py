"""What a run tells the outside: JSON lines, tensorboard's event files, and calls of wandb."""

import json
import sys
from types import SimpleNamespace

import pytest

from ejmp.train.logs import Log

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
