"""Run `train_script` in one process or several."""

import json
import socket
import subprocess
import sys
from pathlib import Path

from support import inputs

SCRIPT = Path(__file__).with_name("train_script.py")


def environment(**more):
    """Return the variables of a training process on the CPU."""
    return inputs.environment(DS_ACCELERATOR="cpu", **more)


def free_port():
    """Return a port of this machine on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def launch(world_size, *arguments, script=SCRIPT, **more):
    """Run the script in some processes; torchrun's own noise goes with what it prints."""
    start = [sys.executable]
    if world_size > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    command = [*start, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(**more), check=False)


def results(run, out, world_size):
    """Return what each rank wrote."""
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(world_size)]
