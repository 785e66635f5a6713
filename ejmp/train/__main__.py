"""Start a training command where there is no launch/ folder: deepspeed --module ejmp.train finetune --demo rmd17."""

import argparse
import sys

from ejmp.config_file import Parser
from ejmp.train.flags import COMMANDS
from ejmp.train.main import run


def main() -> int:
    """Run the command that is named first, under any launcher or (python -m ejmp.train) on its own."""
    parser = Parser(prog="python -m ejmp.train", description="Training commands of ejmp.")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed puts it first
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_flags(commands.add_parser(name, help=command.description, description=command.description))
    parser.take_config()
    options = parser.parse_args()
    return run(options.command, options)


if __name__ == "__main__":
    sys.exit(main())
