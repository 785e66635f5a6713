"""The interface of a set of edges that the ops of message passing need; `ejmp.graph.EdgeSet` has it."""

from typing import Protocol

from torch import Tensor


class Edges(Protocol):
    """Directed edges sorted by target."""

    @property
    def ptr(self) -> Tensor:
        """CSR pointers over targets, [N + 1] int64: the edges into atom n are ptr[n] to ptr[n + 1]."""
        ...

    @property
    def source(self) -> Tensor:
        """Atom that each edge starts at, [E] int64."""
        ...

    @property
    def target(self) -> Tensor:
        """Atom that each edge ends at, [E] int64, ascending."""
        ...

    @property
    def image(self) -> Tensor:
        """Cell offset of each edge packed into one number, [E] int64; the image of a path is the sum over its edges.

        Two edges of one target are the same image of one neighbour if source and image agree.
        """
        ...

    @property
    def vector(self) -> Tensor:
        """Unit vectors from source to target, [E, 3]."""
        ...

    @property
    def max_degree(self) -> int:
        """Largest number of edges into one atom, K."""
        ...

    @property
    def num_edges(self) -> int:
        """Number of edges, E."""
        ...
