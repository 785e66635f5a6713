"""The graph as a value: frozen, batched, its edges sorted by target, every size a Python int.

Legend of letters, used in every docstring of ejmp: B structures, N atoms, E edges, K largest in-degree,
C atom channels, M edge channels, R radial functions, S spherical functions, T tasks (heads).

An edge runs from a source atom s to a target atom t. Its vector is r_t - r_s - offset . cell, so a vector points into
the target, and an atom can have several edges to periodic images of one neighbour.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from ejmp_kernels.neighbors import EdgeList

Value = TypeVar("Value", "AtomGraph", "EdgeSet")
EDGE_SETS = ("main", "atom_edges", "quad_edges", "atom_pairs")
IMAGE_BASE = 1 << 20
"""Base in which the three cell offsets of an edge are packed into one integer; beyond +-2^17 cells they are refused."""
PIECE = 1 << 16
"""Edges that are treated at once on the CPU, so that what is computed of them stays in the cache."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EdgeSet:
    """One set of directed edges sorted by target, with CSR pointers over targets.

    Within one target they are ordered by (distance rounded to 1e-6 A, source, offset).
    """

    source: Tensor
    """Atom that each edge starts from, [E] int64."""
    target: Tensor
    """Atom that each edge ends in, [E] int64, ascending."""
    offset: Tensor
    """Cells by which the source is shifted, [E, 3] int32."""
    image: Tensor
    """Offset of each edge packed into one number, [E] int64; sums of offsets are sums of images.

    Two edges into one target come from the same image of the same neighbour if source and image agree."""
    shift: Tensor
    """Vector by which the source is shifted, offset . cell, [E, 3] float64, A."""
    ptr: Tensor
    """CSR pointers, [N + 1] int64; the edges into atom i are ptr[i] .. ptr[i + 1] - 1."""
    distance: Tensor
    """Length of each edge, [E], A."""
    vector: Tensor
    """Unit vectors from source to target, [E, 3]."""
    max_degree: int
    """Largest number of edges into one atom (K)."""
    swap: Tensor | None = None
    """Counter-edge of each edge, [E] int64; main edges only."""

    @property
    def num_edges(self) -> int:
        """Number of edges (E)."""
        return self.source.shape[0]

    def __repr__(self) -> str:
        """Return sizes, type and device on one line."""
        sizes = f"E={self.num_edges}, N={len(self.ptr) - 1}, max_degree={self.max_degree}"
        return f"EdgeSet({sizes}, {_type_of(self.distance)})"


@dataclass(frozen=True, kw_only=True, eq=False)
class AtomGraph:
    """A batch of structures with its four edge sets. Make one with `build_graph` or `graph_from_edges`.

    Positions and cells are kept in float64 (subtracting images of a large cell in float32 would cost 1e-6 A);
    distances and vectors have the dtype the graph was built with, and are differentiable if positions are.
    """

    positions: Tensor
    """Positions, [N, 3] float64, A."""
    atomic_numbers: Tensor
    """Atomic numbers, [N] int64, 1..120."""
    tags: Tensor
    """Tags, [N] int64: 0 bulk, 1 surface, 2 adsorbate or molecule."""
    cell: Tensor
    """Lattice vectors as rows, [B, 3, 3] float64, A; zero where not periodic."""
    pbc: Tensor
    """Directions in which each structure is periodic, [B, 3] bool."""
    batch: Tensor
    """Structure of each atom, [N] int64."""
    ptr: Tensor
    """First atom of each structure, and the number of all atoms, [B + 1] int64."""
    main: EdgeSet
    """The edges that carry features; closed under swapping."""
    atom_edges: EdgeSet
    """Fewer, nearest neighbours for atom-to-edge and edge-to-atom messages (upstream: a2ee2a)."""
    quad_edges: EdgeSet
    """Fewest, nearest neighbours as middle edges of quadruplets (upstream: qint)."""
    atom_pairs: EdgeSet
    """All neighbours for atom-to-atom messages (upstream: a2a)."""

    @property
    def num_atoms(self) -> int:
        """Number of atoms (N)."""
        return self.positions.shape[0]

    @property
    def num_structures(self) -> int:
        """Number of structures (B)."""
        return self.cell.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of every tensor of the graph."""
        return self.positions.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of distances and vectors."""
        return self.main.distance.dtype

    def __repr__(self) -> str:
        """Return sizes, type and device on one line."""
        edges = ", ".join(f"{name} {getattr(self, name).num_edges}" for name in EDGE_SETS)
        sizes = f"B={self.num_structures}, N={self.num_atoms}, edges: {edges}"
        return f"AtomGraph({sizes}; {_type_of(self.main.distance)})"

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Return the graph on another device, or with distances and vectors of another dtype.

        Raises:
            ValueError: if the dtype is not float32 or float64.
            RuntimeError: if this machine has no such device.
        """
        device = self.device if device is None else check_device(device)
        graph = self
        if device != self.device:
            graph = _move(self, device)
        if dtype is not None and dtype != self.dtype:
            graph = graph._recomputed(graph.positions, check_dtype(dtype))  # noqa: SLF001 - of its own class
        return graph

    def with_positions(self, positions: Tensor, *, strain: Tensor | None = None) -> Self:
        """Return the graph with the same edges at other positions; distances and vectors are recomputed.

        Args:
            positions: new positions, [N, 3], A; gradients flow to them through distances and vectors.
            strain: deformation of each structure, [B, 3, 3], without a unit: positions, cells and shifts x become
                x + x . strain. Gradients flow to it too; that of an energy is the virial.

        Raises:
            ValueError: if a shape differs from what this graph needs.
        """
        if positions.shape != self.positions.shape:
            raise ValueError(f"positions: expected shape {tuple(self.positions.shape)}, got {tuple(positions.shape)}")
        if strain is not None and strain.shape != self.cell.shape:
            raise ValueError(f"strain: expected shape {tuple(self.cell.shape)}, got {tuple(strain.shape)}")
        return self._recomputed(positions.to(self.device, torch.float64), self.dtype, strain)

    def _recomputed(self, positions: Tensor, dtype: torch.dtype, strain: Tensor | None = None) -> Self:
        fields: dict[str, Any] = {"positions": positions}
        if strain is not None:
            strain = strain.to(self.device, torch.float64)
            fields["positions"] = positions = _strained(positions, strain[self.batch])
            fields["cell"] = self.cell + self.cell @ strain
        for name in EDGE_SETS:
            edges: EdgeSet = getattr(self, name)
            shift = edges.shift if strain is None else _strained(edges.shift, strain[self.batch[edges.target]])
            distance, vector = edge_geometry(positions, edges.source, edges.target, shift)
            moved = {"shift": shift, "distance": distance.to(dtype), "vector": vector.to(dtype)}
            fields[name] = dataclasses.replace(edges, **moved)
        return dataclasses.replace(self, **fields)


def _strained(rows: Tensor, strain: Tensor) -> Tensor:
    """Deform row vectors [n, 3] by a strain each, [n, 3, 3]."""
    return rows + (rows[:, None] @ strain)[:, 0]


def _move(value: Value, device: torch.device) -> Value:
    moved = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if isinstance(item, EdgeSet):
            moved[field.name] = _move(item, device)
        elif isinstance(item, Tensor):
            moved[field.name] = item.to(device)
    return dataclasses.replace(value, **moved)


def _type_of(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}, {value.device}"


def check_device(device: torch.device | str) -> torch.device:
    """Return the device after checking that tensors can be there.

    Raises:
        RuntimeError: if it is a GPU, and torch finds none.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f'device: expected one of this machine, got "{device}", but torch finds no GPU; use "cpu"')
    return device


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype after checking that distances can have it.

    Raises:
        ValueError: if it is not float32 or float64.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    return dtype


def edge_geometry(positions: Tensor, source: Tensor, target: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lengths [E] in A and the unit vectors [E, 3] from source to target.

    Args:
        positions: positions, [N, 3], A.
        source: atom that each edge starts from, [E].
        target: atom that each edge ends in, [E].
        shift: vector by which the source is shifted, [E, 3], A.
    """
    vector = positions.index_select(0, target) - positions.index_select(0, source) - shift
    distance = torch.linalg.vector_norm(vector, dim=-1)
    return distance, vector / distance.unsqueeze(-1)


def edge_shift(offset: Tensor, cell: Tensor, edges_per_structure: Tensor) -> Tensor:
    """Return the shifts offset . cell, [E, 3] float64 in A, of edges that are ordered by structure.

    Args:
        offset: cells by which the source is shifted, [E, 3].
        cell: lattice vectors as rows, [B, 3, 3] float64, A.
        edges_per_structure: number of edges of each structure, [B].
    """
    if len(cell) == 1:
        return offset.to(cell.dtype) @ cell[0]
    parts = offset.split(edges_per_structure.tolist())
    return torch.cat([part.to(cell.dtype) @ c for part, c in zip(parts, cell, strict=True)])


def pack_offset(offset: Tensor) -> Tensor:
    """Pack cell offsets [E, 3] into one int64 each, so that sums of offsets become sums of images.

    Raises:
        ValueError: if an offset is beyond +-2^17 cells (positions absurdly far outside their cell).
    """
    limit = IMAGE_BASE >> 3
    if offset.numel() and offset.abs().max().item() > limit:
        raise ValueError(f"offset: an image more than {limit} cells away; wrap the structure first")
    x, y, z = offset.long().unbind(1)
    return (x * IMAGE_BASE + y) * IMAGE_BASE + z


def make_edge_set(
    positions: Tensor, found: EdgeList, cell: Tensor, atom_ptr: Tensor, dtype: torch.dtype, swap: Tensor | None = None
) -> EdgeSet:
    """Complete a CSR edge list with targets, images, shifts, distances and vectors.

    On the CPU, edges are treated in pieces that stay in the cache.
    """
    degree, num_edges = found.ptr.diff(), len(found.source)
    target = torch.repeat_interleave(torch.arange(len(degree), device=degree.device), degree, output_size=num_edges)
    shift = edge_shift(found.offset, cell, found.ptr[atom_ptr].diff())
    columns = (found.source, target, shift)
    if positions.device.type != "cpu" or positions.requires_grad or num_edges <= PIECE:
        image = pack_offset(found.offset)
        distance, vector = (x.to(dtype) for x in edge_geometry(positions, *columns))
    else:
        image = torch.cat([pack_offset(rows) for rows in found.offset.split(PIECE)])
        pieces = [edge_geometry(positions, *rows) for rows in zip(*(c.split(PIECE) for c in columns), strict=True)]
        distance, vector = (torch.cat([x.to(dtype) for x in column]) for column in zip(*pieces, strict=True))
    return EdgeSet(
        source=found.source,
        target=target,
        offset=found.offset,
        image=image,
        shift=shift,
        ptr=found.ptr,
        distance=distance,
        vector=vector,
        max_degree=int(degree.max()),
        swap=swap,
    )
