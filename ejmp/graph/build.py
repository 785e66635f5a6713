"""Build graphs: from ASE atoms or raw arrays by neighbour search, or from edges that are already known."""

import warnings
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ejmp.graph.graph import (
    EDGE_SETS,
    AtomGraph,
    EdgeSet,
    check_device,
    check_dtype,
    edge_geometry,
    edge_shift,
    make_edge_set,
    pack_offset,
)
from ejmp.graph.settings import MAX_CUTOFF, MAX_NEIGHBORS, GraphSettings, max_pairs
from ejmp.graph.structure import TAGS, Checked, check_structure, is_integer, to_list
from ejmp_kernels import availability
from ejmp_kernels.neighbors import (
    EdgeList,
    NeighborQuery,
    csr_pointers,
    find_neighbors,
    find_neighbors_reference,
    lexsort,
)

DEFAULT = GraphSettings()
MIN_DISTANCE = 0.01
"""Two atoms closer than this are an error, A."""


def build_graph(
    structures: Any,
    cutoff: float | Sequence[float] = 12.0,
    max_neighbors: int | Sequence[int] = 30,
    *,
    settings: GraphSettings | Sequence[GraphSettings] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: Literal["auto", "native", "reference"] = "auto",
) -> AtomGraph:
    """Build one batched graph with its four edge sets.

    Atoms without any neighbour are allowed: the graph then has no edge into them, and the model returns the energy of
    their element's embedding and a zero force. ASE atoms without a tags array get tag 2 (molecule) on every atom.

    With k = max_neighbors, each atom keeps its nearest k main edges, int(k*20/30) atom edges, int(k*8/30) quad edges
    and int(k*1000/30) pairs (GemNet-OC, arXiv 2204.02782); then of each undirected main pair the direction into the
    later atom decides, and its counter-edge is added. Where an atom has more than k neighbours in reach, the choice
    therefore depends on the order of the atoms, as it does upstream. `settings` says the same and more: what a model
    was trained with.

    Args:
        structures: an ase.Atoms, an ejmp.Structure, anything with `numbers`, `positions`, `cell`, `pbc`, or a list.
        cutoff: longest edge in A; one value, or one per structure.
        max_neighbors: most main edges into one atom; one value, or one per structure.
        settings: how graphs are made, instead of the two numbers; one, or one per structure.
        device: device of the graph. Without CUDA kernels the native search runs on the CPU and its result is moved.
        dtype: type of distances and vectors, float32 or float64; the model's dtype.
        backend: "native" is the compiled cell list, "reference" the plain-torch search on `device`; "auto" takes
            the first one available.

    Raises:
        ValueError: naming the structure and the field: NaN or infinite positions, a periodic cell without a volume,
            an atomic number outside 1..120, two atoms on one spot, no atoms, wrong shapes or types; for a cutoff or
            max_neighbors beside settings; for more pairs within the cutoff than `ejmp.graph.settings.MAX_PAIRS`.
        RuntimeError: if backend="native" and the extension was not built, or if there is no such device.
    """
    listed = to_list(structures)
    device = check_device(device)
    chosen = _settings(settings, cutoff, max_neighbors, len(listed))
    native = _resolve(backend)
    search_device = torch.device("cpu") if native and availability.why_unavailable(device.type) else device
    checked = [check_structure(item, b, search_device, chosen[b]) for b, item in enumerate(listed)]
    parts = _collate(checked)
    query = _query(parts, checked, chosen)
    found = (find_neighbors if native else find_neighbors_reference)(query)
    lists = {
        "main": found.main,
        "atom_edges": found.atom_edges,
        "quad_edges": found.quad_edges,
        "atom_pairs": found.pairs,
    }
    graph = _assemble(parts, lists, found.swap, dtype)
    _check_distances(graph)
    return graph if graph.device == device else graph.to(device)


def graph_from_edges(
    structures: Any,
    edges: Mapping[str, tuple[Tensor, Tensor]],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> AtomGraph:
    """Build a graph from edges that are already known.

    Args:
        structures: as for `build_graph`; atoms are numbered through the whole batch.
        edges: for each of "main", "atom_edges", "quad_edges", "atom_pairs": (edge_index [2, E] with row 0 the source
            and row 1 the target, offset [E, 3]), in any order. Main edges must be closed under swapping.
        device: device of the graph.
        dtype: type of distances and vectors, float32 or float64.

    Raises:
        ValueError: for structures that `build_graph` refuses; for edges with wrong names, shapes, types, or atoms
            that do not exist; and if a main edge has no counter-edge.
    """
    device = check_device(device)
    if set(edges) != set(EDGE_SETS):
        raise ValueError(f"edges: expected the sets {sorted(EDGE_SETS)}, got {sorted(map(str, edges))}")
    wrong = [name for name, pair in edges.items() if not isinstance(pair, tuple | list) or len(pair) != 2]
    if wrong:
        raise ValueError(f"edges[{wrong[0]!r}]: expected (edge_index, offset), got {type(edges[wrong[0]]).__name__}")
    parts = _collate([check_structure(item, b, device, DEFAULT) for b, item in enumerate(to_list(structures))])
    lists = {name: _sort_edges(parts, name, *edges[name]) for name in EDGE_SETS}
    graph = _assemble(parts, lists, _find_swap(lists["main"]), dtype)
    _check_distances(graph)
    return graph


def _resolve(backend: str) -> bool:
    """Return whether to search natively; raise RuntimeError if that was asked for explicitly and is not possible."""
    if backend not in ("auto", "native", "reference"):
        raise ValueError(f'backend: expected "auto", "native" or "reference", got {backend!r}')
    reason = availability.why_unavailable()
    if backend == "native" and reason is not None:
        raise RuntimeError(f'backend="native": {reason}')
    if backend == "auto" and reason is not None:
        _warn_once(reason)
    return backend != "reference" and reason is None


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"ejmp: neighbour search in plain torch, slower: {reason}", RuntimeWarning, stacklevel=4)


def _per_structure(value: Any, num: int, name: str, most: float) -> list[Any]:
    """Return a number for each structure, after checking that it is positive, of the type of `most`, and no larger."""
    kind = type(most)
    given = value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value
    values: list[Any] = [given] * num if np.ndim(given) == 0 else list(given)
    if len(values) != num:
        raise ValueError(f"{name}: expected one value or one per structure ({num}), got {len(values)}")
    for v in values:
        number = isinstance(v, int | float | np.number) and not isinstance(v, bool)
        if not number or not 0 < v <= most or kind(v) != v:
            raise ValueError(f"{name}: expected a positive {kind.__name__} up to {most}, got {v!r}")
    return [kind(v) for v in values]


def _settings(
    settings: GraphSettings | Sequence[GraphSettings] | None, cutoff: Any, max_neighbors: Any, num: int
) -> list[GraphSettings]:
    """Return the settings of each structure."""
    if settings is None:
        cutoffs = _per_structure(cutoff, num, "cutoff", MAX_CUTOFF)
        limits = _per_structure(max_neighbors, num, "max_neighbors", MAX_NEIGHBORS)
        return [_short_form(*pair) for pair in zip(cutoffs, limits, strict=True)]
    for name, value in {"cutoff": cutoff, "max_neighbors": max_neighbors}.items():
        if not (isinstance(value, float | int) and value == getattr(DEFAULT, name)):
            raise ValueError(f"{name}: expected none beside settings, which have their own, got {value!r}")
    chosen = [settings] * num if isinstance(settings, GraphSettings) else list(settings)
    wrong = [type(item).__name__ for item in chosen if not isinstance(item, GraphSettings)]
    if wrong or len(chosen) != num:
        got = wrong[0] if wrong else len(chosen)
        raise ValueError(f"settings: expected GraphSettings, one or one per structure ({num}), got {got}")
    return chosen


@lru_cache
def _short_form(cutoff: float, max_neighbors: int) -> GraphSettings:
    return GraphSettings(cutoff=cutoff, max_neighbors=max_neighbors)


def _query(parts: dict[str, Tensor], checked: list[Checked], settings: list[GraphSettings]) -> NeighborQuery:
    device = parts["positions"].device
    reach = [s.reach(len(item.numbers)) for s, item in zip(settings, checked, strict=True)]
    quad = torch.tensor([[tag in s.quad_tags for tag in TAGS] for s in settings], device=device)
    return NeighborQuery(
        positions=parts["positions"].detach(),
        cell=torch.stack([item.search_cell for item in checked]),
        pbc=parts["pbc"],
        ptr=parts["ptr"],
        cutoff=torch.tensor([[c for c, _ in sets] for sets in reach], dtype=torch.float64, device=device),
        limits=torch.tensor([[k for _, k in sets] for sets in reach], device=device),
        keep_ties=torch.tensor([s.ties == "keep" for s in settings], device=device),
        quad_atom=quad[parts["batch"], parts["tags"]],
        max_pairs=max_pairs(),
    )


def _collate(checked: list[Checked]) -> dict[str, Tensor]:
    """Join checked structures to the fields of a batched graph that are not edges."""
    device = checked[0].positions.device
    sizes = torch.tensor([len(item.numbers) for item in checked], device=device)
    return {
        "positions": torch.cat([item.positions for item in checked]),
        "atomic_numbers": torch.cat([item.numbers for item in checked]),
        "tags": torch.cat([item.tags for item in checked]),
        "cell": torch.stack([item.cell for item in checked]),
        "pbc": torch.stack([item.pbc for item in checked]),
        "batch": torch.repeat_interleave(torch.arange(len(checked), device=device), sizes),
        "ptr": torch.nn.functional.pad(sizes.cumsum(0), (1, 0)),
    }


def _assemble(parts: dict[str, Tensor], lists: dict[str, EdgeList], swap: Tensor, dtype: torch.dtype) -> AtomGraph:
    check_dtype(dtype)
    sets: dict[str, EdgeSet] = {}
    for name, found in lists.items():
        swap_of_set = swap if name == "main" else None
        sets[name] = make_edge_set(parts["positions"], found, parts["cell"], parts["ptr"], dtype, swap_of_set)
    fields: dict[str, Any] = {**parts, **sets}
    return AtomGraph(**fields)


def _check_distances(graph: AtomGraph) -> None:
    """Raise ValueError if two atoms are on one spot, naming them."""
    for edges in (graph.atom_pairs, graph.main, graph.atom_edges, graph.quad_edges):
        close = (edges.distance.detach() <= MIN_DISTANCE).nonzero().flatten()
        if len(close):
            s, t = (int(ends[close[0]]) for ends in (edges.source, edges.target))
            b = int(graph.batch[t])
            first = int(graph.ptr[b])
            raise ValueError(
                f"structure {b}: positions: atoms {s - first} and {t - first} are on one spot "
                f"({edges.distance[close[0]].item():.4f} A apart, at least {MIN_DISTANCE} A needed)"
            )


def _sort_edges(parts: dict[str, Tensor], name: str, edge_index: Any, offset: Any) -> EdgeList:
    """Check edges that somebody gave, and bring them into the order of the neighbour search."""
    positions, batch = parts["positions"].detach(), parts["batch"]
    num_atoms, device = len(positions), positions.device
    edge_index = _integers(edge_index, f"edges[{name!r}]: edge_index", (2, None), device)
    num_edges = edge_index.shape[1]
    offset = _integers(offset, f"edges[{name!r}]: offset", (num_edges, 3), device)
    image = pack_offset(offset)
    if num_edges and not (edge_index.min() >= 0 and edge_index.max() < num_atoms):
        raise ValueError(f"edges[{name!r}]: edge_index: atoms must be in 0..{num_atoms - 1}")
    source, target = edge_index
    if (batch[source] != batch[target]).any():
        raise ValueError(f"edges[{name!r}]: edge_index: an edge joins two structures")
    if (offset.bool() & ~parts["pbc"][batch[target]]).any():
        raise ValueError(f"edges[{name!r}]: offset: not zero in a direction that is not periodic")
    if torch.stack([source, target, image]).unique(dim=1).shape[1] != num_edges:
        raise ValueError(f"edges[{name!r}]: an edge is there twice")
    by_target = target.argsort(stable=True)
    source, target, offset = source[by_target], target[by_target], offset[by_target]
    shift = edge_shift(offset, parts["cell"], torch.bincount(batch[target], minlength=len(parts["cell"])))
    distance, _ = edge_geometry(positions, source, target, shift)
    rank = (distance * 1e6).round().long()
    order = lexsort((target, rank, source, offset[:, 0], offset[:, 1], offset[:, 2]))
    return EdgeList(source=source[order], offset=offset[order].int(), ptr=csr_pointers(target, num_atoms))


def _integers(value: Any, what: str, shape: tuple[int | None, int | None], device: torch.device) -> Tensor:
    try:
        tensor = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what}: expected an array of integers ({error})") from error
    fits = tensor.ndim == 2 and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
    if not fits or not is_integer(tensor):
        wanted = ", ".join("E" if n is None else str(n) for n in shape)
        raise ValueError(f"{what}: expected integers [{wanted}], got {tensor.dtype} {list(tensor.shape)}")
    return tensor.long()


def _find_swap(main: EdgeList) -> Tensor:
    """Return the counter-edge of every main edge, [E]."""
    degree = main.ptr.diff()
    target = torch.repeat_interleave(torch.arange(len(degree), device=degree.device), degree)
    image = pack_offset(main.offset)
    num_edges = len(target)
    forward = torch.stack([main.source, target, image])
    backward = torch.stack([target, main.source, -image])
    _, ids = torch.cat([forward, backward], dim=1).unique(dim=1, return_inverse=True)
    place = torch.full((2 * num_edges,), -1, device=degree.device)
    place[ids[:num_edges]] = torch.arange(num_edges, device=degree.device)
    swap = place[ids[num_edges:]]
    if (swap < 0).any() or (swap[swap] != torch.arange(num_edges, device=degree.device)).any():
        raise ValueError('edges["main"]: every main edge needs its counter-edge exactly once')
    return swap
