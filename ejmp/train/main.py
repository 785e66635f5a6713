"""The commands of launch: pretrain, distill, finetune, evaluate. Flags need no torch; `commands` does the work."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from ejmp.train import config
from ejmp.train.flags import add_settings

Command = Literal["pretrain", "distill", "finetune", "evaluate"]
DEMO = "none given: the embedded demo mix"


def main(command: Command, arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands under any launcher (deepspeed, torchrun, mpirun, srun) or on its own.

    Returns:
        The exit status: 0 also when the run was told to stop (SIGTERM) and saved its state.
    """
    options = make_parser(command).parse_args(arguments)
    options.command = command
    return run(options)


def run(options: argparse.Namespace) -> int:
    """Do what parsed flags say; `options.command` is the command."""
    from ejmp.train import commands, faults  # noqa: PLC0415 - they need torch

    try:
        with faults.session(options.device) as ranks:
            text = getattr(commands, options.command)(options, ranks)
            if ranks.rank == 0:
                sys.stdout.write(text + "\n")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.stderr.write(f"{options.command}: {error}\n")
        return 2
    return 0


def make_parser(command: Command) -> argparse.ArgumentParser:
    """Return the parser of a command."""
    parser = argparse.ArgumentParser(prog=f"{command}.py", description=DESCRIPTIONS[command])
    add_options(command, parser)
    return parser


def add_options(command: Command, parser: argparse.ArgumentParser) -> None:
    """Add a command's flags to a parser."""
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    FLAGS[command](parser)
    if command != "evaluate":
        parser.add_argument("--run", type=Path, metavar="FOLDER", help=f"of the run; default: runs/{command}")
        parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of --run")
        parser.add_argument("--track", nargs="+", default=(), choices=("tensorboard", "wandb"))
        add_settings(parser, DEFAULTS[command](), config.demo(command))


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="NAME=FOLDER,...", help=f"record stores (ejmp data convert), a head each; {DEMO}"
    )


def _pretrain(parser: argparse.ArgumentParser) -> None:
    _data(parser)
    parser.add_argument("--model", choices=("demo", "jmp-s", "jmp-l"), default="demo", help="sizes")
    parser.add_argument("--blocks", type=int, help="default: all")


def _distill(parser: argparse.ArgumentParser) -> None:
    _data(parser)
    parser.add_argument("--teacher", metavar="PATH", help="jmp-l.pt or a saved model; none given: the demo teacher")
    parser.add_argument(
        "--teacher-precision",
        choices=("fp32", "tf32", "bf16", "fp16"),
        help="default: bf16 on CUDA (fp16 before compute capability 8.0), the run's on a CPU",
    )
    parser.add_argument("--blocks", type=int, help="of the student: the teacher's first ones")
    parser.add_argument("--keep", help="or exactly these blocks, like 0,1,2,5")
    parser.add_argument("--final-mlp", choices=("sliced", "random"), default="sliced")
    parser.add_argument("--student", metavar="PATH", help="or a saved model to go on with")
    parser.add_argument("--freeze-blocks", action="store_true", help="train the final MLP and the heads only")
    terms = f"ejmp.distill; default: {config.TERMS}; for the demo data {config.DEMO_TERMS}"
    parser.add_argument("--terms", metavar="NAME=WEIGHT,...", help=terms)


def _finetune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="NAME=FOLDER", help="a record store with splits train, val and test")
    parser.add_argument("--demo", default="rmd17", metavar="NAME", help="or a demo set: rmd17, qm9, spice, md22, qmof")
    parser.add_argument("--target", help='"energy" or a label of the data; default: the demo set\'s, or energy')
    parser.add_argument("--forces", choices=("gradient", "direct"), default="gradient")
    parser.add_argument("--start", metavar="PATH", help="saved model to start from; none given: the demo teacher")
    parser.add_argument("--scratch", action="store_true", help="start from random weights of the same sizes")
    parser.add_argument("--reduction", choices=("sum", "mean"), default="sum", help="of atoms, to a structure's value")


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="MODEL", help="saved models; none given: the demo teacher")
    _data(parser)
    parser.add_argument("--demo", metavar="NAME", help="or a demo set to fine-tune on")
    parser.add_argument("--split", choices=("train", "val", "test"), default="val")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, metavar="JSON")


DESCRIPTIONS = {
    "pretrain": "Pre-train a model on a mix of datasets (JMP, arXiv 2310.16802).",
    "distill": "Prune a teacher's last blocks and distil it into what is left (Ghunaim et al. 2025).",
    "finetune": "Fine-tune a model on one dataset: energies and forces, or another label.",
    "evaluate": "Mean absolute errors of models, in meV and meV/A on free atoms.",
}
FLAGS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "pretrain": _pretrain,
    "distill": _distill,
    "finetune": _finetune,
    "evaluate": _evaluate,
}
DEFAULTS = {"pretrain": config.pretrain, "distill": config.distill, "finetune": config.finetune}
