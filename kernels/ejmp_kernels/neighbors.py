"""Find the four edge sets of a batch of structures: neighbour search, nearest-k selection, symmetrisation, CSR.

An edge s -> t through cell offset o has the vector r_t - r_s - o . cell. It is a pair if its length, rounded to 1e-6 A,
is at most the structure's first cutoff. Per target the first `limits` pairs in the order (rounded length, source,
offset) are kept: one rule for every device, so ties in crystals are resolved alike everywhere. The other three sets are
chosen from the pairs in the same way, by cutoffs and limits of their own. Of the main edges only those with
source < target (or, for an atom's own image, a lexicographically negative offset) are taken, and each one's
counter-edge is added. Quad edges must touch an atom of `quad_atom` at one end at least.

Where `keep_ties` is set, an atom with more than k neighbours keeps all that are at most 0.01 A farther than the first
one beyond k, so that no shell of a crystal is cut (the rule of fairchem 1.x, which for the pairs compares squared
lengths, with 0.01 A^2).

The native search (csrc/cpu/neighbors.cpp, csrc/cuda/neighbors.cu) costs O(N); its plain-torch twin tries all pairs in
all cells, O(N^2) per structure. All return the same bits: lengths are computed by the same float64 operations in the
same order. Where cutoffs differ or ties are kept, the native search finds the pairs, and torch chooses from them.

Before anything is searched, the number of pairs is estimated from how many atoms share a bin of the cell list, and a
search for too many is refused: a structure of a few numbers can have more pairs than a machine has memory.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ejmp_kernels import availability

UNLIMITED = 1 << 40
"""More neighbours than any atom has."""
RANK_BITS = 30
"""Bits of a length in units of 1e-6 A; `GraphSettings` allows 1,000 A at most."""


@dataclass(frozen=True, kw_only=True)
class NeighborQuery:
    """A batch of structures to search, as raw arrays on one device.

    Letters: B structures, N atoms.
    """

    positions: Tensor
    """Positions of the atoms in A, [N, 3] float64, not wrapped into the cell."""
    cell: Tensor
    """Lattice vectors as rows, in A, [B, 3, 3] float64; never singular: non-periodic directions are completed."""
    pbc: Tensor
    """Whether each direction of the cell is periodic, [B, 3] bool."""
    ptr: Tensor
    """First atom of each structure, [B + 1] int64."""
    cutoff: Tensor
    """Greatest length of pairs, main, atom_edges, quad_edges in A, [B, 4] float64; the first is the largest."""
    limits: Tensor
    """Most neighbours per atom, [B, 4] int64: of pairs, main, atom_edges, quad_edges; the first is the largest."""
    keep_ties: Tensor
    """Whether neighbours at the distance of the last one are kept beyond the limit, [B] bool."""
    quad_atom: Tensor
    """Whether an atom is one of those that a quad edge must touch, [N] bool."""
    max_pairs: int
    """Most pairs of atoms that may be within reach, by an estimate; a tenth of those that are compared counts too."""


@dataclass(frozen=True, kw_only=True)
class EdgeList:
    """A set of edges, sorted by (target, rounded length, source, offset)."""

    source: Tensor
    """Atom that each edge starts at, [E] int64."""
    offset: Tensor
    """Cells by which the source is shifted, [E, 3] int32."""
    ptr: Tensor
    """First edge into each atom, [N + 1] int64."""


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """The four edge sets of a batch."""

    pairs: EdgeList
    main: EdgeList
    atom_edges: EdgeList
    quad_edges: EdgeList
    swap: Tensor
    """Counter-edge of each main edge, [E] int64."""


def find_neighbors(query: NeighborQuery) -> Neighbors:
    """Search with the compiled cell list, on the CPU or a GPU.

    Raises:
        RuntimeError: if the extension cannot be loaded or has no kernels for the device.
        ValueError: if a tensor has the wrong shape, type or device, or pointers or limits are out of order; if there
            are more pairs than `max_pairs`.
    """
    reason = availability.why_unavailable(query.positions.device.type)
    if reason is not None:
        raise RuntimeError(f"native neighbour search: {reason}")
    if (query.cutoff != query.cutoff[:, :1]).any() or query.keep_ties.any():
        return _select_sets(query, *_native_pairs(query))
    out = _call(query, query.limits)
    sets = [EdgeList(source=out[i], offset=out[i + 1], ptr=out[i + 2]) for i in range(0, 12, 3)]
    return Neighbors(pairs=sets[0], main=sets[1], atom_edges=sets[2], quad_edges=sets[3], swap=out[12])


def find_neighbors_reference(query: NeighborQuery) -> Neighbors:
    """Search all pairs in all cells, in plain torch on any device: the specification of `find_neighbors`.

    Raises:
        ValueError: if there are more pairs than `max_pairs`, or ten times as many have to be compared.
    """
    found = [_search_structure(query, b) for b in range(len(query.cell))]
    return _select_sets(query, *(torch.cat(column) for column in zip(*found, strict=True)))


def _call(query: NeighborQuery, limits: Tensor) -> list[Tensor]:
    cutoff = query.cutoff[:, 0]
    fields = (query.positions, query.cell, query.pbc, query.ptr, cutoff, limits, query.quad_atom, query.max_pairs)
    return torch.ops.ejmp.find_neighbors(*fields)


def _native_pairs(query: NeighborQuery) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return source, target, offset, rank of every pair that a set can be chosen from."""
    limits = torch.zeros_like(query.limits)
    limits[:, 0] = torch.where(query.keep_ties, UNLIMITED, query.limits[:, 0])
    source, offset, ptr, *_ = _call(query, limits)
    num_atoms = len(query.positions)
    target = torch.repeat_interleave(torch.arange(num_atoms, device=ptr.device), ptr.diff(), output_size=len(source))
    cell = query.cell[0] if len(query.cell) == 1 else query.cell[_structure_of_atom(query)[target]]
    delta = [x.index_select(0, target) - x.index_select(0, source) for x in query.positions.T.contiguous()]
    columns = offset.T.to(torch.float64, memory_format=torch.contiguous_format)
    return source, target, offset, _rank(delta, list(columns), cell.unbind(-1))


def _rank(delta: Sequence[Tensor], offset: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """Return lengths in units of 1e-6 A, rounded, by operations whose order is that of the native search.

    Args:
        delta: target minus source, three components.
        offset: cells by which the source is shifted, three components.
        columns: for each component those of the three lattice vectors, [..., 3].
    """
    squared = torch.zeros((), dtype=torch.float64, device=delta[0].device)
    for x in range(3):
        c = columns[x].unbind(-1)
        d = delta[x] - ((offset[0] * c[0] + offset[1] * c[1]) + offset[2] * c[2])
        squared = squared + d * d
    return (squared.sqrt() * 1e6).round().long()


def _structure_of_atom(query: NeighborQuery) -> Tensor:
    structures = torch.arange(len(query.cell), device=query.ptr.device)
    return torch.repeat_interleave(structures, query.ptr.diff(), output_size=len(query.positions))


def _select_sets(query: NeighborQuery, source: Tensor, target: Tensor, offset: Tensor, rank: Tensor) -> Neighbors:
    """Choose the four sets from all pairs within the first cutoff, which are in the rule's order."""
    num_atoms, structure = len(query.positions), _structure_of_atom(query)
    ptr = csr_pointers(target, num_atoms)
    order = torch.arange(len(target), device=target.device) - ptr[target]
    masks = [order < count[target] for count in _count_kept(query, structure, ptr, (target << RANK_BITS) + rank)]
    masks[3] &= query.quad_atom[source] | query.quad_atom[target]
    pairs, near, quad = (_select(masks[j], source, target, offset, num_atoms) for j in (0, 2, 3))
    source, target, offset, rank = (column[masks[1]] for column in (source, target, offset, rank))
    main, swap = symmetrise(source, target, offset, rank, num_atoms)
    return Neighbors(pairs=pairs, main=main, atom_edges=near, quad_edges=quad, swap=swap)


def _count_kept(query: NeighborQuery, structure: Tensor, ptr: Tensor, keys: Tensor) -> Tensor:
    """Return how many of each atom's pairs, the nearest, belong to each set, [4, N].

    Args:
        query: the limits of the sets.
        structure: structure of each atom, [N].
        ptr: first pair of each atom, [N + 1].
        keys: target and rank of each pair in one ascending number, [E].
    """
    first, atoms = ptr[:-1], torch.arange(len(structure), device=ptr.device) << RANK_BITS
    farthest = (query.cutoff * 1e6).round().long()[structure].T
    limits, keep_ties = query.limits[structure].T, query.keep_ties[structure]
    padded = torch.nn.functional.pad(keys, (0, 1))

    def count_within(rank: Tensor) -> Tensor:
        return torch.searchsorted(keys, atoms + rank, right=True) - first

    def count(inside: Tensor, most: Tensor, *, squared: bool) -> Tensor:
        tied = keep_ties & (inside > most)
        beyond = padded[torch.where(tied, first + most, 0)] - atoms  # rank of the first neighbour beyond the limit
        last = (beyond.double().square() + 1e10).sqrt().long() if squared else beyond + 10_000  # 0.01 A^2 or 0.01 A
        return torch.minimum(inside, torch.where(tied, count_within(last), most))

    pairs = count(count_within(farthest[:1]), limits[:1], squared=True)
    others = count(torch.minimum(count_within(farthest[1:].contiguous()), pairs), limits[1:], squared=False)
    return torch.cat([pairs, others])


def lexsort(keys: Sequence[Tensor]) -> Tensor:
    """Return the order that sorts by the first key, ties by the second, and so on, [n] int64."""
    order = torch.arange(len(keys[0]), device=keys[0].device)
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order


def csr_pointers(target: Tensor, num_atoms: int) -> Tensor:
    """Return where each atom's edges begin if edges are sorted by target, [E] -> [N + 1]."""
    counts = torch.bincount(target, minlength=num_atoms)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _select(keep: Tensor, source: Tensor, target: Tensor, offset: Tensor, num_atoms: int) -> EdgeList:
    if keep.all():
        return EdgeList(source=source, offset=offset, ptr=csr_pointers(target, num_atoms))
    return EdgeList(source=source[keep], offset=offset[keep], ptr=csr_pointers(target[keep], num_atoms))


def _search_structure(query: NeighborQuery, b: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return source, target, offset, rank of every edge of one structure, in the rule's order."""
    first, last = query.ptr[b].item(), query.ptr[b + 1].item()
    positions, cell, pbc = query.positions[first:last], query.cell[b], query.pbc[b]
    cutoff = query.cutoff[b, 0].item()
    inverse = torch.linalg.inv(cell)
    wrap = torch.where(pbc, (positions @ inverse).floor(), 0.0).to(torch.int32)
    # The distance between opposite faces of the cell is 1 / |column of the inverse|.
    reach = torch.where(pbc, ((cutoff + 1e-6) * inverse.norm(dim=0)).floor() + 1, 0.0).int().tolist()
    images, num_found = math.prod(2 * n + 1 for n in reach), 0
    _check_pairs(b, max(len(positions) ** 2 * images / 10, 10 * images), query.max_pairs)
    axes = [torch.arange(-n, n + 1, device=cell.device, dtype=torch.int32) for n in reach]
    shifts = torch.cartesian_prod(*axes)
    found = [torch.empty(0, dtype=torch.int64, device=cell.device)] * 2
    parts = [(*found, shifts[:0], found[0])]
    for rows in _chunks(len(positions), len(positions) * len(shifts)):
        offset = shifts + (wrap[rows, None, None] - wrap[None, :, None])
        delta = [positions[rows, None, None, x] - positions[None, :, None, x] for x in range(3)]
        rank = _rank(delta, offset.double().unbind(-1), cell.unbind(-1))
        inside = rank <= round(cutoff * 1e6)
        at = torch.arange(len(positions), device=cell.device)
        inside &= ~((at[rows, None, None] == at[None, :, None]) & (offset == 0).all(-1))
        target, source, image = inside.nonzero(as_tuple=True)
        num_found += len(target)
        _check_pairs(b, num_found, query.max_pairs)
        parts.append((source, target + rows.start, offset[target, source, image], rank[target, source, image]))
    source, target, offset, rank = (torch.cat(column) for column in zip(*parts, strict=True))
    # nonzero() already enumerates in the order (target, source, offset), which stable sorts keep.
    order = lexsort((target, rank))
    return source[order] + first, target[order] + first, offset[order], rank[order]


def _check_pairs(b: int, pairs: float, max_pairs: int) -> None:
    """Raise ValueError if a structure has too many pairs of atoms, as csrc/bindings/graph.h does."""
    if pairs > max_pairs:
        raise ValueError(
            f"structure {b}: cutoff: about {pairs:g} pairs of atoms are within reach, and {max_pairs:g} are allowed "
            "(max_pairs; EJMP_MAX_PAIRS sets another number)"
        )


def _chunks(num_rows: int, row_size: int, budget: int = 4_000_000) -> Iterator[slice]:
    """Split rows so that one chunk holds about `budget` candidate pairs."""
    step = max(1, min(num_rows, math.floor(budget / max(row_size, 1))))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def symmetrise(source: Tensor, target: Tensor, offset: Tensor, rank: Tensor, num_atoms: int) -> tuple[EdgeList, Tensor]:
    """Keep one edge of each undirected pair and add its counter-edge; return the sorted set and its counter-edges."""
    x, y, z = offset.unbind(1)
    negative = (x < 0) | ((x == 0) & ((y < 0) | ((y == 0) & (z < 0))))
    half = torch.where(source == target, negative, source < target)
    source, target, offset, rank = source[half], target[half], offset[half], rank[half]
    num_half = len(source)
    source, target = torch.cat([source, target]), torch.cat([target, source])
    offset, rank = torch.cat([offset, -offset]), torch.cat([rank, rank])
    order = lexsort((target, rank, source, offset[:, 0], offset[:, 1], offset[:, 2]))
    place = torch.empty_like(order)
    place[order] = torch.arange(2 * num_half, device=source.device)
    swap = place[(order + num_half) % max(2 * num_half, 1)]
    return EdgeList(source=source[order], offset=offset[order], ptr=csr_pointers(target, num_atoms)), swap
