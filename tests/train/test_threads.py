"""A training leaves to other work the cores that it keeps busy, unless somebody says how many threads there are."""

import json

import pytest
import torch

from ejmp import cores
from ejmp.train.distributed import Ranks
from ejmp.train.threads import SAID_BY, fitting_threads


def ranks(world_size=1, device="cpu"):
    return Ranks(rank=0, world_size=world_size, local_rank=0, device=torch.device(device))


pytestmark = pytest.mark.usefixtures("machine")


@pytest.fixture
def machine(monkeypatch):
    """A machine of four cores, three of which are kept busy by others, and a process of four threads."""
    before = torch.get_num_threads()
    for name in SAID_BY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cores, "available", lambda: set(range(4)))
    monkeypatch.setattr(cores, "busy_elsewhere", lambda: 2.9)
    torch.set_num_threads(4)
    yield monkeypatch
    torch.set_num_threads(before)


def taken(folder, by=None, *, resume=False):
    with fitting_threads(by or ranks(), folder, resume=resume):
        return torch.get_num_threads()


def test_busy_cores_are_left_alone(tmp_path, capsys):
    assert taken(tmp_path) == 1
    assert torch.get_num_threads() == 4
    assert "other work keeps 2.9 of 4 cores busy: 1 of 4 threads are used" in capsys.readouterr().err


@pytest.mark.parametrize("busy", [0.0, 0.2, None])
def test_a_quiet_machine_is_used_whole(machine, tmp_path, capsys, busy):
    machine.setattr(cores, "busy_elsewhere", lambda: busy)
    assert taken(tmp_path) == 4
    assert not capsys.readouterr().err


def test_who_says_how_many_is_heard(machine, tmp_path):
    machine.setenv("OMP_NUM_THREADS", "4")
    assert taken(tmp_path) == 4


def test_ranks_are_not_taken_for_neighbours(tmp_path):
    assert taken(tmp_path, ranks(world_size=2)) == 4


@pytest.mark.parametrize(("text", "expected"), [('{"machine": {"threads": 3}}', 3), ("{", 1), ("{}", 1), ("[1]", 1)])
def test_a_run_goes_on_as_it_began(tmp_path, text, expected):
    (tmp_path / "run.json").write_text(text)
    assert taken(tmp_path, resume=True) == expected
    assert taken(tmp_path) == 1


def test_no_more_threads_than_there_are(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"machine": {"threads": 64}}))
    assert taken(tmp_path, resume=True) == 1


def test_free_cores():
    assert [cores.free(busy) for busy in (0.0, 0.3, 0.31, 1.2, 2.9, 9.0)] == [4, 4, 3, 3, 1, 1]
