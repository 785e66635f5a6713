"""The `ejmp` command."""

import argparse
import functools
import os
import sys
from collections.abc import Sequence

from ejmp import __version__
from ejmp.config_file import Parser
from ejmp.data import cli as data
from ejmp.export.cli import add_export
from ejmp.measure import cli as measure
from ejmp.predict import cli as predict
from ejmp.study import cli as study
from ejmp.track import cli as track
from ejmp.train import main as training_main
from ejmp.train.cli import add_prune, add_quantize, add_search
from ejmp.train.flags import COMMANDS
from ejmp_kernels.allocator import keep_freed_memory

_EXTRAS = {"ase": "ase", "mpi4py": "mpi", "tblite": "demo"}
"""The extra to install for a module that the command's own extra does not bring."""
_ENOUGH = 141
"""Exit status of a program whose output nobody reads any more, as the shell has it for SIGPIPE."""


def make_parser() -> Parser:
    """Return the parser of the command line, whose result has the function to call as `run`."""
    parser = Parser(prog="ejmp", description="JMP molecular foundation models: measure, prune, run.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("bench", help="throughput, FLOPs and memory by number of blocks; compare commits")
    measure.add_bench(bench)
    track.add_verbs(bench)
    measure.add_profile(commands.add_parser("profile", help="FLOPs and time by module and op, and utilisation"))
    measure.add_doctor(
        commands.add_parser("doctor", help="which implementation serves which op, device and type, and why")
    )
    data.add_commands(commands.add_parser("data", help="convert, check and describe datasets"))
    add_search(commands.add_parser("search", help="which interaction blocks of a model to keep: errors of all subsets"))
    add_quantize(commands.add_parser("quantize", help="store a model's weights in 8 bits, and say what it costs"))
    add_prune(commands.add_parser("prune", help="keep some interaction blocks of a model"))
    pareto = commands.add_parser(
        "pareto", help="error against speed of smaller models: the front, and the fastest within a limit"
    )
    study.add_pareto(pareto)
    add_export(commands.add_parser("export", help="write a model as safetensors or as a package for torch alone"))
    measure.add_relevance(commands.add_parser("relevance", help="how much each block's output matters, by dataset"))
    for name, command in COMMANDS.items():
        training = commands.add_parser(name, help=command.description, description=command.description)
        command.add_flags(training)
        training.set_defaults(run=functools.partial(training_main.run, name))
    predict.add_relax(commands.add_parser("relax", help="relax a structure"))
    predict.add_md(commands.add_parser("md", help="molecular dynamics of a structure"))
    predict.add_predict(commands.add_parser("predict", help="energies, forces and stress of the structures of files"))
    predict.add_compare(commands.add_parser("compare", help="two models on the same structures, and on their labels"))
    measure.add_report(commands.add_parser("report", help="show a saved result again: of bench, profile or relevance"))
    study.add_reproduce(commands.add_parser("reproduce", help="the paper's tables and figures: many runs, one command"))
    parser.take_config()
    config = commands.add_parser("config", help="print what flags and a --config file come to")
    show = config.add_subparsers(dest="config_command", required=True).add_parser("show", help="as TOML for --config")
    show.add_argument("words", nargs=argparse.REMAINDER, metavar="VERB [FLAG ...]", help="as you would start the verb")
    show.set_defaults(run=_show)
    return parser


def _show(options: argparse.Namespace) -> int:
    print(make_parser().show(options.words), end="")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 for bad input."""
    options = make_parser().parse_args(arguments)
    keep_freed_memory()
    status = 2
    try:
        status = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # as after `| head`: what reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain when it ends
        status = _ENOUGH
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "", "data" if options.command == "data" else "bench")
        advice = "" if "pip install" in str(error) else f"; pip install ejmp[{extra}] brings it"
        print(f"ejmp {options.command}: {error}{advice}", file=sys.stderr)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"ejmp {options.command}: {error}", file=sys.stderr)
    return status
