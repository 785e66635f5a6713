"""Real workers on this checkout: every case is right, an older side lacks some, and a worker ends with its parent."""

import dataclasses
import shutil
import signal
import subprocess
import sys
import time

import pytest
from op_cases import CASES, ORDERS
from support.inputs import ROOT, environment, require_native
from support.track_cases import ready_side

from ejmp.track.pairs import Setting, Worker, WorkerError, pair
from ejmp.track.side import copy_checkout
from ejmp.track.worker import CALLS_TOGETHER, FEWER

SETTING = Setting(benchmarks=ROOT / "benchmarks")


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """This checkout, and one in which the sum over pairs is called something else."""
    require_native()
    folder = tmp_path_factory.mktemp("sides")
    for name in ("base", "head"):
        copy_checkout(ROOT, folder / name)
    for path in (folder / "base").rglob("*.py"):
        if path.is_relative_to(folder / "base" / "ejmp") or path.name == "pair.py":
            path.write_text(
                path.read_text().replace("def pair(", "def older(").replace("import pair\n", "import older\n")
            )
    return ready_side("older", folder / "base"), ready_side("this", folder / "head")


@pytest.fixture(scope="module")
def workers(sides):
    with pair(*sides, SETTING) as both:
        yield both


def test_every_case_is_right(workers):
    """Ops at every order they have, models of every number of blocks, graph building, the machine's product."""
    _, this = workers
    names = this.ask("names", only=["*"])
    assert not [why for why in names.values() if why is not None]
    assert {f"model/{n}-blocks" for n in (2, 3, 4, 5, 6)} <= set(names)
    assert {"pair/forward", "pair/second", "linear/backward", "graph/build", "machine/product"} <= set(names)
    for name in names:
        assert this.ask("error", case=name) <= 1e-3, name


def test_what_is_timed_together_exists_and_is_called_in_every_pass():
    assert set(CALLS_TOGETHER) <= set(CASES)
    assert set(FEWER) == set(ORDERS)
    assert all(times >= 2 * max(FEWER.values()) for times in CALLS_TOGETHER.values())


def test_what_an_older_side_lacks_is_not_an_error(workers):
    older, this = workers
    names = older.ask("names", only=["pair/*", "edge_to_edge/*"])
    assert names["edge_to_edge/forward"] is None
    assert "there is no ejmp_kernels.pair.pair" in names["pair/forward"]
    with pytest.raises(
        ValueError, match=r"older, pair/forward: NotImplementedError: there is no ejmp_kernels\.pair\.pair"
    ):
        older.ask("time", case="pair/forward", seconds=1e-3)
    assert this.ask("time", case="pair/forward", seconds=1e-3) > 0


def test_triton_as_on_a_gpu(sides):
    """With --device cuda --backend triton the same questions are asked; here Triton's interpreter answers them."""
    with pair(*sides, dataclasses.replace(SETTING, backend="triton")) as (_, this):
        assert this.ask("names", only=["atom_sum/forward"]) == {"atom_sum/forward": None}
        assert this.ask("error", case="atom_sum/forward") <= 1e-3
        assert this.ask("facts", case="atom_sum/forward")["dispatches"] > 0
        assert this.ask("time", case="atom_sum/forward", seconds=1e-3) > 0


def test_facts_are_exact(workers):
    """Parameters by hand for one layer more or less; the same question has the same answer."""
    _, this = workers
    facts = {n: this.ask("facts", case=f"model/{n}-blocks") for n in (2, 4, 6)}
    assert facts[4] == this.ask("facts", case="model/4-blocks")
    for what in ("parameters", "multiply_adds", "dispatches"):
        assert facts[6][what] - facts[4][what] == facts[4][what] - facts[2][what] > 0
    assert facts[4]["peak_bytes"] > 0
    product = this.ask("facts", case="machine/product")
    assert product == {"flops": 2 * 384**3}


def test_a_known_slowdown(sides):
    _, side = sides
    slow = {"machine/product": 2.0}
    setting = dataclasses.replace(SETTING, cores=(0,))  # processor time, to which other tests add nothing
    with (
        Worker(side, setting, {}, side.root.parent / "a.log") as plain,
        Worker(side, setting, slow, side.root.parent / "b.log") as waiting,
    ):
        ratios = [
            waiting.ask("time", case="machine/product", seconds=5e-3)
            / plain.ask("time", case="machine/product", seconds=5e-3)
            for _ in range(5)
        ]
    assert 2 < sorted(ratios)[2] < 4.5


def test_a_dead_worker_is_named(sides):
    _, side = sides
    with Worker(side, SETTING, {}, side.root.parent / "dead.log") as worker:
        worker.ask("about")
        worker.process.send_signal(signal.SIGKILL)
        with pytest.raises(WorkerError, match="this: the worker ended at time pair/forward"):
            worker.ask("time", case="pair/forward", seconds=1e-3)


def test_other_code_is_refused(sides, tmp_path):
    older, this = sides
    shutil.copytree(this.root / "benchmarks", tmp_path / "nothing" / "benchmarks")
    with pytest.raises(WorkerError, match="the worker imported"):  # noqa: SIM117
        with pair(older, _at(this, tmp_path / "nothing"), SETTING):
            pass


def _at(side, root):
    """A side that says it is elsewhere than the code it runs."""

    class Elsewhere(type(side)):
        def environment(self):
            return side.environment()

    return Elsewhere(**vars(side) | {"root": root})


ORPHAN = """
import json, os, sys
from pathlib import Path
from ejmp.track.pairs import Setting, Worker
from ejmp.track.side import Side
root = Path(sys.argv[1])
side = Side(name="x", root=root, commit="none", dirty=False, python=sys.executable, why_no_extension=None)
worker = Worker(side, Setting(benchmarks=Path(sys.argv[2])), {}, root.parent / "orphan.log")
worker.ask("about")
print(worker.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_worker_ends_with_its_parent(sides):
    _, side = sides
    command = [sys.executable, "-c", ORPHAN, side.root, ROOT / "benchmarks"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    number = int(done.stdout)
    for _ in range(100):
        if not _runs(number):
            return
        time.sleep(0.1)
    pytest.fail(f"worker {number} still runs")


def _runs(number):
    try:
        with open(f"/proc/{number}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
