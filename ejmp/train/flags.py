"""Flags of the training commands, and the requests they make; needs no torch, so that --help is quick."""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ejmp.catalog import CATALOG, FINETUNING
from ejmp.compress.config import FINAL_MLPS, parse_blocks, parse_terms
from ejmp.data.readers.options import ReadOptions
from ejmp.data.source_flags import SourceRequest, add_source_flags
from ejmp.train import presets
from ejmp.train.config import TrainConfig
from ejmp.train.requests import (
    DistillRequest,
    EvaluateRequest,
    FinetuneRequest,
    PretrainRequest,
    Request,
    RunRequest,
)
from ejmp.train.settings import add_settings, read_settings

CommandName = Literal["pretrain", "distill", "finetune", "evaluate"]
TrainingName = Literal["pretrain", "distill", "finetune"]
PRESETS: dict[TrainingName, Callable[[], TrainConfig]] = {
    "pretrain": presets.pretrain,
    "distill": presets.distill,
    "finetune": presets.finetune,
}
NOTHING_TOLD = SourceRequest(options=ReadOptions(), allow_close=False, occupancy="refuse")
"""What the flags on a source come to if none is given."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A training command: its flags, and the request they make."""

    description: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    """Adds the command's flags to a parser."""
    request: Callable[[argparse.Namespace], Request]
    """Makes a request of parsed flags; raises ValueError for a value out of range."""


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _add_data(parser: argparse.ArgumentParser) -> None:
    text = "record stores (ejmp data convert), a head each; none given: the embedded demo mix"
    parser.add_argument("--data", metavar="NAME=FOLDER,...", help=text)


def _add_graph(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--cutoff", type=float, metavar="A", help=f"longest edge of graphs; default: {default}")
    parser.add_argument("--max-neighbors", type=int, metavar="K", help=f"main edges into an atom; default: {default}")


def _add_run(parser: argparse.ArgumentParser, name: TrainingName) -> None:
    # The attribute is not called "run": in the parser of `ejmp` that one is the function to call.
    parser.add_argument(
        "--run",
        dest="directory",
        type=Path,
        default=Path("runs", name),
        metavar="FOLDER",
        help=f"folder of the run; default: runs/{name}",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of --run")
    text = "go on although settings, data or code are not those that the run was begun with"
    parser.add_argument("--force", action="store_true", help=text)
    parser.add_argument("--track", nargs="+", default=(), choices=("tensorboard", "wandb"))
    add_settings(parser, PRESETS[name](), presets.demo(name))


def _add_any_depth(parser: argparse.ArgumentParser) -> None:
    text = "train this many first blocks (default: 2), and all more, to do alone: ejmp prune then needs no training"
    parser.add_argument("--any-depth", nargs="?", type=int, const=2, metavar="LEAST", help=text)


def _run_request(options: argparse.Namespace, defaults: TrainConfig) -> RunRequest:
    return RunRequest(
        directory=options.directory,
        resume=options.resume,
        force=options.force,
        trackers=tuple(options.track),
        config=read_settings(options, defaults),
    )


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    _add_device(parser)
    _add_data(parser)
    parser.add_argument("--model", choices=("demo", "jmp-s", "jmp-l"), default="demo", help="sizes")
    parser.add_argument("--blocks", type=int, help="default: all")
    _add_any_depth(parser)
    _add_graph(parser, "the paper's for the data's name")
    _add_run(parser, "pretrain")


def _pretrain_request(options: argparse.Namespace) -> PretrainRequest:
    return PretrainRequest(
        device=options.device,
        data=options.data,
        run=_run_request(options, presets.pretrain() if options.data else presets.demo("pretrain")),
        model=options.model,
        blocks=options.blocks,
        cutoff=options.cutoff,
        max_neighbors=options.max_neighbors,
        any_depth=options.any_depth,
    )


def _add_distill(parser: argparse.ArgumentParser) -> None:
    _add_device(parser)
    _add_data(parser)
    parser.add_argument(
        "--teacher", type=Path, metavar="PATH", help="jmp-l.pt or a saved model; none given: the demo teacher"
    )
    parser.add_argument(
        "--teacher-precision",
        choices=("fp32", "tf32", "bf16", "fp16"),
        help="default: bf16 on CUDA (fp16 before compute capability 8.0), on a CPU the run's, for int8 bf16",
    )
    parser.add_argument("--blocks", type=int, help="number of the teacher's blocks the student keeps, the first ones")
    parser.add_argument("--keep", help="or exactly these blocks, like 0,1,2,5")
    parser.add_argument("--final-mlp", choices=FINAL_MLPS, default="sliced", help="see ejmp prune")
    parser.add_argument("--student", type=Path, metavar="PATH", help="or a saved model to go on with")
    parser.add_argument("--freeze-blocks", action="store_true", help="train the final MLP and the heads only")
    _add_any_depth(parser)
    text = "add N structures to each dataset, of short walks with the teacher's forces, which are their labels"
    parser.add_argument("--synthetic", type=int, metavar="N", default=0, help=text)
    text = "temperature of these walks, K (default: 300)"
    parser.add_argument("--temperature", type=float, metavar="K", default=300.0, help=text)
    parser.add_argument(
        "--terms",
        metavar="NAME=WEIGHT,...",
        help=f"ejmp.compress.config.DistillConfig names them; default: {presets.TERMS}; "
        f"for the demo data {presets.DEMO_TERMS}",
    )
    _add_run(parser, "distill")


def _distill_request(options: argparse.Namespace) -> DistillRequest:
    keep = parse_blocks(options.keep) if options.keep else None
    demo = presets.demo("distill", blocks=len(keep) if keep else options.blocks)
    return DistillRequest(
        device=options.device,
        data=options.data,
        run=_run_request(options, presets.distill() if options.data else demo),
        teacher=options.teacher,
        teacher_precision=options.teacher_precision,
        blocks=options.blocks,
        keep=keep,
        student=options.student,
        final_mlp=options.final_mlp,
        freeze_blocks=options.freeze_blocks,
        any_depth=options.any_depth,
        terms=parse_terms(options.terms or (presets.TERMS if options.data else presets.DEMO_TERMS)),
        synthetic=options.synthetic,
        temperature=options.temperature,
    )


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    _add_device(parser)
    text = "a file or folder of your own that ASE reads, in eV and A; it is converted to RUN/data and divided there"
    parser.add_argument("frames", nargs="?", type=Path, metavar="FRAMES", help=text)
    parser.add_argument("--data", metavar="NAME=FOLDER", help="or a record store with splits train, val and test")
    parser.add_argument("--demo", default="rmd17", metavar="NAME", help="or a demo set: rmd17, qm9, spice, md22, qmof")
    text = "JMP's settings, normalisation and graphs for a task; default: the settings for the data's name"
    parser.add_argument("--recipe", choices=tuple(FINETUNING), help=text)
    parser.add_argument("--target", help='"energy" or a label of the data; default: the recipe\'s, or energy')
    parser.add_argument("--forces", choices=("gradient", "direct"), default="gradient")
    parser.add_argument(
        "--start", type=Path, metavar="PATH", help="saved model to start from; none given: the demo teacher"
    )
    parser.add_argument("--scratch", action="store_true", help="start from random weights of the same sizes")
    parser.add_argument(
        "--energy-weight",
        type=float,
        metavar="W",
        help="of the target's error in the loss; default: 1, and 0 where JMP learns forces alone: rmd17, spice, md22",
    )
    parser.add_argument("--force-weight", type=float, metavar="W", help="default: 100, rmd17 10")
    text = "how atoms' outputs make a structure's; default: sum, for qmof mean"
    parser.add_argument("--reduction", choices=("sum", "mean"), help=text)
    _add_graph(parser, "the start model's, or the paper's for the data's name")
    add_source_flags(parser, "labels of FRAMES", targets=False)
    _add_run(parser, "finetune")


def _finetune_request(options: argparse.Namespace) -> FinetuneRequest:
    if options.frames and options.data:
        raise ValueError("data: expected FRAMES or --data, got both")
    reading = SourceRequest.from_flags(options)
    if not options.frames and reading != NOTHING_TOLD:
        raise ValueError("FRAMES: the flags on labels of FRAMES are for a file or folder of your own, got none")
    if options.frames:
        name = re.sub(r"[^\w.-]", "_", options.frames.name.split(".")[0]) or "own"
        options.data = f"{name}={options.directory / 'data'}"
    if options.recipe and not options.data:
        raise ValueError("recipe: expected with --data or FRAMES; the demo sets have their own settings")
    if options.recipe and options.target not in (None, FINETUNING[options.recipe].target):
        target = FINETUNING[options.recipe].target
        raise ValueError(f"target: the recipe {options.recipe} learns {target}, got {options.target}")
    return FinetuneRequest(
        device=options.device,
        data=options.data,
        frames=options.frames,
        reading=reading,
        run=_run_request(options, _finetune_settings(options)),
        demo=options.demo,
        recipe=options.recipe,
        target=options.target,
        forces=options.forces,
        start=options.start,
        scratch=options.scratch,
        energy_weight=options.energy_weight,
        force_weight=options.force_weight,
        reduction=options.reduction,
        cutoff=options.cutoff,
        max_neighbors=options.max_neighbors,
    )


def _finetune_settings(options: argparse.Namespace) -> TrainConfig:
    """Return the settings before any flag: those of a recipe, of the data's name, or of the demo sets."""
    if not options.data:
        return presets.demo("finetune")
    if options.recipe:
        return presets.finetune(FINETUNING[options.recipe])
    name = options.data.partition("=")[0]
    recipes = CATALOG[name].finetuning if name in CATALOG else ()
    return presets.finetune(recipes[0] if recipes else None)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_device(parser)
    parser.add_argument(
        "models", nargs="*", type=Path, metavar="MODEL", help="saved models; none given: the demo teacher"
    )
    _add_data(parser)
    parser.add_argument("--demo", metavar="NAME", help="or a demo set to fine-tune on")
    parser.add_argument("--split", choices=("train", "val", "test"), default="val")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, metavar="JSON")


def _evaluate_request(options: argparse.Namespace) -> EvaluateRequest:
    if options.batch_size < 1:
        raise ValueError(f"--batch-size: expected 1 or more, got {options.batch_size}")
    return EvaluateRequest(
        device=options.device,
        models=tuple(options.models),
        data=options.data,
        demo=options.demo,
        split=options.split,
        batch_size=options.batch_size,
        output=options.output,
    )


COMMANDS: dict[CommandName, Command] = {
    "pretrain": Command(
        description="Pre-train a model on a mix of datasets (JMP, arXiv 2310.16802).",
        add_flags=_add_pretrain,
        request=_pretrain_request,
    ),
    "distill": Command(
        description="Prune a teacher's last blocks and distil it into what is left (Ghunaim et al. 2025).",
        add_flags=_add_distill,
        request=_distill_request,
    ),
    "finetune": Command(
        description="Fine-tune a model on one dataset: energies and forces, or another label.",
        add_flags=_add_finetune,
        request=_finetune_request,
    ),
    "evaluate": Command(
        description="Mean absolute errors of models, in meV and meV/A on free atoms.",
        add_flags=_add_evaluate,
        request=_evaluate_request,
    ),
}
