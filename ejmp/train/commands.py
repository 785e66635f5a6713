"""The training commands, on each rank; each returns the text for people."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import distributed as dist

from ejmp.compress.pruning import prune
from ejmp.data import convert
from ejmp.data.store.writers import Writers
from ejmp.model.checkpoint import load
from ejmp.model.config import SIZES, JMPConfig, Precision
from ejmp.model.jmp import JMP
from ejmp.train.config import TrainConfig
from ejmp.train.demo import demo_config, demo_teacher
from ejmp.train.distributed import Ranks
from ejmp.train.evaluate import Errors, table
from ejmp.train.evaluate import evaluate as errors_of
from ejmp.train.groups import LayerFactors
from ejmp.train.loop import FINAL, Result, Run, train
from ejmp.train.objective import Distillation, Objective, Supervised, freeze_blocks
from ejmp.train.page import report_page
from ejmp.train.requests import (
    DistillRequest,
    EvaluateRequest,
    FinetuneRequest,
    ModelSize,
    PretrainRequest,
    Request,
    RunRequest,
)
from ejmp.train.sources import TaskData, demo_downstream, demo_mix, from_stores, tasks_of, with_graph, with_tasks_of
from ejmp.train.start import for_finetuning, new_model


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
        sources = [with_graph(source, **given) for source in from_stores(request.data)]
    config = request.run.config
    sizes = dataclasses.replace(_sizes(request.model, request.blocks), num_tasks=len(sources))
    model = _ready(new_model(sizes, sources, seed=config.seed), config.precision, ranks)
    objective = Supervised(model, tasks_of(sources), edge_dropout=config.edge_dropout)
    result = _train(request.run, objective, sources, ranks)
    return _report(request.run, result, {"untrained": result.before, "trained": result.after})


def _sizes(model: ModelSize, blocks: int | None) -> JMPConfig:
    make = {"demo": demo_config, **SIZES}[model]
    return make(blocks=blocks) if blocks else make()


def distill(request: DistillRequest, ranks: Ranks) -> str:
    """Teach a pruned student what its teacher makes of the mix."""
    path = request.teacher or demo_teacher()
    teacher = load(path)
    sources = with_tasks_of(path, from_stores(request.data) if request.data else demo_mix(), teacher)
    config = request.run.config
    student = _ready(_student(request, teacher), config.precision, ranks)
    teacher_precision = request.teacher_precision or fastest_precision(ranks.device, config.precision)
    teacher = _ready(teacher, teacher_precision, ranks)
    if request.freeze_blocks:
        freeze_blocks(student)
    objective = Distillation(student, teacher, tasks_of(sources), request.terms)
    result = _train(request.run, objective, sources, ranks)
    kept = student.config.kept_blocks or tuple(range(student.config.blocks))
    of_teacher = errors_of(teacher, sources, ranks) if result.finished else {}
    rows = {
        f"teacher, {teacher.config.blocks} blocks": of_teacher,
        f"blocks {','.join(map(str, kept))}: BR": result.before,
        f"blocks {','.join(map(str, kept))}: BR+KD": result.after,
    }
    return _report(request.run, result, rows)


def _student(request: DistillRequest, teacher: JMP) -> JMP:
    if request.student:
        return load(request.student)
    return prune(teacher, blocks=request.blocks, keep=request.keep, final_mlp=request.final_mlp)


def fastest_precision(device: torch.device, otherwise: Precision) -> Precision:
    """Return the precision to evaluate a teacher in: the low type with tensor cores on a GPU, another on a CPU."""
    if device.type != "cuda":
        return otherwise
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def finetune(request: FinetuneRequest, ranks: Ranks) -> str:
    """Fine-tune a model on one dataset."""
    if request.frames is not None:
        _convert(request.frames, request.run.directory / "data", ranks)
    start = load(request.start or demo_teacher())
    source = with_graph(
        _finetuning_data(request), cutoff=request.cutoff, max_neighbors=request.max_neighbors, start=start
    )
    if ranks.rank == 0:
        graph = source.task.graph
        sys.stderr.write(f"graphs of {source.name}: {graph.cutoff:g} A, {graph.max_neighbors} neighbours\n")
    run = request.run
    if request.data:
        epoch = max(1, len(source.split("train")) // (run.config.batch_size * ranks.world_size))
        run = dataclasses.replace(run, config=_in_epochs(run, epoch))
    config = run.config
    model = for_finetuning(
        start,
        direct_forces=source.task.forces == "direct",
        reduction=request.reduction,
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


def _convert(frames: Path, store: Path, ranks: Ranks) -> None:
    """Convert a user's frames to a record store with splits: on rank 0, or on all ranks that mpirun started."""
    if ranks.rank == 0 or Writers().size > 1:
        convert(frames, store, format="ase")
    dist.barrier()


def _finetuning_data(request: FinetuneRequest) -> TaskData:
    if not request.data:
        return demo_downstream(request.demo)
    sources = from_stores(request.data, target=request.target, forces=request.forces)
    if len(sources) != 1:
        raise ValueError(f"data: expected one NAME=FOLDER, got {len(sources)}")
    return sources[0]


def _in_epochs(run: RunRequest, epoch: int) -> TrainConfig:
    """Return JMP's recipe in steps, where no flag says otherwise: warm-up 5 epochs, cosine 32, a validation each.

    Args:
        run: what was asked.
        epoch: number of steps in an epoch of the data.
    """
    recipe = {"warmup_steps": 5 * epoch, "cosine_steps": 32 * epoch, "validate_every": epoch}
    return dataclasses.replace(run.config, **{name: n for name, n in recipe.items() if name not in run.given})


def evaluate(request: EvaluateRequest, ranks: Ranks) -> str:
    """Measure errors of saved models."""
    rows = {}
    for path in request.models or [demo_teacher()]:
        model = load(path).to(ranks.device)
        if request.data:
            sources = from_stores(request.data)
        else:
            sources = [demo_downstream(request.demo)] if request.demo else demo_mix()
        sources = with_tasks_of(path, sources, model)
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
    )
    return train(run, resume=request.resume)


def _ready(model: JMP, precision: Precision, ranks: Ranks) -> JMP:
    """Return the model on this rank's device at a precision."""
    return model.on(precision=precision).to(ranks.device)


def _report(request: RunRequest, result: Result, rows: dict[str, Errors]) -> str:
    if not result.finished:
        return f"stopped at step {result.step}; --run {request.directory} --resume goes on"
    return f"{table(rows)}\n\nthe model: {request.directory / FINAL}"
