"""Graphs from PyTorch Geometric's `Data` and `Batch`, and back.

Conventions of the edges, which are those of PyG and of OCP's `cell_offsets`: row 0 of an index is the source s (PyG's
j), row 1 the target t (PyG's i), into which messages flow. An edge's vector points into its target,
pos[t] - pos[s] - offset . cell: the source is shifted by the offset. (ASE's `neighbor_list("ijS")` means the same with
i = t, j = s and S = offset.)

| set of `AtomGraph` | attributes of `Data` |
| --- | --- |
| main | edge_index [2, E], edge_offset [E, 3] int32, edge_distance [E] A, edge_vector [E, 3] unit vectors |
| atom_edges | atom_edges_index, atom_edges_offset, atom_edges_distance, atom_edges_vector |
| quad_edges | quad_edges_index, quad_edges_offset, quad_edges_distance, quad_edges_vector |
| atom_pairs | atom_pairs_index, atom_pairs_offset, atom_pairs_distance, atom_pairs_vector |

Atoms have z [N], pos [N, 3] (A), tags [N]; structures cell [B, 3, 3] (A) and pbc [B, 3].
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ejmp.graph.build import build_graph, graph_from_edges
from ejmp.graph.graph import EDGE_SETS, AtomGraph
from ejmp.graph.settings import GraphSettings
from ejmp.graph.structure import Structure

PREFIX = {name: "edge" if name == "main" else name for name in EDGE_SETS}
"""What the attributes of an edge set begin with."""


def from_data(
    data: Any,
    settings: GraphSettings | Sequence[GraphSettings] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> AtomGraph:
    """Make a graph of a PyG `Data`, `Batch`, or a list of `Data`.

    If all of it has the four edge sets that `to_data` writes, the graph has exactly those; otherwise they are searched
    for, and edges that it may have are not looked at.

    Args:
        data: atoms as `z` or `atomic_numbers` [N] and `pos` [N, 3] in A; optionally `cell` [B, 3, 3] in A, `pbc`
            [B, 3] (or [3], or one bool) and `tags` [N]. With a cell and without pbc, every direction that has a lattice
            vector is periodic, as in OCP's data.
        settings: how edges are searched for, one or one per structure; None: as `GraphSettings()` says.
        device: device of the graph; None: the data's.
        dtype: type of distances and vectors; None: that of the edges it has, or else float32.

    Raises:
        ValueError: naming the field, for what `build_graph` and `graph_from_edges` refuse, for data without atoms'
            numbers or positions, and for a batch whose atoms are not in the order of their structures.
    """
    items = list(data) if isinstance(data, list | tuple) else [data]
    listed = [structure for item in items for structure in to_structures(item)]
    carried = [
        all(_has(item, f"{p}_{kind}") for p in PREFIX.values() for kind in ("index", "offset")) for item in items
    ]
    where: Any = items[0].pos.device if device is None else device
    known = getattr(items[0], "edge_distance", None) if all(carried) else None
    kind: Any = dtype or (torch.float32 if known is None else known.dtype)
    if not all(carried):
        return build_graph(listed, settings=settings or GraphSettings(), device=where, dtype=kind)
    first, edges = 0, {name: ([], []) for name in EDGE_SETS}
    for item in items:
        for name, (index, offset) in edges.items():
            index.append(item[f"{PREFIX[name]}_index"] + first)
            offset.append(item[f"{PREFIX[name]}_offset"])
        first += len(item.pos)
    joined = {name: (torch.cat(index, 1), torch.cat(offset)) for name, (index, offset) in edges.items()}
    return graph_from_edges(listed, joined, device=where, dtype=kind)


def to_data(graph: AtomGraph) -> Any:
    """Return a graph as a PyG `Batch`, with all four edge sets, whose `to_data_list()` gives the structures alone.

    `from_data` makes the same graph of it, bit for bit. Positions and cells are in float64.

    Raises:
        ImportError: if torch_geometric is not installed.
    """
    package = import_pyg()
    items, ptr = [], graph.ptr.tolist()
    edge_ptr = {name: getattr(graph, name).ptr.tolist() for name in EDGE_SETS}
    for b, (first, last) in enumerate(pairwise(ptr)):
        atoms = slice(first, last)
        fields = {"z": graph.atomic_numbers[atoms], "pos": graph.positions[atoms], "tags": graph.tags[atoms]}
        fields |= {"cell": graph.cell[b : b + 1], "pbc": graph.pbc[b : b + 1]}
        for name, prefix in PREFIX.items():
            edges, rows = getattr(graph, name), slice(edge_ptr[name][first], edge_ptr[name][last])
            fields[f"{prefix}_index"] = torch.stack([edges.source[rows], edges.target[rows]]) - first
            fields |= {f"{prefix}_{kind}": getattr(edges, kind)[rows] for kind in ("offset", "distance", "vector")}
        items.append(package.data.Data(**fields))
    return package.data.Batch.from_data_list(items)


def import_pyg() -> Any:
    """Import torch_geometric.

    Raises:
        ImportError: saying what brings it.
    """
    try:
        import torch_geometric.data  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("torch_geometric is missing: pip install ejmp[pyg] brings it") from error
    return torch_geometric


def to_structures(data: Any) -> list[Structure]:
    """Return the structures of a `Data` or `Batch`, without labels.

    Raises:
        ValueError: naming the field that is missing or has the wrong shape.
    """
    name = next((name for name in ("z", "atomic_numbers") if _has(data, name)), None)
    if name is None or not _has(data, "pos"):
        raise ValueError(f"data: expected z or atomic_numbers, and pos, got {_describe(data)}")
    numbers, num_atoms = data[name].flatten(), len(data.pos)
    if len(numbers) != num_atoms or not torch.equal(numbers, numbers.round()):
        raise ValueError(f"data: {name}: expected {num_atoms} whole numbers, got {numbers.dtype} {list(numbers.shape)}")
    sizes = _sizes(data, num_atoms)
    cells, pbc = _periodicity(data, len(sizes))
    tags = data.tags.long().split(sizes) if _has(data, "tags") else [None] * len(sizes)
    return [
        Structure(numbers=z, positions=pos, cell=cell, pbc=periodic, tags=tag)
        for z, pos, cell, periodic, tag in zip(
            numbers.long().split(sizes), data.pos.split(sizes), cells, pbc, tags, strict=True
        )
    ]


def _periodicity(data: Any, num: int) -> tuple[Sequence[Tensor | None], Sequence[Tensor | bool]]:
    """Return the cell and the periodic directions of each structure."""
    if not _has(data, "cell"):
        return [None] * num, [False] * num
    cells: Tensor = data.cell
    if cells.shape not in ((num, 3, 3), (3 * num, 3)):
        raise ValueError(f"data: cell: expected [{num}, 3, 3], got {list(cells.shape)}")
    cells = cells.reshape(num, 3, 3)
    if not _has(data, "pbc"):
        return list(cells), list((cells != 0).any(2))
    pbc = torch.as_tensor(data.pbc)
    if pbc.numel() not in (num, 3 * num):
        raise ValueError(f"data: pbc: expected [{num}, 3] or [{num}], got {list(pbc.shape)}")
    return list(cells), list(pbc.reshape(num, -1).expand(num, 3))


def _has(data: Any, name: str) -> bool:
    return getattr(data, name, None) is not None


def _describe(data: Any) -> str:
    return f"{type(data).__name__} with {', '.join(data.keys())}" if hasattr(data, "keys") else type(data).__name__


def _sizes(data: Any, num_atoms: int) -> list[int]:
    """Return the number of atoms of each structure."""
    if not _has(data, "batch"):
        return [num_atoms]
    batch: Tensor = data.batch
    if len(batch) != num_atoms or (batch.diff() < 0).any():
        raise ValueError("data: batch: expected the structure of each atom, in ascending order")
    return torch.bincount(batch, minlength=len(data.ptr) - 1 if _has(data, "ptr") else 0).tolist()
