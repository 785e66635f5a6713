"""What message passing needs to know of a set of edges; `ejmp.graph.EdgeSet` is one."""

from typing import Protocol

from torch import Tensor


class Edges(Protocol):
    """Directed edges sorted by target."""

    @property
    def ptr(self) -> Tensor:
        """[N + 1] int64, CSR pointers over targets."""
        ...

    @property
    def source(self) -> Tensor:
        """[E] int64."""
        ...

    @property
    def target(self) -> Tensor:
        """[E] int64, ascending."""
        ...

    @property
    def image(self) -> Tensor:
        """[E] int64, the cell offset packed into one number; images of paths are sums.

        Two edges of one target are the same image of one neighbour if source and image agree.
        """
        ...

    @property
    def vector(self) -> Tensor:
        """[E, 3], unit vectors into the target."""
        ...

    @property
    def max_degree(self) -> int:
        """K, the largest number of edges into one atom."""
        ...

    @property
    def num_edges(self) -> int:
        """E."""
        ...
