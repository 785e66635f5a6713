"""The `ejmp` command."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ejmp import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="ejmp", description="JMP molecular foundation models: measure, prune, run.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_bench(commands.add_parser("bench", help="throughput, FLOPs and memory for 6..2 blocks"))
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"ejmp {options.command}: {error}", file=sys.stderr)
        return 2


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_bench)
    built_in = ("framework", "molecules", "slab")
    parser.add_argument("--workload", choices=built_in, default="framework", help="a built-in workload")
    parser.add_argument("--structures", type=Path, metavar="PATH", help="a file ase.io reads, a zip or a folder")
    parser.add_argument("--select", default="*", metavar="GLOB", help="files of the zip or folder to take")
    parser.add_argument("--batch", type=int, default=1, help="structures of PATH in the batch")
    parser.add_argument("--cutoff", type=float, help="A; default: that of the dataset the structures are like")
    parser.add_argument("--blocks", type=int, nargs="+", default=[6, 5, 4, 3, 2])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "tf32", "bf16", "fp16"), default=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=100, help="go on measuring this long (at least two rounds)")
    parser.add_argument("--small", action="store_true", help="JMP-S instead of JMP-L")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the results, and a picture beside them")


def _bench(options: argparse.Namespace) -> int:
    from ejmp import bench, report, workloads  # noqa: PLC0415

    if options.structures is None:
        workload = workloads.BUILT_IN[options.workload]()
    else:
        workload = workloads.from_files(
            options.structures, select=options.select, most=options.batch, cutoff=options.cutoff
        )
    plan = bench.Plan(
        workload=workload,
        blocks=tuple(options.blocks),
        precisions=tuple(options.precision),
        device=options.device,
        seconds=options.seconds,
        small=options.small,
    )
    result = bench.run(plan, report=lambda line: print(line, file=sys.stderr, flush=True))
    print(report.summary(result), report.table(result), sep="\n\n")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        picture = options.output.with_suffix(".png")
        report.picture(result, picture)
        print(f"\n{options.output} {picture}")
    return 0
