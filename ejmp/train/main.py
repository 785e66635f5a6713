"""The training commands as programs: pretrain, distill, finetune, evaluate. Flags need no torch; the work does."""

import argparse
import sys
from collections.abc import Sequence

from ejmp.config_file import Parser
from ejmp.train.flags import COMMANDS, CommandName
from ejmp_kernels.allocator import TRAINING_BYTES, keep_freed_memory


def main(name: CommandName, arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands under any launcher (deepspeed, torchrun, mpirun, srun) or on its own.

    Returns:
        The exit status: 0 also when the run was told to stop (SIGTERM) and saved its state, 2 for bad input.
    """
    parser = Parser(prog=f"{name}.py", description=COMMANDS[name].description)
    COMMANDS[name].add_flags(parser)
    parser.take_config()
    options = parser.parse_args(arguments)
    return run(name, options)


def run(name: CommandName, options: argparse.Namespace) -> int:
    """Carry out a command with parsed flags, print its result on rank 0, and return the exit status."""
    keep_freed_memory(TRAINING_BYTES)
    try:
        request = COMMANDS[name].request(options)
        from ejmp.train import commands, faults  # noqa: PLC0415 - they need torch
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.stderr.write(f"{name}: {error}\n")
        return 2
    try:
        with faults.session(request.device) as ranks:
            text = commands.carry_out(request, ranks)
            if ranks.rank == 0:
                sys.stdout.write(text + "\n")
                sys.stdout.flush()
    except BrokenPipeError:
        raise
    except Exception as error:
        problem = faults.in_words(error)
        if problem is None:
            raise
        sys.stderr.write(f"{name}: {problem}\n")
        return 2
    return 0
