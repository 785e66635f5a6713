"""What the commands of launch/ do, on each rank; each returns the text for people."""

import dataclasses
import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import distributed as dist

from ejmp.compress.distill import DistillConfig
from ejmp.compress.pruning import parse_blocks, prune
from ejmp.model.checkpoint import load
from ejmp.model.config import Precision, jmp_l, jmp_s
from ejmp.model.jmp import JMP
from ejmp.train import config
from ejmp.train.adapt import for_finetuning
from ejmp.train.config import TrainConfig
from ejmp.train.demo import demo_config, demo_teacher, new_model
from ejmp.train.distributed import Ranks
from ejmp.train.evaluate import Errors, table
from ejmp.train.evaluate import evaluate as errors_of
from ejmp.train.flags import settings
from ejmp.train.groups import LayerFactors
from ejmp.train.loop import FINAL, Result, Run, train
from ejmp.train.objective import Distillation, Supervised, freeze_blocks
from ejmp.train.sources import Source, demo_downstream, demo_mix, from_stores, tasks_of, with_tasks_of

SIZES = {"demo": demo_config, "jmp-s": jmp_s, "jmp-l": jmp_l}


def pretrain(options: Namespace, ranks: Ranks) -> str:
    """Pre-train a model from random weights on the mix."""
    sources = from_stores(options.data) if options.data else demo_mix()
    chosen = settings(options, config.pretrain() if options.data else config.demo("pretrain"))
    sizes = SIZES[options.model](**({"blocks": options.blocks} if options.blocks else {}))
    sizes = dataclasses.replace(sizes, num_tasks=len(sources))
    model = _ready(new_model(sizes, sources, seed=chosen.seed), chosen, ranks)
    limits = [source.max_neighbors for source in sources]
    objective = Supervised(model, tasks_of(sources), edge_dropout=chosen.edge_dropout, max_neighbors=limits)
    result = _train(options, Run(**_common(options, ranks, sources, chosen), objective=objective))
    return _report(options, result, {"untrained": result.before, "trained": result.after})


def distill(options: Namespace, ranks: Ranks) -> str:
    """Teach a pruned student what its teacher makes of the mix."""
    path = Path(options.teacher) if options.teacher else demo_teacher(ranks)
    teacher = load(path)
    sources = with_tasks_of(path, from_stores(options.data) if options.data else demo_mix(), teacher)
    chosen = settings(options, config.distill() if options.data else config.demo("distill"))
    student = _student(options, teacher)
    teacher = _ready(teacher, chosen, ranks)
    teacher.precision = options.teacher_precision or fastest_precision(ranks.device, chosen.precision)
    student = _ready(student, chosen, ranks)
    if options.freeze_blocks:
        freeze_blocks(student)
    terms = terms_of(options.terms or (config.TERMS if options.data else config.DEMO_TERMS))
    objective = Distillation(student, teacher, tasks_of(sources), terms)
    result = _train(options, Run(**_common(options, ranks, sources, chosen), objective=objective))
    kept = student.config.kept_blocks or tuple(range(student.config.blocks))
    of_teacher = errors_of(teacher, sources, ranks) if result.finished else {}
    rows = {
        f"teacher, {teacher.config.blocks} blocks": of_teacher,
        f"blocks {','.join(map(str, kept))}: BR": result.before,
        f"blocks {','.join(map(str, kept))}: BR+KD": result.after,
    }
    return _report(options, result, rows)


def fastest_precision(device: torch.device, otherwise: Precision) -> Precision:
    """Return what a teacher is evaluated in: the low type with tensor cores on a GPU, another on a CPU."""
    if device.type != "cuda":
        return otherwise
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def finetune(options: Namespace, ranks: Ranks) -> str:
    """Fine-tune a model on one dataset."""
    if options.data:
        (source,) = from_stores(options.data, target=options.target or "energy", forces=options.forces)
    else:
        source = demo_downstream(options.demo)
    chosen = settings(options, _finetune_defaults(options, source, ranks))
    path = Path(options.start) if options.start else demo_teacher(ranks)
    model = for_finetuning(
        load(path), direct_forces=source.task.forces == "direct", reduction=options.reduction, seed=chosen.seed
    )
    if options.scratch:
        model = new_model(model.config, [source], seed=chosen.seed)
    factors = None if options.scratch else LayerFactors()
    objective = Supervised(_ready(model, chosen, ranks), tasks_of([source]))
    result = _train(options, Run(**_common(options, ranks, [source], chosen), objective=objective, factors=factors))
    rows = {"before": result.before, "after": result.after}
    if result.finished and "test" in source.splits:
        best = _ready(load(_folder(options) / FINAL), chosen, ranks)
        rows["after, on the test split"] = errors_of(best, [source], ranks, split="test")
    return _report(options, result, rows)


def evaluate(options: Namespace, ranks: Ranks) -> str:
    """Measure errors of saved models."""
    paths = [Path(model) for model in options.models] or [demo_teacher(ranks)]
    rows = {}
    for path in paths:
        model = load(path).to(ranks.device)
        if options.data:
            sources = from_stores(options.data)
        else:
            sources = [demo_downstream(options.demo)] if options.demo else demo_mix()
        sources = with_tasks_of(path, sources, model)
        rows[str(path)] = errors_of(model, sources, ranks, split=options.split, batch_size=options.batch_size)
    if options.output is not None and ranks.rank == 0:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")
    return table(rows)


# ---- what they share ----


def _folder(options: Namespace) -> Path:
    return Path(options.run) if options.run else Path("runs", options.command)


def _common(options: Namespace, ranks: Ranks, sources: Sequence[Source], chosen: TrainConfig) -> dict:
    return {
        "sources": sources,
        "config": chosen,
        "directory": _folder(options),
        "ranks": ranks,
        "trackers": tuple(options.track),
    }


def _train(options: Namespace, run: Run) -> Result:
    if run.ranks.rank == 0:
        run.directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    return train(run, resume=options.resume)


def _ready(model: JMP, chosen: TrainConfig, ranks: Ranks) -> JMP:
    """Return the model on this rank's device at the run's precision."""
    model.precision = chosen.precision
    return model.to(ranks.device)


def _report(options: Namespace, result: Result, rows: dict[str, Errors]) -> str:
    if not result.finished:
        return f"stopped at step {result.step}; --run {_folder(options)} --resume goes on"
    return f"{table(rows)}\n\nthe model: {_folder(options) / FINAL}"


def _student(options: Namespace, teacher: JMP) -> JMP:
    if sum(map(bool, (options.blocks, options.keep, options.student))) != 1:
        raise ValueError("student: expected one of --blocks, --keep and --student")
    if options.student:
        return load(options.student)
    keep = parse_blocks(options.keep) if options.keep else None
    return prune(teacher, blocks=options.blocks, keep=keep, final_mlp=options.final_mlp)


def terms_of(text: str) -> DistillConfig:
    """Return the terms of "forces=1,node=1"; those that are not named are left out."""
    names = [field.name for field in dataclasses.fields(DistillConfig)]
    weights = {name: 0.0 for name in names if name != "teacher"}
    for item in text.split(","):
        name, found, value = item.partition("=")
        try:
            weights[name] = float(value)
        except ValueError as error:
            raise ValueError(f"terms: expected NAME=WEIGHT,..., got {item!r}") from error
        if not found or name not in names:
            raise ValueError(f"terms: expected some of {', '.join(names)}, got {item!r}")
    return DistillConfig(**weights)


def _finetune_defaults(options: Namespace, source: Source, ranks: Ranks) -> TrainConfig:
    """Return JMP's recipe in steps: warm-up 5 epochs, cosine 32, a validation each epoch."""
    if not options.data:
        return config.demo("finetune")
    base = config.finetune()
    epoch = max(1, len(source.split("train")) // (getattr(options, "batch_size", base.batch_size) * ranks.world_size))
    return dataclasses.replace(base, warmup_steps=5 * epoch, cosine_steps=32 * epoch, validate_every=epoch)
