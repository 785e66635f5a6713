"""Which blocks to keep: errors of subsets of a model's blocks on data, and how well cheaper scores foretell them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ejmp.compress.pruning import prune
from ejmp.compress.relevance import Score, block_relevance
from ejmp.compress.subsets import Subset, all_subsets, stream_change, subset_outputs, without_one
from ejmp.data import InOrder
from ejmp.data.sampling.batch import Batch
from ejmp.graph.graph import AtomGraph
from ejmp.markdown import markdown_table
from ejmp.model.jmp import JMP, Output
from ejmp.train.evaluate import Errors
from ejmp.train.loss import multitask_loss
from ejmp.train.metrics import Maes
from ejmp.train.sources import TaskData, at_most, graphs_of, loader_of, tasks_of

EXHAUSTIVE = 8
"""With more blocks than this, not all subsets are tried: each size leaves out one more block of the best one before."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found out."""

    ratios: dict[Subset, float]
    """Error of each subset that was tried over that of the whole model, as `ratio` says."""
    refitted: dict[Subset, float]
    """Such errors after the final MLP was refitted, of the subsets for which it was asked."""
    scores: dict[str, list[float]]
    """Scores of the interaction blocks by name, more for those that matter more; "removal" is the truth: the error of
    the model without this block."""

    def best(self, size: int) -> tuple[Subset, float]:
        """Return the subset of a size with the smallest error, and that error over the whole model's."""
        return _ranked(self.ratios, size)[0]


def _ranked(ratios: Mapping[Subset, float], size: int) -> list[tuple[Subset, float]]:
    """Return the subsets of a size with their errors, the smallest first."""
    return sorted((pair for pair in ratios.items() if len(pair[0]) == size), key=lambda pair: pair[1])


def ratio(errors: Errors, whole: Errors) -> float:
    """Return the geometric mean over datasets of an error over the whole model's: of forces, or of the target."""
    logs = []
    for name, row in whole.items():
        kind = "forces_meV_per_A" if "forces_meV_per_A" in row else next(iter(row))
        logs.append(math.log(errors[name][kind] / row[kind]))
    return math.exp(math.fsum(logs) / len(logs))


def search(
    model: JMP,
    sources: Sequence[TaskData],
    *,
    structures: int = 64,
    refit: int = 0,
    refit_structures: int = 1000,
    report: Callable[[str], None] = lambda _line: None,
) -> Found:
    """Try subsets of a model's interaction blocks on validation structures of each source.

    Up to eight blocks, all subsets are tried; of more, each size tries those of the best subset of the size before
    without one of its blocks.

    Args:
        model: unpruned model, which is not changed.
        sources: datasets with splits "val" and, to refit, "train", and the model's tasks.
        structures: largest number of validation structures of each.
        refit: number of the best subsets of each size whose final MLP is refitted (`ejmp.compress.refit`) and that are
            then compared again.
        refit_structures: number of training structures to refit on.
        report: called with a line about what is happening.

    Raises:
        ValueError: if a source has no labels of its task.
    """
    batches = _Batches(model, sources, structures)
    blocks = model.config.blocks
    ratios: dict[Subset, float] = {}
    if blocks <= EXHAUSTIVE:
        ratios |= _ratios(model, batches, all_subsets(blocks))
    else:
        best = tuple(range(blocks))
        while best:
            found = _ratios(model, batches, without_one(best))
            ratios |= found
            report(f"{len(best) - 1} of {blocks} blocks: {len(found)} subsets tried")
            best = min(found, key=lambda subset: found[subset]) if found else ()
    report(f"{len(ratios)} subsets tried on {batches.count} structures")
    refitted = {}
    for size in range(blocks - 1, 0, -1):
        for subset, sliced in _ranked(ratios, size)[:refit]:
            graphs = graphs_of(model, sources, refit_structures)
            small = prune(model, keep=subset, final_mlp="refit", data=graphs)
            (refitted[subset],) = _ratios(small, batches, [tuple(range(size))]).values()
            report(f"{name_of(subset)} refitted: x {sliced:.3f} -> {refitted[subset]:.3f}")
    return Found(ratios=ratios, refitted=refitted, scores=_scores(model, batches, ratios))


class _Batches:
    """Validation batches of some sources, as often as they are asked for, and the whole model's errors on them."""

    def __init__(self, model: JMP, sources: Sequence[TaskData], structures: int) -> None:
        self.sources = [at_most(source, "val", structures) for source in sources]
        self.tasks = tasks_of(self.sources)
        self.model = model
        self.count = sum(len(source.split("val")) for source in self.sources)
        every = tuple(range(model.config.blocks))
        self.whole = _errors(model, self, [every])[every]
        for source in self.sources:
            if not self.whole[source.name]:
                raise ValueError(f"{source.name}: expected structures with labels of its task, found none")

    def __iter__(self) -> Iterator[Batch]:
        sizes = [len(source.split("val")) for source in self.sources]
        sampler = InOrder(sizes=sizes, batch_size=16)
        return loader_of(self.sources, "val", sampler, dtype=self.model.dtype, device=self.model.device).batches()

    @property
    def graphs(self) -> Iterator[AtomGraph]:
        """The batches' graphs."""
        return (batch.graph for batch in self)


def _errors(model: JMP, batches: _Batches, subsets: Sequence[Subset]) -> dict[Subset, Errors]:
    """Return the errors of some subsets of a model's blocks."""
    tasks = batches.tasks
    maes = {subset: Maes(tasks, model.device) for subset in subsets}
    kinds = {task.forces for task in tasks} - {None}
    training = model.training
    model.eval()
    for batch in batches:
        graph = batch.graph
        if kinds == {"gradient"}:
            graph = graph.with_positions(graph.positions.detach().requires_grad_())
        with torch.set_grad_enabled(kinds == {"gradient"}):
            for subset, output in subset_outputs(model, graph, subsets, direct_forces=kinds == {"direct"}):
                forces = output.forces
                if kinds == {"gradient"}:
                    total = tasks.own_energy(output.energy, batch).sum()
                    forces = -torch.autograd.grad(total, graph.positions, retain_graph=True)[0].to(model.dtype)
                maes[subset].update(output.energy, forces, batch)
    model.train(training)
    return {subset: found.result() for subset, found in maes.items()}


def _ratios(model: JMP, batches: _Batches, subsets: Sequence[Subset]) -> dict[Subset, float]:
    return {subset: ratio(errors, batches.whole) for subset, errors in _errors(model, batches, subsets).items()}


def _scores(model: JMP, batches: _Batches, ratios: Mapping[Subset, float]) -> dict[str, list[float]]:
    """Return the scores of single blocks."""
    if model.config.blocks < 2:
        return {}
    every = tuple(range(model.config.blocks))
    scores = {"removal": [ratios[tuple(other for other in every if other != block)] for block in every]}

    def on_labels(output: Output, batch: Batch) -> torch.Tensor:
        return multitask_loss(output.energy, output.forces, batch, batches.tasks).total

    kinds: tuple[Score, ...] = ("grad-cam", "taylor")
    for kind in kinds:
        scores[kind] = block_relevance(model, batches, loss=on_labels, score=kind).combined[1:].tolist()
    change = stream_change(model, batches.graphs)
    return scores | {"block influence": change.influence.tolist(), "angular distance": change.angle.tolist()}


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rank correlation of two lists, without ties taken apart; NaN for fewer than two values."""
    ranks = [torch.tensor(values, dtype=torch.float64).argsort().argsort().double() for values in (x, y)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1]) if len(x) > 1 else math.nan


def name_of(subset: Subset) -> str:
    """Return a subset as `ejmp prune --keep` takes it."""
    return ",".join(map(str, subset))


def to_json(found: Found) -> dict[str, Any]:
    """Return what was found, ready for JSON, with subsets as `name_of` writes them."""
    parts = {"ratios": found.ratios, "refitted": found.refitted}
    return {key: {name_of(subset): x for subset, x in part.items()} for key, part in parts.items()} | {
        "scores": found.scores
    }


def from_json(content: Mapping[str, Any]) -> Found:
    """Return what `to_json` gave back as it was."""
    ratios, refitted = (
        {tuple(map(int, name.split(","))): float(x) for name, x in content[key].items()}
        for key in ("ratios", "refitted")
    )
    return Found(ratios=ratios, refitted=refitted, scores=content["scores"])


def text_of(found: Found) -> str:
    """Return two Markdown tables: the best subset of each size, and the scores of the blocks."""
    rows = []
    for size in sorted({len(subset) for subset in found.ratios}, reverse=True):
        best, value = found.best(size)
        first = found.ratios.get(tuple(range(size)))
        cells = [str(size), name_of(best), f"{value:.3f}", "-" if first is None else f"{first:.3f}"]
        if found.refitted:
            again = _ranked(found.refitted, size)
            cells += [name_of(again[0][0]), f"{again[0][1]:.3f}"] if again else ["-", "-"]
        rows.append(cells)
    titles = ["blocks", "best to keep", "error", "error of the first ones"]
    titles += ["best to keep, refitted", "error, refitted"] if found.refitted else []
    text = f"Errors are those of the whole model times:\n\n{markdown_table(titles, rows, numbers=True)}\n"
    if not found.scores:
        return text
    truth = found.scores["removal"]
    rows = [
        [name, *(f"{value:.4g}" for value in values), f"{rank_correlation(values, truth):.2f}"]
        for name, values in found.scores.items()
    ]
    titles = ["score", *(f"block {number}" for number in range(len(truth))), "rank correlation with removal"]
    return f"{text}\n{markdown_table(titles, rows, numbers=True)}\n"
