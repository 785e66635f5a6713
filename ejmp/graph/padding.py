"""Graphs of few shapes: pad a batch with atoms and edges that change no result, up to the next size of a ladder.

Compiled code and CUDA graphs are made for one shape each. A padded graph has additional structures, atoms and edges at
the end; real rows come first and stay as they are. The additional atoms sit in cells so large that their edges, from an
atom to its own periodic images, are longer than any cutoff: every radial basis is zero there. Nothing waits for the
device.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ejmp.graph.graph import EDGE_SETS, IMAGE_BASE, AtomGraph, EdgeSet, edge_geometry

SPACING = 1_000.0
"""Distance between an additional atom and its images, A: the largest cutoff of `build_graph`."""
_ROUND_ATOMS, _ROUND_EDGES, _ROUND_DEGREE = 8, 64, 4
"""Sizes of new shapes are multiples of these: matrix products in low precision are fast at multiples of 8."""


@dataclass(frozen=True, kw_only=True, order=True)
class GraphShape:
    """Every size of a padded graph. Make one with `holding`, which leaves room for the additional rows."""

    main: int
    """Number of main edges; even, because they come with their counter-edges."""
    atom_edges: int
    """Number of atom edges."""
    quad_edges: int
    """Number of quad edges."""
    atom_pairs: int
    """Number of atom pairs."""
    main_degree: int
    """Largest number of main edges into one atom."""
    atom_edges_degree: int
    """Largest number of atom edges into one atom."""
    quad_edges_degree: int
    """Largest number of quad edges into one atom."""
    atom_pairs_degree: int
    """Largest number of atom pairs into one atom."""
    num_atoms: int
    """Number of atoms."""
    num_structures: int
    """Number of structures."""

    @classmethod
    def of(cls, graph: AtomGraph) -> Self:
        """Return the shape that a graph has."""
        sets = {name: getattr(graph, name) for name in EDGE_SETS}
        return cls(
            num_atoms=graph.num_atoms,
            num_structures=graph.num_structures,
            **{name: edges.num_edges for name, edges in sets.items()},
            **{f"{name}_degree": edges.max_degree for name, edges in sets.items()},
        )

    @classmethod
    def holding(cls, largest: Self, growth: float = 1.0) -> Self:
        """Return a shape that holds every graph no size of which is larger than that of `largest` times `growth`.

        Additional edges need additional atoms, because in-degrees are bounded: E / K of them are always enough, and
        cost little beside the edges.

        Args:
            largest: a shape without room for additional rows.
            growth: factor for atoms and edges. In-degrees are only rounded up, and one structure is added.
        """
        num_atoms = _round_up(growth * largest.num_atoms, _ROUND_ATOMS)
        sizes, atoms_needed = {}, 1
        for name in EDGE_SETS:
            size, degree = largest.edges(name)
            sizes[name] = _round_up(growth * size, _ROUND_EDGES)
            sizes[f"{name}_degree"] = degree = _round_up(degree, _ROUND_DEGREE)
            if size:
                atoms_needed = max(atoms_needed, math.ceil(sizes[name] / degree))
        num_structures = largest.num_structures + 1
        atoms_needed = _round_up(max(atoms_needed, num_structures), _ROUND_ATOMS)
        return cls(num_atoms=num_atoms + atoms_needed, num_structures=num_structures, **sizes)

    def edges(self, name: str) -> tuple[int, int]:
        """Return the number of edges and the largest in-degree of an edge set, by its name."""
        return getattr(self, name), getattr(self, f"{name}_degree")

    def misfit(self, graph: AtomGraph) -> str | None:
        """Return why a graph cannot be padded to this shape, or None if it can."""
        atoms, structures = self.num_atoms - graph.num_atoms, self.num_structures - graph.num_structures
        if structures < 1 or atoms < structures:
            return (
                f"{graph.num_structures} structures with {graph.num_atoms} atoms, and at least one of each more, "
                f"in {self.num_structures} with {self.num_atoms}"
            )
        for name in EDGE_SETS:
            edges: EdgeSet = getattr(graph, name)
            size, degree = self.edges(name)
            missing = size - edges.num_edges
            if edges.max_degree > degree or missing < 0:
                return f"{name}: {edges.num_edges} edges, at most {edges.max_degree} per atom, in {size}, {degree}"
            if name == "main" and missing % 2:
                return f"main: {missing} additional edges, which come in pairs"
            step = 2 if name == "main" else 1
            if missing and math.ceil(missing / step / atoms) > degree // step:
                return f"{name}: {missing} additional edges, at most {degree} per atom, on {atoms} additional atoms"
        return None


def _round_up(number: float, step: int) -> int:
    return math.ceil(number / step) * step


class Buckets:
    """The shapes that graphs are padded to, smallest first; a graph gets the first that holds it.

    Args:
        shapes: shapes to begin with.
        growth: None allows no new shapes: a graph that fits in none is an error then. Otherwise such a graph gets a new
            shape that is `growth` times as large as the graph, and so does a graph for which the smallest shape that
            holds it has more than `growth` squared as many main edges as the new one.
    """

    def __init__(self, shapes: Iterable[GraphShape] = (), growth: float | None = 1.2) -> None:
        if growth is not None and not growth >= 1:
            raise ValueError(f"growth: expected at least 1, or None, got {growth!r}")
        self.shapes = sorted(shapes)
        self.growth = growth

    @classmethod
    def from_graphs(cls, graphs: Sequence[AtomGraph], growth: float = 1.2, room: float = 1.05) -> Self:
        """Return a fixed ladder for graphs like the given ones.

        Args:
            graphs: a sample of the graphs.
            growth: factor from one rung of the ladder to the next, in main edges.
            room: factor by which a shape is larger than the largest graph of its rung, for graphs outside the sample.

        Raises:
            ValueError: if there is no graph.
        """
        if not graphs:
            raise ValueError("graphs: expected at least one")
        rungs: dict[int, list[GraphShape]] = {}
        for graph in graphs:
            shape = GraphShape.of(graph)
            rungs.setdefault(round(math.log(max(shape.main, 1)) / math.log(max(growth, 1.01))), []).append(shape)
        largest, shapes = [], []
        for _, rung in sorted(rungs.items()):
            largest += rung  # what is smaller fits too, also where it has more atoms or pairs
            shapes.append(GraphShape.holding(_largest(largest), room))
        return cls(shapes, growth=None)

    @classmethod
    def ladder(
        cls,
        num_atoms: Sequence[int],
        num_structures: int = 1,
        max_neighbors: int = 30,
        pairs_per_atom: int = 400,
    ) -> Self:
        """Return a fixed ladder from settings, for batches of which there is no sample.

        Args:
            num_atoms: most atoms of a batch, for each rung of the ladder.
            num_structures: number of structures in a batch.
            max_neighbors: setting of the graphs. Atoms are expected to have that many main edges on average, and no
                atom more than twice as many.
            pairs_per_atom: most pairs of an atom within the cutoff.
        """
        shapes = []
        for n in num_atoms:
            near, quad = max_neighbors * 20 // 30, max_neighbors * 8 // 30
            largest = GraphShape(
                num_atoms=n,
                num_structures=num_structures,
                main=n * max_neighbors,
                atom_edges=n * near,
                quad_edges=n * quad,
                atom_pairs=n * pairs_per_atom,
                main_degree=2 * max_neighbors,
                atom_edges_degree=near,
                quad_edges_degree=quad,
                atom_pairs_degree=pairs_per_atom,
            )
            shapes.append(GraphShape.holding(largest))
        return cls(shapes, growth=None)

    def choose(self, graph: AtomGraph) -> GraphShape:
        """Return the shape to pad a graph to; it may be a new one.

        Raises:
            ValueError: if the graph fits in none and there are no new ones.
        """
        fitting = next((shape for shape in self.shapes if shape.misfit(graph) is None), None)
        unpadded = GraphShape.of(graph)
        if self.growth is None:
            if fitting is None:
                reason = self.shapes[-1].misfit(graph) if self.shapes else "there is none"
                raise ValueError(f"graph: expected one that fits in a shape of these buckets, got {unpadded}; {reason}")
            return fitting
        wanted = GraphShape.holding(unpadded, self.growth)
        if fitting is None or fitting.main > wanted.main * self.growth**2:
            self.shapes = sorted([*self.shapes, wanted])
            return wanted
        return fitting


def _largest(shapes: Sequence[GraphShape]) -> GraphShape:
    names = [field.name for field in dataclasses.fields(GraphShape)]
    return GraphShape(**{name: max(getattr(shape, name) for shape in shapes) for name in names})


def pad_graph(graph: AtomGraph, shape: GraphShape) -> AtomGraph:
    """Append structures, atoms and edges to a graph until it has the given shape.

    Results for the real structures, atoms and edges, the first ones, stay the same to rounding, as do gradients with
    respect to the positions. Additional atoms are hydrogen; each additional structure has at least one.

    Args:
        graph: the graph to pad.
        shape: the shape of the result.

    Raises:
        ValueError: if the graph does not fit, with the reason.
    """
    reason = shape.misfit(graph)
    if reason is not None:
        raise ValueError(f"shape: expected one that holds the graph and something more, got {reason}")
    num_atoms, device = shape.num_atoms - graph.num_atoms, graph.device
    num_structures = shape.num_structures - graph.num_structures
    batch = torch.arange(num_atoms, device=device).clamp(max=num_structures - 1) + graph.num_structures
    ends = torch.arange(1, num_structures + 1, device=device) + graph.num_atoms
    ends[-1:] += num_atoms - num_structures
    # All are at the origin of cells of their own, so there is no edge between them.
    positions = torch.cat([graph.positions, graph.positions.new_zeros(num_atoms, 3)])
    cell = SPACING * torch.eye(3, dtype=torch.float64, device=device)
    return AtomGraph(
        positions=positions,
        atomic_numbers=_extended(graph.atomic_numbers, 1, num_atoms),
        tags=_extended(graph.tags, 2, num_atoms),
        cell=torch.cat([graph.cell, cell.expand(num_structures, 3, 3)]),
        pbc=torch.cat([graph.pbc, graph.pbc.new_ones(num_structures, 3)]),
        batch=torch.cat([graph.batch, batch]),
        ptr=torch.cat([graph.ptr, ends]),
        **{name: _pad_edges(getattr(graph, name), *shape.edges(name), positions) for name in EDGE_SETS},
    )


def _extended(x: Tensor, value: int, num: int) -> Tensor:
    return torch.cat([x, x.new_full((num,), value)])


def _pad_edges(edges: EdgeSet, num_edges: int, max_degree: int, positions: Tensor) -> EdgeSet:
    """Add edges from the last atoms to their own images, as evenly as possible."""
    missing, first = num_edges - edges.num_edges, len(edges.ptr) - 1
    num_atoms, device = len(positions) - first, positions.device
    step = 1 if edges.swap is None else 2  # edge and counter-edge are neighbours
    every, rest = divmod(missing // step, num_atoms)
    atoms = torch.arange(num_atoms, device=device)
    ends = (atoms + 1) * (every * step) + (atoms + 1).clamp(max=rest) * step
    degree = every * step + (atoms < rest) * step
    local = torch.repeat_interleave(atoms, degree, output_size=missing)
    rows = torch.arange(missing, device=device)
    nth = rows - (ends - degree).index_select(0, local)
    offset = _offsets(nth, (every + 1) * step)
    target = first + local
    shift = SPACING * offset.double()
    distance, vector = edge_geometry(positions, target, target, shift)
    x, y, z = offset.unbind(1)
    return EdgeSet(
        source=torch.cat([edges.source, target]),
        target=torch.cat([edges.target, target]),
        offset=torch.cat([edges.offset, offset.int()]),
        image=torch.cat([edges.image, (x * IMAGE_BASE + y) * IMAGE_BASE + z]),
        shift=torch.cat([edges.shift, shift]),
        ptr=torch.cat([edges.ptr, ends + edges.num_edges]),
        distance=torch.cat([edges.distance, distance.to(edges.distance.dtype)]),
        vector=torch.cat([edges.vector, vector.to(edges.vector.dtype)]),
        max_degree=max_degree,
        swap=None if edges.swap is None else torch.cat([edges.swap, edges.num_edges + (rows ^ 1)]),
    )


def _offsets(nth: Tensor, num: int) -> Tensor:
    """Return the cell offsets of the first, second, ... image, [E, 3] int64: v0, -v0, v1, -v1, ... in all directions.

    Args:
        nth: number of the image, [E], less than `num`.
        num: number of images that an atom needs.
    """
    reach = 1
    while (2 * reach + 1) ** 3 <= num:
        reach += 1
    side = 2 * reach + 1
    number = side**3 // 2 + 1 + nth // 2  # numbers in base `side` whose digits are offset + reach; the middle is zero
    offset = torch.stack([number // side**2, number // side % side, number % side], dim=1) - reach
    return offset * (1 - 2 * (nth % 2))[:, None]
