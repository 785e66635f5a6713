"""One run of a study, from its inputs to its result."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ejmp.compress.config import REFIT_STRUCTURES, parse_terms
from ejmp.compress.pruning import prune
from ejmp.data import InOrder, make_batch
from ejmp.measure.bench import forward_pass
from ejmp.measure.flops import count_macs, graph_sizes
from ejmp.measure.timing import Rounds, by_turns
from ejmp.model.checkpoint import load
from ejmp.model.jmp import JMP
from ejmp.study.budget import distill_config, finetune_config, scratch_config
from ejmp.study.inputs import Inputs, recipe_for
from ejmp.study.plan import BLOCKS, FEWER, Kind, RunSpec
from ejmp.study.record import run_folder
from ejmp.study.settings import timed
from ejmp.train import presets
from ejmp.train.commands import fastest_precision
from ejmp.train.config import TrainConfig
from ejmp.train.distributed import Ranks
from ejmp.train.evaluate import Errors, evaluate
from ejmp.train.groups import LayerFactors
from ejmp.train.loop import FINAL, Result, Run, train
from ejmp.train.metrics import Maes
from ejmp.train.objective import Distillation, Objective, Supervised
from ejmp.train.sources import Split, TaskData, graphs_of, loader_of, tasks_of
from ejmp.train.start import for_finetuning
from ejmp.train.survey import survey

SCALE = "scale_factor"
"""What the names of a model's scale factors end in."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished run has found."""

    values: dict[str, Any]
    """Its numbers, ready for JSON."""
    config: dict[str, Any] = field(default_factory=dict)
    """Settings that made them."""
    steps: int | None = None
    """Training steps; None: it has not trained."""


def carry_out(spec: RunSpec, inputs: Inputs) -> Outcome | None:
    """Carry out a run, or go on with one that was interrupted; return what it has found.

    Args:
        spec: the run.
        inputs: of the study.

    Returns:
        The outcome; None if the process was told to stop meanwhile, and a checkpoint is there to go on from.

    Raises:
        ValueError: for bad input, naming it.
    """
    return _KINDS[spec.kind](spec, inputs)


def _student(spec: RunSpec, teacher: JMP) -> JMP:
    """Return the teacher's first blocks as the strategy makes them, without any training."""
    if spec.strategy == "teacher" or spec.blocks is None:
        return teacher
    torch.manual_seed(spec.seed)
    return prune(teacher, blocks=spec.blocks, final_mlp="random" if spec.strategy == "br_random" else "sliced")


def _constant(spec: RunSpec, inputs: Inputs) -> Outcome:
    """Measure predictions that need no model: forces of zero, and the mean of a target."""
    teacher = inputs.teacher()
    if spec.dataset is None:
        sources, split = inputs.mix(teacher), "val"
    else:
        sources, split = [inputs.downstream(spec.dataset, teacher)], "test"
    return Outcome(values={"errors": constant_errors(sources, split, heads=teacher.config.num_tasks)})


def constant_errors(sources: Sequence[TaskData], split: Split, *, heads: int) -> Errors:
    """Return the errors of predicting no forces, and for each target its mean beside the linear reference.

    Args:
        sources: datasets with their tasks.
        split: split to predict.
        heads: number of heads of the model that the tasks are of.
    """
    tasks = tasks_of(sources)
    maes = Maes(tasks)
    sampler = InOrder(sizes=[len(source.split(split)) for source in sources], batch_size=16)
    for batch in loader_of(sources, split, sampler).batches():
        graph = batch.graph
        energy = torch.zeros(graph.num_structures, heads)
        maes.update(energy, torch.zeros(graph.num_atoms, 3), batch)
    return maes.result()


def _evaluated(spec: RunSpec, inputs: Inputs) -> Outcome:
    teacher = inputs.teacher()
    sources = inputs.mix(teacher)
    if spec.strategy == "br_refit":
        graphs = graphs_of(teacher, sources, REFIT_STRUCTURES, seed=spec.seed)
        model = prune(teacher, blocks=spec.blocks, final_mlp="refit", data=graphs)
    else:
        model = _student(spec, teacher)
    return Outcome(values={"errors": evaluate(model.to(inputs.ranks.device), sources, inputs.ranks)})


def _distilled(spec: RunSpec, inputs: Inputs) -> Outcome | None:
    teacher = inputs.teacher()
    sources = inputs.mix(teacher)
    demo = inputs.settings.demo
    config = distill_config(inputs.settings.budget, demo=demo, blocks=spec.blocks, seed=spec.seed)
    terms = parse_terms(presets.DEMO_TERMS if demo else presets.TERMS)
    student = _ready(_student(spec, teacher), config, inputs.ranks)
    precision = fastest_precision(inputs.ranks.device, config.precision)
    teacher = teacher.on(precision=precision).to(inputs.ranks.device)
    objective = Distillation(student, teacher, tasks_of(sources), terms)
    result = _trained(spec, inputs, objective, sources, config)
    if result is None:
        return None
    settings = config.to_dict() | {"terms": dataclasses.asdict(terms)}
    return Outcome(values={"errors": result.after}, config=settings, steps=result.step)


def _from_scratch(spec: RunSpec, inputs: Inputs) -> Outcome | None:
    teacher = inputs.teacher()
    sources = inputs.mix(teacher)
    config = scratch_config(inputs.settings.budget, demo=inputs.settings.demo, seed=spec.seed)
    model = _ready(untrained(teacher, spec.blocks or BLOCKS, seed=spec.seed), config, inputs.ranks)
    objective = Supervised(model, tasks_of(sources), edge_dropout=config.edge_dropout)
    result = _trained(spec, inputs, objective, sources, config)
    if result is None:
        return None
    return Outcome(values={"errors": result.after}, config=config.to_dict(), steps=result.step)


def untrained(teacher: JMP, blocks: int, *, seed: int) -> JMP:
    """Return a model with random weights of a teacher's sizes and scale factors, which are constants of its layers.

    Args:
        teacher: model with at least as many blocks.
        blocks: number of interaction blocks.
        seed: seed of the weights.
    """
    kept = {name: value for name, value in prune(teacher, blocks=blocks).state_dict().items() if name.endswith(SCALE)}
    torch.manual_seed(seed)
    anew = {"kept_blocks": None, "kept_force_channels": None, "depths": None}
    config = dataclasses.replace(teacher.config, blocks=blocks, **anew)
    model = JMP(config, teacher.requested_backend, teacher.precision, tasks=teacher.tasks)
    model.load_state_dict({**model.state_dict(), **kept})
    return model


def _finetuned(spec: RunSpec, inputs: Inputs) -> Outcome | None:
    """Fine-tune on one dataset, and measure the best model on the test split."""
    if spec.dataset is None:
        raise ValueError(f"{spec.name}: expected a dataset, got none")
    teacher = inputs.teacher()
    start = load(run_folder(inputs.folder, spec.needs[0]) / FINAL) if spec.needs else _student(spec, teacher)
    source = inputs.downstream(spec.dataset, teacher)
    recipe = recipe_for(spec.dataset)
    config = finetune_config(inputs.settings.budget, recipe=None if inputs.settings.demo else recipe, seed=spec.seed)
    reduction = "mean" if source.task.target == "gap" else recipe.reduction
    biases = source.task.forces is None
    model = for_finetuning(start, reduction=reduction, biases=biases, seed=spec.seed)
    model = _ready(model, config, inputs.ranks)
    objective = Supervised(model, tasks_of([source]))
    result = _trained(spec, inputs, objective, [source], config, LayerFactors())
    if result is None:
        return None
    best = _ready(load(run_folder(inputs.folder, spec.name) / FINAL), config, inputs.ranks)
    errors = evaluate(best, [source], inputs.ranks, split="test")
    return Outcome(values={"errors": errors}, config=config.to_dict(), steps=result.step)


def _trained(
    spec: RunSpec,
    inputs: Inputs,
    objective: Objective,
    sources: Sequence[TaskData],
    config: TrainConfig,
    factors: LayerFactors | None = None,
) -> Result | None:
    """Train in the run's folder from its newest checkpoint on; None: told to stop."""
    directory = run_folder(inputs.folder, spec.name)
    run = Run(
        objective=objective,
        sources=sources,
        config=config,
        directory=directory,
        ranks=inputs.ranks,
        factors=factors,
        validate_first=spec.kind == "finetune",  # else a run of its own measures the model before it is trained
        force=True,  # a study has its own look at settings and data, and says which commit made what
    )
    result = train(run, resume=None)
    return result if result.finished else None


def _ready(model: JMP, config: TrainConfig, ranks: Ranks) -> JMP:
    return model.on(precision=config.precision).to(ranks.device)


def _relevance(_: RunSpec, inputs: Inputs) -> Outcome:
    """Score the blocks on the labels of validation structures, as the paper does."""
    teacher = inputs.teacher()
    sources = inputs.mix(teacher)
    most = inputs.settings.budget.relevance_structures
    scores = survey(teacher.to(inputs.ranks.device), sources, structures=most, labels=True)
    return Outcome(values={"scores": scores}, config={"structures": most, "loss": "energies and forces on labels"})


def scalar_model(teacher: JMP) -> JMP:
    """Return the model that Table 2 is about: a teacher's backbone with one new head for a scalar, as on QMOF."""
    return for_finetuning(teacher, reduction="mean")


def _inference(_: RunSpec, inputs: Inputs) -> Outcome:
    """Time models of all numbers of blocks by turns, with one scalar head as on QMOF, and count their work."""
    teacher, budget, device = inputs.teacher(), inputs.settings.budget, inputs.ranks.device
    name = timed(inputs.settings)
    source = inputs.downstream(name, teacher)
    data = source.split("val")
    items = [data[i] for i in range(min(budget.inference_batch, len(data)))]
    full = scalar_model(teacher).to(device).eval()
    graph = make_batch(items, [0] * len(items), settings=source.task.graph, dtype=full.dtype).to(device).graph
    models = {blocks: full if blocks == BLOCKS else prune(full, blocks=blocks) for blocks in (BLOCKS, *FEWER)}
    calls = {blocks: lambda model=model: forward_pass(model, graph) for blocks, model in models.items()}
    rounds = Rounds(least=3, most=100, seconds=budget.inference_seconds)
    times = by_turns(calls, device, rounds)
    sizes, rows = graph_sizes(graph), []
    for blocks, model in models.items():
        gmacs = sum(count_macs(model.config, sizes).values()) * 1e-9 / len(items)
        rows.append(
            {
                "blocks": blocks,
                "structures_per_s": len(items) / statistics.median(times[blocks]),
                "gmacs": gmacs,
                "gflops": 2 * gmacs,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
            }
        )
    config = {"rounds": len(times[BLOCKS]), "atoms": graph.num_atoms, "precision": full.precision}
    return Outcome(values={"dataset": name, "batch": len(items), "rows": rows}, config=config)


_KINDS: Mapping[Kind, Callable[[RunSpec, Inputs], Outcome | None]] = {
    "constant": _constant,
    "evaluate": _evaluated,
    "distill": _distilled,
    "scratch": _from_scratch,
    "relevance": _relevance,
    "inference": _inference,
    "finetune": _finetuned,
}
