"""The order in which the structures of several datasets are sampled.

The samples of all epochs form one endless line, and a position in it is the number of samples before it. The batch of a
step is the next world_size * batch_size of them, so a step is always full, and the last step of an epoch also holds the
first samples of the next. What a position of the line holds depends on the seed alone. Training can therefore go on
from any position with any number of ranks, and no sample is lost or comes twice.
"""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ejmp.data.sampling.balance import assign_ranks
from ejmp.data.sampling.permutation import permute

Pairs = NDArray[np.int64]
"""[n, 2]: for each sample the number of its dataset, and its number in the dataset."""


class Sampler(Protocol):
    """What a loader needs to know of the order of samples."""

    @property
    def sizes(self) -> Sequence[int]:
        """Number of structures in each dataset."""
        ...

    @property
    def step_size(self) -> int:
        """Number of samples of all ranks together in one step."""
        ...

    @property
    def epoch_size(self) -> int:
        """Number of samples of all ranks together in one epoch."""
        ...

    def batch(self, position: int) -> Pairs:
        """Return one rank's samples of the step that begins at a position, possibly none."""
        ...


def sample_counts(sizes: Sequence[int], temperature: float = 2.0) -> list[int]:
    """Return how many samples an epoch takes from each dataset: size^(1/T), scaled up until the largest is complete.

    JMP's rule (Shoghi et al., ICLR 2024): none is taken less often than its size, all but the largest are repeated.

    Raises:
        ValueError: if there is no dataset, one is empty, or temperature < 1.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes: expected at least one dataset and none empty, got {list(sizes)}")
    if not temperature >= 1:
        raise ValueError(f"temperature: expected at least 1, got {temperature}")
    most = max(sizes)
    shares = [most * (size / most) ** (1 / temperature) for size in sizes]
    # Rounded up, unless it is above a whole number by rounding error alone.
    return [max(size, int(np.ceil(share * (1 - 1e-14)))) for size, share in zip(sizes, shares, strict=True)]


@dataclass(frozen=True, kw_only=True)
class _RankSampler:
    """Settings that every sampler has: what there is to sample, and this rank's share of a step."""

    sizes: Sequence[int]
    """Number of structures in each dataset."""
    batch_size: int
    """Structures per rank and step."""
    world_size: int = 1
    """Number of ranks."""
    rank: int = 0
    """Number of this rank, from 0 on."""

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: naming the setting that is out of range.
        """
        for name in ("batch_size", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank: expected 0..{self.world_size - 1}, got {self.rank}")

    @property
    def step_size(self) -> int:
        """Number of samples of all ranks together in one step."""
        return self.world_size * self.batch_size


@dataclass(frozen=True, kw_only=True)
class MixSampler(_RankSampler):
    """Temperature sampling over datasets in random order.

    In one epoch every structure of a dataset comes floor or ceil of (its samples / its size) times. Which ones come
    once more, and the order, are keyed permutations by seed and epoch: nothing is stored per sample.
    """

    seed: int
    """Seed of the order, from 0 on."""
    temperature: float = 2.0
    """Temperature T of the sampling: 1 samples in proportion to the sizes, infinity all datasets alike."""
    costs: Sequence[NDArray[Any]] | None = field(default=None, repr=False, compare=False)
    """For each dataset [size] integers in proportion to the time a structure takes: `Dataset.num_edges`. Steps are
    balanced over the ranks by them. None: all structures cost the same."""

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: naming the setting that is out of range, or the dataset whose costs are too few or many.
        """
        sample_counts(self.sizes, self.temperature)
        super().__post_init__()
        if self.seed < 0:
            raise ValueError(f"seed: expected an integer from 0 on, got {self.seed}")
        if self.costs is not None and [len(costs) for costs in self.costs] != list(self.sizes):
            raise ValueError(f"costs: expected {list(self.sizes)} values, got {[len(costs) for costs in self.costs]}")

    @cached_property
    def counts(self) -> list[int]:
        """Number of samples of each dataset in one epoch."""
        return sample_counts(self.sizes, self.temperature)

    @property
    def epoch_size(self) -> int:
        """Number of samples of all ranks together in one epoch."""
        return sum(self.counts)

    def samples(self, start: int, stop: int) -> Pairs:
        """Return the [stop - start, 2] samples at the positions start..stop-1, which do not depend on the ranks.

        Raises:
            ValueError: if start is negative or beyond stop.
        """
        if not 0 <= start <= stop:
            raise ValueError(f"start: expected 0..{stop}, got {start}")
        parts = [np.empty((0, 2), dtype=np.int64)]
        while start < stop:
            epoch, place = divmod(start, self.epoch_size)
            length = min(stop - start, self.epoch_size - place)
            parts.append(self._epoch_samples(epoch, np.arange(place, place + length)))
            start += length
        return np.concatenate(parts)

    def _epoch_samples(self, epoch: int, places: NDArray[np.int64]) -> Pairs:
        ends = np.cumsum(self.counts)
        mixed = permute(places, self.epoch_size, self.seed, epoch, 0)
        pairs = np.empty((len(places), 2), dtype=np.int64)
        pairs[:, 0] = np.searchsorted(ends, mixed, side="right")
        for d, size in enumerate(self.sizes):
            rows = np.flatnonzero(pairs[:, 0] == d)
            turn = mixed[rows] - (ends[d] - self.counts[d])
            pairs[rows, 1] = permute(turn % size, size, self.seed, epoch, 1 + d)
        return pairs

    def batch(self, position: int) -> Pairs:
        """Return this rank's [batch_size, 2] samples of the step that begins at a position.

        Raises:
            ValueError: if position is negative.
        """
        if self.costs is None or self.world_size == 1:
            first = position + self.rank * self.batch_size
            return self.samples(first, first + self.batch_size)
        pairs = self.samples(position, position + self.step_size)
        return pairs[assign_ranks(self.costs_of(pairs), self.world_size) == self.rank]

    def costs_of(self, pairs: Pairs) -> NDArray[np.int64]:
        """Return the [n] costs of samples; all are 1 if there are no `costs`."""
        found = np.ones(len(pairs), dtype=np.int64)
        for d, costs in enumerate(self.costs or ()):
            rows = pairs[:, 0] == d
            found[rows] = costs[pairs[rows, 1]]
            _release(costs)
        return found

    def state(self, position: int) -> dict[str, Any]:
        """Return what a checkpoint needs to go on from a position: a few numbers, ready for JSON."""
        return {
            "position": int(position),
            "seed": self.seed,
            "temperature": float(self.temperature),
            "sizes": [int(size) for size in self.sizes],
        }

    def resume(self, state: Mapping[str, Any]) -> int:
        """Return the position to go on from; the numbers of ranks and of structures per step may have changed.

        Raises:
            ValueError: if the state has no position, or is of another seed, temperature or other datasets, whose
                order differs.
        """
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            raise ValueError(f"state: expected a position from 0 on, got {position!r}")
        expected = self.state(position)
        wrong = [name for name in expected if state.get(name) != expected[name]]
        if wrong:
            raise ValueError(f"state: expected {wrong[0]} = {expected[wrong[0]]}, got {state.get(wrong[0])}")
        return position


@dataclass(frozen=True, kw_only=True)
class InOrder(_RankSampler):
    """Every structure of every dataset once, in order, for validation; the last step may be smaller."""

    @property
    def epoch_size(self) -> int:
        """Number of structures in all datasets."""
        return sum(self.sizes)

    def batch(self, position: int) -> Pairs:
        """Return this rank's [n, 2] samples of the step that begins at a position; in the last one n may be 0."""
        places = np.arange(position + self.rank, min(position + self.step_size, self.epoch_size), self.world_size)
        sizes = np.asarray(self.sizes)
        ends = np.cumsum(sizes)
        dataset = np.searchsorted(ends, places, side="right")
        return np.stack([dataset, places - (ends - sizes)[dataset]], axis=1)


def _release(array: NDArray[Any]) -> None:
    """Let go of the pages of a memory-mapped array; they stay in the system's cache, which all ranks share.

    Samples are spread over the whole file: without this, all of it would soon count as memory of each rank.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and not array.flags.writeable:
        base.madvise(mmap.MADV_DONTNEED)
