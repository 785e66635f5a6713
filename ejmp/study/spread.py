"""How a study is spread: which shard a process is, and several shards as processes of one machine; needs no torch."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

START = "import sys; from ejmp.cli import main; sys.exit(main(sys.argv[1:]))"
"""What a process of a shard runs, with the words of the command line."""
SLURM = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
"""Variables of a Slurm array: number of this job, and number of jobs."""


def which_shard(text: str) -> tuple[int, int, int]:
    """Return number of a shard, number of shards, and number of this process on its node.

    Args:
        text: the flag --shard: "0/4", "slurm" (a job of an array), or "mpi" (a rank of mpirun, srun or torchrun).

    Raises:
        ValueError: for text of another form, or without the launcher it names.
    """
    if text == "slurm":
        index, count = _slurm()
        return index, count, index
    if text == "mpi":
        return _rank()
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard: expected I/N with I from 0 to N - 1, slurm or mpi, got {text!r}")
    return int(index), int(count), int(index)


def _slurm() -> tuple[int, int]:
    missing = [name for name in SLURM if not os.environ.get(name, "").isdecimal()]
    if missing:
        raise ValueError(f"--shard slurm: expected a job of an array (sbatch --array=0-3), {missing[0]} is not set")
    first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
    step = max(1, int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1")))
    return (int(os.environ[SLURM[0]]) - first) // step, int(os.environ[SLURM[1]])


def _rank() -> tuple[int, int, int]:
    from ejmp.train.distributed import LAUNCHERS  # noqa: PLC0415 - needs torch

    for rank, size, local in LAUNCHERS:
        if rank in os.environ and size in os.environ:
            here = next((os.environ[name] for name in local if name in os.environ), os.environ[rank])
            return int(os.environ[rank]), int(os.environ[size]), int(here)
    raise ValueError("--shard mpi: expected to be started by mpirun, srun or torchrun, got no rank")


def stand_alone(local_rank: int) -> None:
    """Make this process one of its own, whatever has launched it, on the GPU of its number on the node.

    Args:
        local_rank: number of this process among those of the node.
    """
    import torch  # noqa: PLC0415

    from ejmp.train.distributed import LAUNCHERS  # noqa: PLC0415 - needs torch

    for rank, size, local in LAUNCHERS:
        for name in (rank, size, *local):
            os.environ.pop(name, None)
    count = torch.cuda.device_count()  # leaves CUDA uninitialised
    if count > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local_rank % count]


def start_processes(words: Sequence[str], count: int, folder: Path) -> bool:
    """Run a command as shards in several processes of this machine, which share its threads, and wait for them.

    Their training logs go to files in the folder; what they print goes to this process' standard output. SIGTERM and
    an interrupt are passed on to them.

    Args:
        words: command line after `ejmp`, without --shard.
        count: number of processes.
        folder: folder of the study.

    Returns:
        Whether they were told to stop.

    Raises:
        RuntimeError: if one of them fails, with the end of what it wrote.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    told: list[int] = []
    logs = [folder / f"shard{i}.log" for i in range(count)]
    processes: list[subprocess.Popen[bytes]] = []

    def stop(number: int, _: object) -> None:
        told.append(number)
        for process in processes:
            process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for i, log in enumerate(logs):
            command = [sys.executable, "-c", START, *words, "--shard", f"{i}/{count}"]
            with log.open("wb") as errors:
                environment = os.environ | {"OMP_NUM_THREADS": str(max(1, threads // count))}
                processes.append(
                    subprocess.Popen(command, stderr=errors, env=environment, start_new_session=True)  # noqa: S603
                )
        codes = [process.wait() for process in processes]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for log, code in zip(logs, codes, strict=True):
        if code and not told:
            end = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            raise RuntimeError(f"a process of the study failed ({log}):\n{end}")
    return bool(told)
