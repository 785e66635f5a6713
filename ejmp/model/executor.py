"""What an executor is: the steps of a forward pass on one graph, whoever computes them."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ejmp.graph.graph import AtomGraph
from ejmp.model.bases import Bases
from ejmp.model.interactions import InteractionBlock, OutputBlock
from ejmp.model.layers import FinalMLP


class Executor(ABC):
    """The steps of a forward pass on one graph.

    `ReferenceExecutor` takes them in plain torch, `FusedExecutor` on the kernels; both read the same parameters and
    agree to rounding. `embed` comes before the blocks; `final_mlp`, `head` and `sum_by_target` stand alone.

    Args:
        graph: a batch.
        low: the 16-bit type of the linear maps in embedding, blocks and final MLP; None for the parameters' own.
    """

    def __init__(self, graph: AtomGraph, low: torch.dtype | None) -> None:
        self.graph = graph
        self.low = low

    @abstractmethod
    def linear_maps(self) -> AbstractContextManager[object]:
        """Return the context in which the linear maps are computed in the low type."""

    @abstractmethod
    def embed(self, bases: Bases, h: Tensor) -> Tensor:
        """Evaluate what all blocks read of the graph, and return the first edge features, [N, C] to [E, M]."""

    @abstractmethod
    def block(self, block: InteractionBlock, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Update atoms [N, C] and edges [E, M] by one interaction block."""

    @abstractmethod
    def energy(self, block: OutputBlock, h: Tensor, m: Tensor) -> Tensor:
        """Read out atoms and edges into what the energy branch of the final MLP takes, x_E [N, C]."""

    @abstractmethod
    def forces(self, block: OutputBlock, m: Tensor) -> Tensor:
        """Read out edges into what the force branch of the final MLP takes, x_F [E, M]."""

    @abstractmethod
    def final_mlp(self, mlp: FinalMLP, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Join the outputs of all blocks, blocks + 1 tensors [., size], and return what each layer makes of them."""

    @abstractmethod
    def head(self, layers: nn.Sequential, x: Tensor) -> Tensor:
        """Apply a head to the last output of the final MLP in the parameters' type, [., size] to [., 1]."""

    @abstractmethod
    def sum_by_target(self, x: Tensor, target: Tensor, ptr: Tensor) -> Tensor:
        """Sum rows that are sorted by target, [E, ...] to [N, ...]; ptr are the CSR pointers of the same targets."""
