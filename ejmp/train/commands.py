"""The training commands, on each rank; each returns the text for people."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import distributed as dist

from ejmp.catalog import FINETUNING
from ejmp.compress.config import REFIT_STRUCTURES
from ejmp.compress.pruning import prune
from ejmp.data import convert
from ejmp.data.source_flags import SourceRequest
from ejmp.data.store.writers import Writers
from ejmp.model.checkpoint import load
from ejmp.model.config import SIZES, JMPConfig, Precision
from ejmp.model.jmp import JMP
from ejmp.model.precision import check_precision
from ejmp.train.demo import demo_config, demo_teacher
from ejmp.train.distributed import Ranks
from ejmp.train.evaluate import Errors, table
from ejmp.train.evaluate import evaluate as errors_of
from ejmp.train.groups import LayerFactors
from ejmp.train.loop import FINAL, Result, Run, train
from ejmp.train.objective import Distillation, Objective, Supervised, freeze_blocks
from ejmp.train.page import report_page
from ejmp.train.recipes import finetuning_data, pretraining_data, recipe_graph, recipe_of, weighted
from ejmp.train.requests import (
    DistillRequest,
    EvaluateRequest,
    FinetuneRequest,
    ModelSize,
    PretrainRequest,
    Request,
    RunRequest,
)
from ejmp.train.sources import (
    TaskData,
    at_most,
    demo_downstream,
    demo_mix,
    from_stores,
    graphs_of,
    mix_of,
    tasks_of,
    with_graph,
    with_tasks_of,
)
from ejmp.train.start import for_finetuning, new_model
from ejmp.train.synthetic import with_synthetic


def carry_out(request: Request, ranks: Ranks) -> str:
    """Carry out a request, together with the other ranks, and return the text to print.

    Raises:
        ValueError: for bad input, naming it.
        OSError: if a file is missing or cannot be written.
    """
    match request:
        case PretrainRequest():
            return pretrain(request, ranks)
        case DistillRequest():
            return distill(request, ranks)
        case FinetuneRequest():
            return finetune(request, ranks)
        case EvaluateRequest():
            return evaluate(request, ranks)
    raise TypeError(f"request: expected one of a training command, got {type(request).__name__}")


def pretrain(request: PretrainRequest, ranks: Ranks) -> str:
    """Pre-train a model from random weights on the mix."""
    sources = demo_mix()
    if request.data:
        given = {"cutoff": request.cutoff, "max_neighbors": request.max_neighbors}
        stores = enumerate(from_stores(request.data))
        sources = [with_graph(pretraining_data(data, head), **given) for head, data in stores]
    config = request.run.config
    sizes = dataclasses.replace(_sizes(request.model, request.blocks), num_tasks=len(sources))
    sizes = dataclasses.replace(sizes, depths=_depths(request.any_depth, sizes.blocks))
    model = _ready(new_model(sizes, sources, seed=config.seed), config.precision, ranks)
    objective = Supervised(model, tasks_of(sources), edge_dropout=config.edge_dropout)
    result = _train(request.run, objective, sources, ranks)
    rows = {"untrained": result.before, "trained": result.after}
    rows |= _at_depths(request.run, result, sources, ranks)
    return _report(request.run, result, rows) + _page(request.run, "Pre-trained", result, sources, rows, ranks)


def _depths(least: int | None, blocks: int) -> tuple[int, ...] | None:
    """Return the depths that a model is trained at.

    Raises:
        ValueError: if the least one is none of its numbers of blocks.
    """
    if least is not None and not 1 <= least <= blocks:
        raise ValueError(f"--any-depth: expected a number of blocks, 1 to {blocks}, got {least}")
    return None if least is None else tuple(range(least, blocks + 1))


def _at_depths(run: RunRequest, result: Result, sources: Sequence[TaskData], ranks: Ranks) -> dict[str, Errors]:
    """Return the errors of a finished run's model at each of its depths but that of all blocks."""
    if not result.finished:
        return {}
    dist.barrier()
    model = load(run.directory / FINAL)
    depths = [depth for depth in model.config.depths or () if depth < model.config.blocks]
    return {
        f"its first {depth} blocks" if depth > 1 else "its first block": errors_of(
            _ready(prune(model, blocks=depth), run.config.precision, ranks), sources, ranks
        )
        for depth in reversed(depths)
    }


def _sizes(model: ModelSize, blocks: int | None) -> JMPConfig:
    make = {"demo": demo_config, **SIZES}[model]
    return make(blocks=blocks) if blocks else make()


def distill(request: DistillRequest, ranks: Ranks) -> str:
    """Teach a pruned student what its teacher makes of the mix."""
    path = request.teacher or demo_teacher()
    teacher = load(path)
    sources = with_tasks_of(path, mix_of(request.data), teacher)
    config = request.run.config
    student = _ready(_student(request, teacher, sources), config.precision, ranks)
    depths = _depths(request.any_depth, student.config.blocks)
    student.config = dataclasses.replace(student.config, depths=depths)
    teacher_precision = request.teacher_precision or fastest_precision(ranks.device, config.precision)
    teacher = _ready(teacher, teacher_precision, ranks)
    if request.freeze_blocks:
        freeze_blocks(student)
    if request.synthetic:
        heat = {"temperature": request.temperature, "seed": config.seed}
        sources = with_synthetic(
            sources, teacher, request.run.directory / "synthetic", request.synthetic, ranks, **heat
        )
    objective = Distillation(student, teacher, tasks_of(sources), request.terms)
    result = _train(request.run, objective, sources, ranks)
    kept = student.config.kept_blocks or tuple(range(student.config.blocks))
    validation = [at_most(source, "val", config.val_structures, seed=config.seed) for source in sources]
    of_teacher = errors_of(teacher, validation, ranks) if result.finished else {}
    rows = {
        f"teacher, {teacher.config.blocks} blocks": of_teacher,
        f"blocks {','.join(map(str, kept))}: BR": result.before,
        f"blocks {','.join(map(str, kept))}: BR+KD": result.after,
    }
    rows |= _at_depths(request.run, result, validation, ranks)
    return _report(request.run, result, rows) + _page(request.run, "Distilled", result, validation, rows, ranks)


def _student(request: DistillRequest, teacher: JMP, sources: Sequence[TaskData]) -> JMP:
    if request.student:
        return load(request.student)
    seed = request.run.config.seed
    graphs = graphs_of(teacher, sources, REFIT_STRUCTURES, seed=seed) if request.final_mlp == "refit" else None
    return prune(teacher, blocks=request.blocks, keep=request.keep, final_mlp=request.final_mlp, data=graphs)


def fastest_precision(device: torch.device, otherwise: Precision) -> Precision:
    """Return the precision to evaluate a teacher in: the low type with tensor cores on a GPU, another on a CPU."""
    if device.type != "cuda":
        return "bf16" if otherwise == "int8" else otherwise  # its 8 bits are for the student to learn
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def finetune(request: FinetuneRequest, ranks: Ranks) -> str:
    """Fine-tune a model on one dataset."""
    if request.frames is not None:
        _convert(request.frames, request.run.directory / "data", request.reading, ranks)
    start = load(request.start or demo_teacher())
    source = _finetuning_data(request, start)
    if ranks.rank == 0:
        graph = source.task.graph
        sys.stderr.write(f"graphs of {source.name}: {graph.cutoff:g} A, {graph.max_neighbors} neighbours\n")
    run, config = request.run, request.run.config
    model = for_finetuning(
        start,
        direct_forces=source.task.forces == "direct",
        reduction=request.reduction or _reduction(request, source),
        biases=source.task.forces is None,
        seed=config.seed,
    )
    if request.scratch:
        model = new_model(model.config, [source], seed=config.seed)
    factors = None if request.scratch else LayerFactors()
    objective = Supervised(_ready(model, config.precision, ranks), tasks_of([source]))
    result = _train(run, objective, [source], ranks, factors)
    rows = {"before": result.before, "after": result.after}
    if not result.finished:
        return _report(run, result, rows)
    best = _ready(load(run.directory / FINAL), config.precision, ranks)
    if "test" in source.splits:
        rows["after, on the test split"] = errors_of(best, [source], ranks, split="test")
    page = report_page(run.directory, "Fine-tuned", best, [source], rows) if ranks.rank == 0 else ""
    return _report(run, result, rows) + page


def _convert(frames: Path, store: Path, reading: SourceRequest, ranks: Ranks) -> None:
    """Convert a user's frames to a record store with splits: on rank 0, or on all ranks that mpirun started."""
    if ranks.rank == 0 or Writers().size > 1:
        with reading.checking():
            convert(frames, store, format="ase", options=reading.options)
    dist.barrier()


def _finetuning_data(request: FinetuneRequest, start: JMP) -> TaskData:
    """Return what is trained on, with its losses, normalisation and graphs."""
    recipe = FINETUNING[request.recipe] if request.recipe else None
    if request.data:
        stores = from_stores(request.data)
        if len(stores) != 1:
            raise ValueError(f"data: expected one NAME=FOLDER, got {len(stores)}")
        source = finetuning_data(stores[0], target=request.target, forces=request.forces, recipe=recipe)
    else:
        source = demo_downstream(request.demo)
    source = dataclasses.replace(source, task=weighted(source.task, request.energy_weight, request.force_weight))
    return with_graph(
        source,
        cutoff=request.cutoff,
        max_neighbors=request.max_neighbors,
        start=start,
        known=recipe_graph(recipe) if recipe else None,
    )


def _reduction(request: FinetuneRequest, source: TaskData) -> Literal["sum", "mean"]:
    recipe = FINETUNING[request.recipe] if request.recipe else recipe_of(source.name)
    return recipe.reduction if recipe else "sum"


def evaluate(request: EvaluateRequest, ranks: Ranks) -> str:
    """Measure errors of saved models."""
    rows = {}
    for path in request.models or [demo_teacher()]:
        model = load(path).to(ranks.device)
        data = [demo_downstream(request.demo)] if request.demo and not request.data else mix_of(request.data)
        sources = with_tasks_of(path, data, model)
        rows[str(path)] = errors_of(model, sources, ranks, split=request.split, batch_size=request.batch_size)
    if request.output is not None and ranks.rank == 0:
        request.output.write_text(json.dumps(rows, indent=1) + "\n")
    return table(rows)


def _train(
    request: RunRequest,
    objective: Objective,
    sources: Sequence[TaskData],
    ranks: Ranks,
    factors: LayerFactors | None = None,
) -> Result:
    _check_forces(sources, request.config.precision)
    if ranks.rank == 0:
        request.directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    run = Run(
        objective=objective,
        sources=sources,
        config=request.config,
        directory=request.directory,
        ranks=ranks,
        factors=factors,
        trackers=request.trackers,
        force=request.force,
    )
    return train(run, resume=request.resume)


def _ready(model: JMP, precision: Precision, ranks: Ranks) -> JMP:
    """Return the model on this rank's device at a precision.

    Raises:
        ValueError: for 8-bit integers, in which validation predicts, on another device than a CPU with VNNI.
    """
    if precision == "int8":
        check_precision(precision, ranks.device)
    return model.on(precision=precision).to(ranks.device)


def _check_forces(sources: Sequence[TaskData], precision: Precision) -> None:
    """Refuse tasks that training in 8 bits cannot validate: predictions in 8 bits have no gradient forces."""
    for source in sources:
        if precision == "int8" and source.task.forces == "gradient":
            raise ValueError(
                f"--precision int8: task {source.name} trains gradient forces, and predictions in 8 bits have none; "
                "give it direct forces, or train at bf16"
            )


def _page(
    run: RunRequest, made: str, result: Result, sources: Sequence[TaskData], rows: dict[str, Errors], ranks: Ranks
) -> str:
    """Write the page of a finished run, on rank 0, and return the line that says where it is."""
    if not result.finished or ranks.rank != 0:
        return ""
    best = _ready(load(run.directory / FINAL), run.config.precision, ranks)
    return report_page(run.directory, made, best, sources, rows)


def _report(request: RunRequest, result: Result, rows: dict[str, Errors]) -> str:
    if not result.finished:
        return f"stopped at step {result.step}; --run {request.directory} --resume goes on"
    return f"{table(rows)}\n\nthe model: {request.directory / FINAL}"
