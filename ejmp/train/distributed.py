"""The processes of a run: how they find each other under every launcher, and what they decide together."""

import os
import re
import signal
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch import distributed as dist

TIMEOUT = timedelta(minutes=10)
"""Time after which a collective gives up waiting for the other ranks."""
# Names of rank, number of ranks and rank within the node (the first that is set), by launcher: deepspeed and torchrun,
# Open MPI, other MPIs, Slurm's srun. MPIs may start their daemons with srun, and so come before it.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", ("LOCAL_RANK",)),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_RANK",)),
    ("PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "SLURM_LOCALID")),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",)),
)
# Names of the number of ranks on this node, by launcher.
LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PALS_LOCAL_SIZE")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The place of this process among all processes of a run."""

    rank: int
    """Number of this process, from 0."""
    world_size: int
    """Number of processes of the run."""
    local_rank: int
    """Number of this process among those of the same node, from 0."""
    device: torch.device
    """Device this process computes on."""


def start(device: Literal["auto", "cpu", "cuda"] = "auto") -> Ranks:
    """Join the process group that the deepspeed launcher, torchrun, mpirun or srun made, or make one of this process.

    Args:
        device: device to compute on; "auto" takes CUDA if there is one and DS_ACCELERATOR is not cpu.

    Raises:
        ValueError: for a device that is not there, or if ranks are on several nodes and nothing says where rank 0 is.
    """
    rank, world_size, local_rank = _place()
    target = _device(device, local_rank)
    if target.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        torch.cuda.set_device(target)
    backend = "gloo" if target.type == "cpu" else "cpu:gloo,cuda:nccl"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    if world_size == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
    else:
        address, port = _meeting_point(world_size)
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=TIMEOUT)
    return Ranks(rank=rank, world_size=world_size, local_rank=local_rank, device=target)


def _place() -> tuple[int, int, int]:
    """Return rank, number of ranks and rank within the node, read from the launcher's variables."""
    for rank, size, local_names in LAUNCHERS:
        if rank in os.environ and size in os.environ:
            local = next((os.environ[name] for name in local_names if name in os.environ), "0")
            return int(os.environ[rank]), int(os.environ[size]), int(local)
    return 0, 1, 0


def _device(device: str, local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {device!r}")
    has_cuda = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if has_cuda and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if not has_cuda or local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected a CUDA device for local rank {local_rank}, there are {torch.cuda.device_count()}"
        )
    return torch.device("cuda", local_rank)


def _meeting_point(world_size: int) -> tuple[str, int]:
    """Return host and port at which rank 0 listens. All ranks must come to the same answer, each on its own."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    local_sizes = {os.environ[name] for name in LOCAL_SIZES if name in os.environ}
    if address is None and str(world_size) in local_sizes:
        address = "127.0.0.1"
    elif address is None and nodes is not None:
        address = first_node(nodes)
    elif address is None:
        raise ValueError("MASTER_ADDR: expected the host of rank 0 (mpirun -x MASTER_ADDR=HOST ...), got nothing")
    # Two runs on one node need different ports: ranks of one mpirun have the same parent, those of one srun the same
    # job.
    run = f"{os.environ['SLURM_JOB_ID']}{os.environ.get('SLURM_STEP_ID', '')}" if nodes else str(os.getppid())
    several_nodes_by_mpi = str(world_size) not in local_sizes and not nodes
    default = 29500 if several_nodes_by_mpi else 20000 + int(run) % 12000
    return address, default if port is None else int(port)


def first_node(nodes: str) -> str:
    """Return the first host of a Slurm node list, such as gpu[007-012,020],login1."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST: expected a list of hosts, got {nodes!r}")
    return "".join(part or "" for part in match.groups())


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, on every rank."""
    total = values.clone()
    dist.all_reduce(total)
    return total


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank, on every rank."""
    return bool(sum_over_ranks(torch.tensor(int(flag))))


def broadcast(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def host() -> str:
    """Return the host of rank 0 by the name at which the other ranks reach it."""
    return os.environ.get("MASTER_ADDR", socket.gethostname())


class Preemption:
    """A context that notices SIGTERM and SIGUSR1, which Slurm sends some time before it takes the nodes away.

    The signal may reach a single rank: all must ask `requested` at the same step. Only the main thread can enter it.
    """

    def __init__(self) -> None:
        self._noticed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, *_: object) -> None:
        self._noticed = True

    def requested(self) -> bool:
        """Return whether any rank has been told to stop, on every rank."""
        return any_rank(self._noticed)
