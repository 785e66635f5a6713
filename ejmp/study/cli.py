"""`ejmp reproduce`: the tables and figures of the paper. Flags need no torch; the work does."""

import argparse
import shlex
import sys
from pathlib import Path

from ejmp.study.budget import DEMO, FINETUNE_SEEDS, FULL, SEEDS
from ejmp.study.gather import gather, is_ready
from ejmp.study.plan import plan
from ejmp.study.record import is_finished
from ejmp.study.settings import PARTS, Part, StudySettings, check_parts, claim, make_settings
from ejmp.study.spread import stand_alone, start_processes, which_shard

TFLOPS = 30.0
"""Rate that times are estimated with, 10^12 operations per second: an assumption for one GPU of a data centre."""
LENGTHS = {
    "distill_steps": (int, "steps of each distillation"),
    "finetune_steps": (int, "steps of each fine-tuning run"),
    "finetune_seconds": (float, "most training time of a fine-tuning run, twice that on QM9, s"),
    "val_structures": (int, "most validation structures of each pre-training dataset"),
    "relevance_structures": (int, "most structures of each dataset for Figure 2"),
    "inference_batch": (int, "structures in the batch of Table 2"),
    "inference_seconds": (float, "time for Table 2, s"),
}
"""Fields of `Budget` that have a flag: their type and what they are."""


NOT_GIVEN = {
    "distill_steps": "those of 1.8 million structures",
    "finetune_steps": "those of JMP's recipe",
    "finetune_seconds": "no limit",
    "val_structures": "all",
}
"""What no number means."""


def add_reproduce(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ejmp reproduce` to its parser."""
    parser.set_defaults(run=_reproduce)
    parser.add_argument("what", choices=(*PARTS, "all"), help="table or figure of the paper, or all of them")
    parser.add_argument(
        "--run",
        dest="directory",
        type=Path,
        default=Path("runs/study"),
        metavar="FOLDER",
        help="folder of the study; what is finished there is not done again (default: runs/study)",
    )
    parser.add_argument("--teacher", type=Path, metavar="PATH", help="jmp-l.pt or a saved model; else the demo teacher")
    text = "record stores by the names of the paper's nine datasets (ejmp data convert); none given: the demo data"
    parser.add_argument("--data", metavar="NAME=FOLDER,...", help=text)
    parser.add_argument("--seeds", type=int, help=f"seeds of each distillation (default: {SEEDS})")
    parser.add_argument("--finetune-seeds", type=int, help=f"of each fine-tuning run (default: {FINETUNE_SEEDS})")
    for name, (kind, what) in LENGTHS.items():
        usual, small = (getattr(budget, name) for budget in (FULL, DEMO))
        usual, small = (NOT_GIVEN[name] if value is None else value for value in (usual, small))
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, help=f"{what} (default: {usual}; on the demo data {small})"
        )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes on this machine (default: 1)")
    text = "one of N processes that share the runs, also on other machines: I/N, slurm (an array) or mpi (a rank)"
    parser.add_argument("--shard", metavar="I/N", help=text)
    parser.add_argument(
        "--dry-run", action="store_true", help="check teacher and data and print the plan with its time; write nothing"
    )
    text = f"10^12 operations per second of your GPU in training, for --dry-run (default: {TFLOPS:g})"
    parser.add_argument("--tflops", type=float, default=TFLOPS, help=text)
    parser.add_argument("--gather", action="store_true", help="only write the tables of what is finished")


def _reproduce(options: argparse.Namespace) -> int:
    settings = make_settings(
        teacher=options.teacher,
        data=options.data,
        seeds=options.seeds,
        finetune_seeds=options.finetune_seeds,
        changes={name: getattr(options, name) for name in LENGTHS},
    )
    parts: tuple[Part, ...] = PARTS if options.what == "all" else (options.what,)
    folder, words = options.directory, _words(options)
    command = shlex.join(["ejmp", *words])
    if options.processes < 1 or (options.processes > 1 and options.shard):
        raise ValueError(f"--processes: expected 1 or more, and 1 with --shard, got {options.processes}")
    check_parts(parts, settings)
    if options.dry_run:
        return _dry_run(folder, parts, settings, options.tflops)
    claim(folder, settings)
    if not options.gather and not _done(folder, parts, settings, options, words, command):
        return 0
    if options.gather:
        parts = tuple(part for part in parts if is_ready(folder, part, settings)) or parts
    text = gather(folder, parts, settings, command)
    if not options.shard:  # of several processes, each may be the one that finds all finished
        print(f"{text}\n\n{folder / 'study.json'} {folder / 'study.csv'}")
    return 0


def _dry_run(folder: Path, parts: tuple[Part, ...], settings: StudySettings, tflops: float) -> int:
    if not tflops > 0:
        raise ValueError(f"--tflops: expected a positive number, got {tflops}")
    from ejmp.study.dryrun import dry_run  # noqa: PLC0415 - needs torch

    text, problems = dry_run(folder, parts, settings, tflops)
    for problem in problems:
        print(f"ejmp reproduce: {problem}", file=sys.stderr)
    if not problems:
        print(text)
    return 2 if problems else 0


def _done(
    folder: Path,
    parts: tuple[Part, ...],
    settings: StudySettings,
    options: argparse.Namespace,
    words: list[str],
    command: str,
) -> bool:
    """Work on the runs that are left; return whether all are finished."""
    runs = plan(parts, settings)
    if all(is_finished(folder, spec.name) for spec in runs):
        return True
    if options.processes > 1:
        start_processes(words, options.processes, folder)
    else:
        _, count, local_rank = which_shard(options.shard or "0/1")
        stand_alone(local_rank)
        from ejmp.study.shards import Shard, work  # noqa: PLC0415 - needs torch

        work(folder, runs, settings, Shard(count=count, command=command))
    left = [spec.name for spec in runs if not is_finished(folder, spec.name)]
    if left:
        print(f"{folder}: {len(left)} of {len(runs)} runs are left, to other processes or to the same command again")
    return not left


def add_pareto(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ejmp pareto` to its parser."""
    parser.set_defaults(run=_pareto)
    parser.add_argument("model", nargs="?", type=Path, help="what ejmp.load reads; none given: the demo teacher")
    text = "record stores, named as the model's tasks; default: the embedded demo mix"
    parser.add_argument("--data", metavar="NAME=FOLDER,...", help=text)
    text = "folder for the models; what is there is not made again (default: runs/pareto)"
    parser.add_argument("--run", dest="directory", type=Path, default=Path("runs/pareto"), metavar="FOLDER", help=text)
    parser.add_argument("--blocks", metavar="6,5,...", help="numbers of blocks (default: all down to 2)")
    text = "channels of edges (default: all, 7/8 and 3/4 of them)"
    parser.add_argument("--channels", metavar="1024,896,...", help=text)
    text = f"steps of distillation (default: 0,{DEMO.distill_steps} on the demo mix, and 0, which is none, on yours)"
    parser.add_argument("--steps", metavar="0,400,...", help=text)
    parser.add_argument("--precisions", default="fp32", metavar="fp32,bf16", help="default: fp32")
    parser.add_argument("--terms", metavar="NAME=WEIGHT,...", help="of the distillation; see ejmp distill")
    text = "most validation structures of each dataset (default: 1000)"
    parser.add_argument("--structures", type=int, metavar="N", default=1000, help=text)
    parser.add_argument("--seconds", type=float, default=60.0, help="time for timing all models by turns (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the distillation and of the choice of structures")
    text = "name the fastest model with at most so many percent more error"
    parser.add_argument("--within", type=float, metavar="PERCENT", help=text)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw error against speed, .png or .svg")


def _pareto(options: argparse.Namespace) -> int:
    from ejmp.compress.config import parse_terms  # noqa: PLC0415 - these need torch
    from ejmp.measure.report import need_matplotlib  # noqa: PLC0415
    from ejmp.model.checkpoint import load  # noqa: PLC0415
    from ejmp.study import front  # noqa: PLC0415
    from ejmp.train import presets  # noqa: PLC0415
    from ejmp.train.demo import demo_teacher  # noqa: PLC0415
    from ejmp.train.faults import session  # noqa: PLC0415
    from ejmp.train.sources import mix_of, with_tasks_of  # noqa: PLC0415

    if options.picture is not None:
        need_matplotlib()
    path = options.model or demo_teacher()
    model = load(path)
    have, demo = model.config.emb_size_edge, options.data is None
    settings = front.FrontSettings(
        model=str(path),
        data=options.data,
        blocks=_numbers("--blocks", options.blocks) or tuple(range(model.config.blocks, 1, -1)) or (1,),
        channels=_numbers("--channels", options.channels) or (have, have * 7 // 8, have * 3 // 4),
        steps=_numbers("--steps", options.steps) or ((0, DEMO.distill_steps or 0) if demo else (0,)),
        precisions=tuple(options.precisions.split(",")),
        terms=parse_terms(options.terms or (presets.DEMO_TERMS if demo else presets.TERMS)),
        structures=options.structures,
        seconds=options.seconds,
        seed=options.seed,
    )
    claim(options.directory, settings)
    sources = with_tasks_of(path, mix_of(options.data), model)
    with session("auto") as ranks:
        result = front.measure(options.directory, settings, sources, ranks, report=_to_stderr)
    print(f"{front.table(result)}\n\n{options.directory / front.FRONT}")
    if options.picture is not None:
        front.picture(result, options.picture)
    if options.within is not None:
        row = front.fastest(result, options.within)
        told = f"{row['speed']:.2f} times the speed, {100 * (row['error'] - 1):.1f}% more error"
        print(f"the fastest within {options.within:g}%: {front.folder_of(row, options.directory, settings)}, {told}")
    return 0


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _numbers(flag: str, text: str | None) -> tuple[int, ...]:
    """Return the numbers of a flag; none if it was not given."""
    try:
        return tuple(int(number) for number in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"{flag}: expected numbers with commas, got {text!r}") from None


def _words(options: argparse.Namespace) -> list[str]:
    """Return the command line of the study after `ejmp`, without how it is spread."""
    words = ["reproduce", options.what, "--run", str(options.directory)]
    for name in ("teacher", "data", "seeds", "finetune_seeds", *LENGTHS):
        value = getattr(options, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words
