"""Every subset of a model's interaction blocks, without pruning one by one, and what else says which blocks matter."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ejmp.graph.graph import AtomGraph
from ejmp.model.jmp import JMP, Output
from ejmp.model.precision import products

Subset = tuple[int, ...]
"""Numbers of the interaction blocks that are kept, from 0, ascending."""


def all_subsets(blocks: int) -> list[Subset]:
    """Return every subset of so many blocks but the empty one, the largest first: 2^blocks - 1."""
    sizes = range(blocks, 0, -1)
    return [subset for size in sizes for subset in itertools.combinations(range(blocks), size)]


def subset_outputs(
    model: JMP, graph: AtomGraph, subsets: Iterable[Subset], *, direct_forces: bool = True
) -> Iterator[tuple[Subset, Output]]:
    """Yield what a model predicts with only some of its blocks, as `prune(model, keep=subset)` does.

    Subsets that begin with the same blocks share the passes through these: all 63 of six blocks take 63 passes
    through a block, where the pruned models take 192. Under autograd, what is yielded can be differentiated; subsets
    share parts of the graph, so keep it (retain_graph=True).

    Args:
        model: unpruned model, which is not changed.
        graph: a batch as the model takes it.
        subsets: which blocks to keep; the outputs come in another order.
        direct_forces: as for `JMP.forward`.

    Raises:
        ValueError: for a subset that is empty, not ascending, or names a block that there is not.
    """
    wanted = set(subsets)
    for subset in wanted:
        if not subset or list(subset) != sorted({*subset} & {*range(model.config.blocks)}):
            raise ValueError(f"subsets: expected blocks of 0..{model.config.blocks - 1} in order, got {subset}")
    model.check_graph(graph)
    yield from _Walk(model, graph, wanted, direct_forces=direct_forces).all()


class _Walk:
    """A walk through the tree of the subsets' beginnings.

    Args:
        model: unpruned model.
        graph: a batch.
        wanted: subsets to stop at.
        direct_forces: as for `JMP.forward`.
    """

    def __init__(self, model: JMP, graph: AtomGraph, wanted: set[Subset], *, direct_forces: bool) -> None:
        self.model, self.graph, self.wanted = model, graph, wanted
        self.beginnings = {subset[:length] for subset in wanted for length in range(1, len(subset) + 1)}
        self.forces = direct_forces and model.config.direct_forces
        self.executor = model.executor(graph)

    def all(self) -> Iterator[tuple[Subset, Output]]:
        """Yield the outputs of all wanted subsets."""
        model, backbone = self.model, self.model.backbone
        with products(model.precision), self.executor.linear_maps():
            h = model.embedding(self.graph.atomic_numbers)
            m = self.executor.embed(backbone.bases, h)
        yield from self._below((), h, m, *self._read(0, h, m))

    def _read(self, number: int, h: Tensor, m: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Return what an output block makes of the state, by its number, for each branch."""
        block = self.model.backbone.out_blocks[number]
        with products(self.model.precision), self.executor.linear_maps():
            x_E = {number: self.executor.energy(block, h, m)}
            return x_E, {number: self.executor.forces(block, m)} if self.forces else {}

    def _below(
        self, beginning: Subset, h: Tensor, m: Tensor, x_E: dict[int, Tensor], x_F: dict[int, Tensor]
    ) -> Iterator[tuple[Subset, Output]]:
        """Yield the outputs of all wanted subsets that begin in one way, of which the state is given."""
        model = self.model
        if beginning in self.wanted:
            features = model.final_mlp(self._filled(x_E), self._filled(x_F), self.graph)
            yield beginning, model.heads(features, self.graph)
        for number in range(beginning[-1] + 1 if beginning else 0, model.config.blocks):
            longer = (*beginning, number)
            if longer not in self.beginnings:
                continue
            with products(model.precision), self.executor.linear_maps():
                h_next, m_next = self.executor.block(model.backbone.int_blocks[number], h, m)
            own_E, own_F = self._read(number + 1, h_next, m_next)
            yield from self._below(longer, h_next, m_next, x_E | own_E, x_F | own_F)

    def _filled(self, x: dict[int, Tensor]) -> tuple[Tensor, ...]:
        """Return the outputs of all blocks; a missing one is zero: the first layer, without bias, ignores it."""
        return (
            tuple(x.get(number, torch.zeros_like(x[0])) for number in range(self.model.config.blocks + 1)) if x else ()
        )


@dataclass(frozen=True, kw_only=True)
class StreamChange:
    """How much each interaction block changes what passes through it, [blocks] float64, without any loss."""

    influence: Tensor
    """Block influence: 1 minus the cosine of a row before and after the block (Men et al., arXiv:2403.03853)."""
    angle: Tensor
    """Angular distance: the angle of a row before and after, over pi (Gromov et al., arXiv:2403.17887)."""


@torch.no_grad()
def stream_change(model: JMP, graphs: Iterable[AtomGraph]) -> StreamChange:
    """Measure how much each block turns the features of atoms and edges; both streams count alike.

    Args:
        model: model to measure.
        graphs: batches; all their atoms count alike, and all their edges.

    Raises:
        ValueError: if there are no graphs.
    """
    sums = torch.zeros(2, 2, model.config.blocks, dtype=torch.float64)  # stream, measure, block
    rows = torch.zeros(2, 1, 1, dtype=torch.float64)
    for graph in graphs:
        model.check_graph(graph)
        executor, backbone = model.executor(graph), model.backbone
        with products(model.precision), executor.linear_maps():
            h = model.embedding(graph.atomic_numbers)
            m = executor.embed(backbone.bases, h)
            rows += torch.tensor([len(h), len(m)]).view(2, 1, 1)
            for number, block in enumerate(backbone.int_blocks):
                before = h, m
                h, m = executor.block(block, h, m)
                for stream, (old, new) in enumerate(zip(before, (h, m), strict=True)):
                    cosine = torch.cosine_similarity(old.double(), new.double()).clamp(-1, 1)
                    sums[stream, 0, number] += (1 - cosine).sum().cpu()
                    sums[stream, 1, number] += (cosine.acos() / torch.pi).sum().cpu()
    if not rows.any():
        raise ValueError("graphs: expected at least one, got none")
    influence, angle = (sums / rows.clamp_min(1)).mean(0)
    return StreamChange(influence=influence, angle=angle)


def without_one(subset: Sequence[int]) -> list[Subset]:
    """Return the subsets that have one block less."""
    return [tuple(other for other in subset if other != block) for block in subset] if len(subset) > 1 else []
