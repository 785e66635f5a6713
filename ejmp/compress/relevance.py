"""How much each block's output matters to a loss: Grad-CAM, or a Taylor expansion, on what the final MLP reads."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ejmp.graph.graph import AtomGraph
from ejmp.model.jmp import JMP, Output


class HasGraph(Protocol):
    """A batch of structures, with their labels or without."""

    @property
    def graph(self) -> AtomGraph:
        """The graph of the batch's structures."""
        ...


Item = TypeVar("Item", bound=AtomGraph | HasGraph)
Score = Literal["grad-cam", "taylor"]
"""What is summed of x * dL/dx: its positive part, or over channels the magnitude of the sum."""


@dataclass(frozen=True, kw_only=True)
class Relevance:
    """Scores of the output blocks, the embedding's first, then one per interaction block."""

    energy: Tensor
    """Scores of the energy branch, [blocks + 1] float64."""
    forces: Tensor | None
    """Scores of the force branch, [blocks + 1] float64; None if the model has none."""

    @property
    def combined(self) -> Tensor:
        """The mean over branches of the scores over their sum, [blocks + 1]; unscaled, the branches differ in scale."""
        branches = [self.energy] if self.forces is None else [self.energy, self.forces]
        return torch.stack([scores / scores.sum().clamp_min(1e-300) for scores in branches]).mean(0)


def magnitude(output: Output, _item: object) -> Tensor:
    """Return sum |energy| + sum |direct forces| over all heads: a loss that needs no labels."""
    total = output.energy.abs().sum()
    return total if output.forces is None else total + output.forces.abs().sum()


def block_relevance(
    model: JMP,
    graphs: Iterable[Item],
    *,
    loss: Callable[[Output, Item], Tensor] = magnitude,
    score: Score = "grad-cam",
) -> Relevance:
    """Score the output blocks of a model: the mean of ReLU(x * dL/dx) over atoms (edges) and channels.

    Source: Ghunaim et al., section 3.2, who take the loss of training on labelled data for L. The other score is the
    mean of |sum_channels x * dL/dx| over atoms (edges), the change of the loss, to first order, if the output of the
    block becomes zero there (Molchanov et al., arXiv:1611.06440, equation 8).

    Args:
        model: model to score, which is not changed; its parameters may be frozen.
        graphs: graphs or batches; scores are means over all of their atoms and edges.
        loss: returns the loss L of an output and the graph or batch it belongs to. One with labels is
            `lambda out, batch: multitask_loss(out.energy, out.forces, batch, tasks).total`. Where L is a mean over
            structures, give batches of one size, so that all structures count alike.
        score: "grad-cam" or "taylor".

    Raises:
        ValueError: if there are no graphs, or the loss or a score is not finite.
    """
    sums: list[Tensor] = []
    counts = torch.zeros(2, dtype=torch.float64)
    for i, item in enumerate(graphs):
        graph = item if isinstance(item, AtomGraph) else item.graph
        found = _batch_scores(model, graph, lambda output, item=item: loss(output, item), score)
        sums = [new + old for new, old in zip(found, sums, strict=True)] if sums else found
        counts += torch.tensor([graph.num_atoms * model.config.emb_size_atom, graph.main.num_edges])
        if not all(branch.isfinite().all() for branch in found):
            raise ValueError(f"graphs: batch {i}: the gradient of the loss is not finite")
    if not sums:
        raise ValueError("graphs: expected at least one, got none")
    counts[1] *= model.config.emb_size_edge
    means = [branch.cpu() / count.clamp_min(1) for branch, count in zip(sums, counts, strict=False)]
    return Relevance(energy=means[0], forces=means[1] if len(means) > 1 else None)


def _batch_scores(model: JMP, graph: AtomGraph, loss: Callable[[Output], Tensor], score: Score) -> list[Tensor]:
    """Return for each branch [blocks + 1] sums of ReLU(x * dL/dx), or of the magnitudes of its sums over channels."""
    with torch.enable_grad(), _embedding_takes_gradients(model):
        features = model.features(graph)
        value = loss(model.heads(features, graph))
        branches = [x for x in (features.x_E, features.x_F) if x]
        blocks = [x for branch in branches for x in branch]
        gradients = torch.autograd.grad(value, blocks, allow_unused=True)
    scores = [
        torch.zeros((), dtype=torch.float64, device=graph.device)
        if g is None
        else ((x * g).relu() if score == "grad-cam" else (x * g).sum(-1).abs()).double().sum()
        for x, g in zip(blocks, gradients, strict=True)
    ]
    return list(torch.stack(scores).detach().view(len(branches), -1))


@contextmanager
def _embedding_takes_gradients(model: JMP) -> Iterator[None]:
    """Let everything that follows from the atom embedding be differentiated, also in a model that is frozen."""
    weight = model.embedding.atom_embedding.weight
    before = weight.requires_grad
    weight.requires_grad_(True)  # noqa: FBT003 - torch's name is the explanation
    try:
        yield
    finally:
        weight.requires_grad_(before)
