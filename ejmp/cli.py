"""The `ejmp` command."""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ejmp import __version__
from ejmp.compress import cli as compress
from ejmp.data import cli as data
from ejmp.measure import cli as measure
from ejmp.train import main as training_main
from ejmp.train.flags import COMMANDS

if TYPE_CHECKING:
    from ejmp.measure.workloads import Workload

_EXTRAS = {"mpi4py": "mpi", "tblite": "demo"}
"""The extra to install for a module that the command's own extra does not bring."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, whose result has the function to call as `run`."""
    parser = argparse.ArgumentParser(prog="ejmp", description="JMP molecular foundation models: measure, prune, run.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_bench(commands.add_parser("bench", help="throughput, FLOPs and memory by number of blocks"))
    _add_profile(commands.add_parser("profile", help="FLOPs and time by module and op, and utilisation"))
    doctor = commands.add_parser("doctor", help="which implementation serves which op, device and type, and why")
    doctor.set_defaults(run=_doctor)
    data.add_commands(commands.add_parser("data", help="convert, check and describe datasets"))
    compress.add_prune(commands.add_parser("prune", help="keep some interaction blocks of a model"))
    measure.add_relevance(commands.add_parser("relevance", help="how much each block's output matters, by dataset"))
    for name, command in COMMANDS.items():
        training = commands.add_parser(name, help=command.description, description=command.description)
        command.add_flags(training)
        training.set_defaults(run=functools.partial(training_main.run, name))
    measure.add_report(commands.add_parser("report", help="show a saved result again: of bench, profile or relevance"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 for bad input."""
    options = make_parser().parse_args(arguments)
    try:
        return options.run(options)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "", "data" if options.command == "data" else "bench")
        print(f"ejmp {options.command}: {error}; pip install ejmp[{extra}] brings it", file=sys.stderr)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"ejmp {options.command}: {error}", file=sys.stderr)
    return 2


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_bench)
    _add_workload(parser)
    parser.add_argument("--blocks", type=int, nargs="+", help="default: 6 5 4 3 2, for JMP-S 4 3 2")
    parser.add_argument(
        "--precision", nargs="+", choices=("fp32", "tf32", "bf16", "fp16"), help="default: all there are"
    )
    parser.add_argument("--device", help="default: cuda if there is one, or else cpu")
    parser.add_argument("--seconds", type=float, default=100, help="go on measuring this long (at least two rounds)")
    parser.add_argument("--small", action="store_true", help="JMP-S instead of JMP-L")
    parser.add_argument("--backend", default="auto", choices=("auto", "reference", "native", "triton"))
    parser.add_argument("--compare", action="store_true", help="also time the reference backend, in the same rounds")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the results, and a picture beside them")


def _add_workload(parser: argparse.ArgumentParser) -> None:
    built_in = ("framework", "molecules", "slab", "rocksalt")
    parser.add_argument("--workload", choices=built_in, help="a built-in workload (default: framework)")
    parser.add_argument("--structures", type=Path, metavar="PATH", help="a file ase.io reads, a zip or a folder")
    parser.add_argument("--select", default="*", metavar="GLOB", help="files of the zip or folder to take")
    parser.add_argument("--batch", type=int, default=1, help="structures of PATH in the batch (default: 1)")
    parser.add_argument("--cutoff", type=float, help="A; default: that of the dataset the structures are like")


def _bench(options: argparse.Namespace) -> int:
    import torch  # noqa: PLC0415

    from ejmp.measure import bench, report  # noqa: PLC0415
    from ejmp.measure.rates import precisions_of  # noqa: PLC0415

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    request = bench.BenchRequest(
        workload=_workload(options),
        blocks=tuple(options.blocks or ((4, 3, 2) if options.small else (6, 5, 4, 3, 2))),
        precisions=tuple(options.precision or precisions_of(device)),
        device=str(device),
        rounds=dataclasses.replace(bench.ROUNDS, seconds=options.seconds),
        small=options.small,
        backend=options.backend,
        compare=options.compare,
    )
    if options.output is not None:
        report.need_matplotlib()
        options.output.parent.mkdir(parents=True, exist_ok=True)
    result = bench.run(request, report=lambda line: print(line, file=sys.stderr, flush=True))
    print(report.summary(result), report.table(result), sep="\n\n")
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        picture = options.output.with_suffix(".png")
        report.picture(result, picture)
        print(f"\n{options.output} {picture}")
    return 0


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_profile)
    _add_workload(parser)
    parser.add_argument("--blocks", type=int, default=4, help="default: 4")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "tf32", "bf16", "fp16"), help="default: fp32")
    parser.add_argument("--device", help="default: cuda if there is one, or else cpu")
    parser.add_argument("--small", action="store_true", help="JMP-S instead of JMP-L")
    parser.add_argument("--backend", default="auto", choices=("auto", "reference", "native", "triton"))
    parser.add_argument("--rounds", type=int, default=3, help="passes whose median counts (default: 3)")
    parser.add_argument("--no-fvcore", action="store_true", help="leave fvcore's table out")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the results")


def _profile(options: argparse.Namespace) -> int:
    import torch  # noqa: PLC0415

    from ejmp.measure import profile, profile_report  # noqa: PLC0415

    request = profile.ProfileRequest(
        workload=_workload(options),
        blocks=options.blocks,
        precision=options.precision,
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        backend=options.backend,
        small=options.small,
        rounds=options.rounds,
        fvcore=not options.no_fvcore,
    )
    result = profile.run(request)
    print(profile_report.text(result))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _doctor(_options: argparse.Namespace) -> int:
    from ejmp.measure import doctor  # noqa: PLC0415

    print(doctor.examine())
    return 0


def _workload(options: argparse.Namespace) -> "Workload":
    from ejmp.measure import workloads  # noqa: PLC0415

    if options.structures is not None:
        if options.workload is not None:
            raise ValueError("--workload and --structures exclude each other")
        if options.batch < 1:
            raise ValueError(f"--batch: expected 1 or more, got {options.batch}")
        return workloads.from_files(
            options.structures, select=options.select, most=options.batch, cutoff=options.cutoff
        )
    if options.select != "*" or options.batch != 1 or options.cutoff is not None:
        raise ValueError("--select, --batch and --cutoff need --structures")
    return workloads.BUILT_IN[options.workload or "framework"]()
