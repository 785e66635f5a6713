"""What no structure can be: atoms on top of each other, or a periodic cell without a volume.

Two atoms are too near if they are nearer than NEAREST times the sum of their covalent radii (Cordero et al., Dalton
Trans. 2008, 2832; 2.0 A where there is none), or than LEAST. So H2 at 0.5 A and the hottest dynamics pass,
and a copy of an atom, two sites of a disordered crystal or coordinates in another unit do not. Periodic images count.
"""

import itertools
from functools import lru_cache

import numpy as np

from ejmp.graph.structure import MAX_ATOMIC_NUMBER, MAX_CELLS_OUTSIDE, MIN_CELL_HEIGHT, Structure

NEAREST = 0.25
"""Least distance of two atoms, as a fraction of the sum of their covalent radii."""
LEAST = 0.31
"""Least distance of any two atoms, A."""
MOST_AT_ONCE = 200
"""Most atoms, with the images at the cell's faces, of which all pairs are tried; more are sorted into boxes first."""
FEW = 24
"""Most atoms of a periodic structure of which all pairs are tried at once; of more, those that are near along an axis.
"""
MOST_IN_BOX = 1500
"""More points than a box of the longest least distance can hold if no two of them are nearer than LEAST."""
_KNOWN_RADII = (
    0.31, 0.28, 1.28, 0.96, 0.84, 0.76, 0.71, 0.66, 0.57, 0.58, 1.66, 1.41, 1.21, 1.11, 1.07, 1.05, 1.02, 1.06, 2.03,
    1.76, 1.70, 1.60, 1.53, 1.39, 1.39, 1.32, 1.26, 1.24, 1.32, 1.22, 1.22, 1.20, 1.19, 1.20, 1.20, 1.16, 2.20, 1.95,
    1.90, 1.75, 1.64, 1.54, 1.47, 1.46, 1.42, 1.39, 1.45, 1.44, 1.42, 1.39, 1.39, 1.38, 1.39, 1.40, 2.44, 2.15, 2.07,
    2.04, 2.03, 2.01, 1.99, 1.98, 1.98, 1.96, 1.94, 1.92, 1.92, 1.89, 1.90, 1.87, 1.87, 1.75, 1.70, 1.62, 1.51, 1.44,
    1.41, 1.36, 1.36, 1.32, 1.45, 1.46, 1.48, 1.40, 1.50, 1.50, 2.60, 2.21, 2.15, 2.06, 2.00, 1.96, 1.90, 1.87, 1.80,
    1.69,
)  # fmt: skip
COVALENT_RADII = np.array([0.0, *_KNOWN_RADII, *[2.0] * (MAX_ATOMIC_NUMBER - len(_KNOWN_RADII))])
"""Covalent radius by atomic number, A."""


class TooNearError(ValueError):
    """Raised for a structure with two atoms at a distance that no two atoms have."""


def check_possible(structure: Structure, *, allow_close: bool = False) -> None:
    """Check the cell of a structure, and that no two of its atoms are on top of each other.

    Args:
        structure: atomic numbers [n] int64, positions [n, 3] float64, A, pbc [3] bool, and the cell if any is True.
        allow_close: leave the distances unchecked.

    Raises:
        TooNearError: naming the two atoms and their distance.
        ValueError: if the cell has no volume.
    """
    cell = None
    if structure.cell is not None and True in structure.pbc.tolist():
        cell = _cached_cell(structure.cell.tobytes(), structure.pbc.tobytes())
    if not allow_close:
        _check_distances(structure.numbers, structure.positions.astype(np.float64, copy=False), cell)


def all_far_apart(numbers: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return for frames of one molecule whether no two atoms can be too near; the others need a closer look.

    Args:
        numbers: atomic numbers, [n].
        positions: positions of F frames, [F, n, 3], A.
    """
    n = len(numbers)
    apart = np.zeros(len(positions), bool)
    known = numbers.dtype.kind in "iu" and 0 < n <= MOST_AT_ONCE
    if not known or numbers.min() < 1 or numbers.max() > MAX_ATOMIC_NUMBER:
        return apart
    limit = _reach(COVALENT_RADII[numbers]) ** 2 * (1 + 1e-6)
    step = max(1, MOST_AT_ONCE**2 // n**2)
    for start in range(0, len(positions), step):
        frames = positions[start : start + step].astype(np.float64)
        frames -= frames[:, :1].copy()
        lengths = (frames * frames).sum(2)
        square = np.matmul(frames, -2 * frames.transpose(0, 2, 1))
        square += lengths[:, :, None]
        square += lengths[:, None]
        square.reshape(len(frames), -1)[:, :: n + 1] = np.inf
        apart[start : start + step] = square.min((1, 2)) > limit + 1e-12 * lengths.max(1)
    return apart


def _reach(radii: np.ndarray) -> float:
    """Return a distance beyond which no two of the atoms are too near, A."""
    return max(LEAST, 2 * NEAREST * float(radii.max()))


def _check_distances(numbers: np.ndarray, positions: np.ndarray, cell: "_Cell | None") -> None:
    radii = COVALENT_RADII[numbers]
    reach = _reach(radii)
    points, atoms = positions, None
    if cell is not None:
        scaled = cell.scaled(positions)
        if len(scaled) <= MOST_AT_ONCE and cell.all_apart(scaled, reach):
            return
        points, atoms = cell.with_images(scaled, reach)
        radii = radii[atoms]
    if len(points) <= MOST_AT_ONCE:
        pairs = _pairs_of_few(points, NEAREST * radii, reach)
        if pairs is None:
            return
        first, second = pairs
    else:
        first, second = _pairs_by_boxes(points, reach)
    distance = np.sqrt(((points[first] - points[second]) ** 2).sum(1))
    near = distance < np.maximum(LEAST, NEAREST * (radii[first] + radii[second]))
    if near.any():
        worst = np.flatnonzero(near)[distance[near].argmin()]
        ends = int(first[worst]), int(second[worst])
        i, j = sorted(ends if atoms is None else atoms[list(ends)].tolist())
        pair = f"atoms {i} and {j} (Z = {numbers[i]} and {numbers[j]})" if i != j else f"atom {i} and its own image"
        raise TooNearError(f"positions: {pair} are {distance[worst]:.3g} A apart; --allow-close lets that pass")


def _pairs_of_few(points: np.ndarray, half: np.ndarray, reach: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the pairs of points that may be nearer than the sum of their `half`, trying all; None if there are none.

    Args:
        points: positions, [n, 3], A.
        half: share of each point in the least distance, [n], A.
        reach: greatest sum of two of these, A.
    """
    centred = points - points[0]
    lengths = (centred * centred).sum(1)
    square = centred @ (-2 * centred.T)
    square += lengths[:, None]
    square += lengths
    square.ravel()[:: len(points) + 1] = np.inf
    # The sums round: what is left of the square of a coordinate decides how near a pair must come to be looked at.
    rounding = 1e-12 * float(lengths.max())
    if square.min() > reach * reach + rounding:
        return None
    least = half[:, None] + half
    np.maximum(least, LEAST, out=least)
    least *= least
    least += rounding
    close = square < least
    if not close.any():
        return None
    first, second = np.nonzero(np.triu(close))
    return first, second


def _pairs_by_boxes(points: np.ndarray, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of points in the same box or neighbouring ones, of the length `reach`, in linear time."""
    boxes = ((points - points.min(0)) / reach).astype(np.int64) + 1
    size = boxes.max(0) + 2
    keys = (boxes[:, 0] * size[1] + boxes[:, 1]) * size[2] + boxes[:, 2]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    start, stop = np.searchsorted(keys, keys, "left"), np.searchsorted(keys, keys, "right")
    fullest = int((stop - start).argmax())
    if stop[fullest] - start[fullest] > MOST_IN_BOX:
        crowd = order[start[fullest] : start[fullest] + MOST_IN_BOX]
        first, second = np.triu_indices(len(crowd), 1)
        return crowd[first], crowd[second]
    found = []
    for step in itertools.product((-1, 0, 1), repeat=3):
        if step < (0, 0, 0):
            continue  # each pair of boxes once
        shifted = keys + (step[0] * size[1] + step[1]) * size[2] + step[2]
        start, stop = np.searchsorted(keys, shifted, "left"), np.searchsorted(keys, shifted, "right")
        if step == (0, 0, 0):
            start = np.arange(len(keys)) + 1
        count = stop - start
        first = np.repeat(np.arange(len(keys)), count)
        second = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count) + np.repeat(start, count)
        close = ((points[order[first]] - points[order[second]]) ** 2).sum(1) < reach**2
        found.append((order[first[close]], order[second[close]]))
    first, second = (np.concatenate(part) for part in zip(*found, strict=True))
    return first, second


class _Cell:
    """A cell that is periodic in some directions, and has a volume."""

    def __init__(self, vectors: np.ndarray, pbc: np.ndarray) -> None:
        periodic = np.where(pbc[:, None], vectors, 0.0)
        free = np.flatnonzero(~pbc)
        complete = periodic.copy()
        if len(free):
            # The right singular vectors beyond the rank span what the periodic vectors leave free.
            complete[free] = np.linalg.svd(periodic[pbc], full_matrices=True)[2][3 - len(free) :]
        heights = np.zeros(3)
        if abs(np.linalg.det(complete)) > 0:
            self.inverse = np.linalg.inv(complete)
            heights = 1 / np.sqrt((self.inverse**2).sum(0))  # the distance between opposite faces
        if not heights[pbc].min() >= MIN_CELL_HEIGHT:
            raise ValueError(
                f"cell: a periodic cell needs a volume; its faces are closer than {MIN_CELL_HEIGHT} A or its vectors "
                f"are dependent: {vectors.tolist()}"
            )
        self.heights: list[float] = heights.tolist()
        self.lowest = min(height for height, wraps in zip(self.heights, pbc, strict=True) if wraps)
        self.free: list[int] = free.tolist()
        self.complete = complete
        self._known: dict[float, tuple[np.ndarray, np.ndarray]] = {}

    def scaled(self, positions: np.ndarray) -> np.ndarray:
        """Return positions [n, 3] in units of the lattice vectors.

        Raises:
            ValueError: if an atom is too far outside the cell.
        """
        scaled = positions @ self.inverse
        outside = np.delete(scaled, self.free, 1) if self.free else scaled
        if not max(outside.max(), -outside.min()) <= MAX_CELLS_OUTSIDE:
            raise ValueError(f"positions: more than {MAX_CELLS_OUTSIDE} cells outside the cell")
        return scaled

    def all_apart(self, scaled: np.ndarray, reach: float) -> bool:
        """Return whether no two atoms are within `reach` for certain; False if that takes a closer look.

        Two atoms that are nearer than half the least distance of opposite faces differ by less than half a lattice
        vector, so that rounding finds their nearest images.
        """
        if self.lowest <= 2.1 * reach:
            return False
        if len(scaled) <= FEW:
            first, second = _every_pair(len(scaled))
        else:
            first, second = self._near_along_two_axes(scaled, reach)
        if not len(first):
            return True
        apart = scaled[first] - scaled[second]
        whole = np.rint(apart)
        if self.free:
            whole[:, self.free] = 0
        apart -= whole
        apart = apart @ self.complete
        apart *= apart
        return bool(apart.sum(1).min() > reach * reach * (1 + 1e-6))

    def _near_along_two_axes(self, scaled: np.ndarray, reach: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs of atoms that are within `reach` along two axes, found by sorting along one of them."""
        axis = self.free[0] if self.free else int(np.argmax(self.heights))
        width = reach / self.heights[axis] * (1 + 1e-6)
        place = scaled[:, axis]
        if not self.free:
            place = place - np.floor(place)
        order = place.argsort()
        place = place[order]
        n = len(order)
        if not self.free:  # the first ones once more, behind the last
            again = int(place.searchsorted(width, "right"))
            place, order = np.concatenate([place, place[:again] + 1]), np.concatenate([order, order[:again]])
        count = place.searchsorted(place[:n] + width, "right") - np.arange(1, n + 1)
        first = np.repeat(np.arange(n), count)
        second = np.arange(len(first)) - np.repeat(count.cumsum() - count, count) + first + 1
        first, second = order[first], order[second]
        other = (axis + 1) % 3  # the atoms of crystals lie in planes, many at the same place along an axis
        place = scaled[:, other]
        apart = place[first] - place[second]
        if other not in self.free:
            apart -= np.rint(apart)
        near = np.flatnonzero(np.abs(apart) < reach / self.heights[other] * (1 + 1e-6))
        return first[near], second[near]

    def with_images(self, scaled: np.ndarray, reach: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the atoms wrapped into the cell, with their images within `reach` beyond its upper faces.

        Returns:
            Positions, and the number of the atom that each is of.
        """
        whole = np.floor(scaled)
        if self.free:
            whole[:, self.free] = 0
        scaled = scaled - whole
        shifts, beyond = self._images(reach)
        images = scaled + shifts
        kept = (images <= beyond).all(2).ravel().nonzero()[0]
        return images.reshape(-1, 3)[kept] @ self.complete, kept % len(scaled)

    def _images(self, reach: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the cells in which images may be, [k, 1, 3], and how far they may be beyond the lower face, [3]."""
        known = self._known.get(reach)
        if known is None:
            widths = [0.0 if axis in self.free else reach / height for axis, height in enumerate(self.heights)]
            ranges = [range(1 if axis in self.free else int(width) + 2) for axis, width in enumerate(widths)]
            shifts = np.array(list(itertools.product(*ranges)), np.float64)[:, None]
            beyond = np.array([np.inf if axis in self.free else 1 + width for axis, width in enumerate(widths)])
            known = self._known[reach] = shifts, beyond
        return known


@lru_cache(maxsize=FEW)
def _every_pair(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.triu_indices(n, 1)


@lru_cache(maxsize=16)
def _cached_cell(vectors: bytes, pbc: bytes) -> _Cell:
    return _Cell(np.frombuffer(vectors).reshape(3, 3), np.frombuffer(pbc, bool))
