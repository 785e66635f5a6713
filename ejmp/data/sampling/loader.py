"""The loader: worker processes read structures in a sampler's order, build their graphs and pack them as batches."""

import multiprocessing
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ejmp.data.info import Dataset
from ejmp.data.sampling.batch import Batch, Packed, make_batch, pack
from ejmp.data.sampling.mix import Pairs, Sampler
from ejmp.graph.settings import GraphSettings
from ejmp.graph.structure import Structure

Request = tuple[int, Pairs]
"""What a worker is asked for: the sampler's position after the batch, and the samples in it."""


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Make the batches of one rank, in the order of a sampler.

    With workers, torch's DataLoader runs them: at most `num_workers * prefetch` batches are made ahead, a worker that
    dies is a RuntimeError, an exception in one is raised here with its message, and each computes on one thread. What
    comes does not depend on the number of workers.
    """

    datasets: Sequence[Dataset]
    """Datasets in the order of their numbers."""
    sampler: Sampler
    """Which samples this rank takes, and in which order."""
    settings: GraphSettings | Sequence[GraphSettings] | None = None
    """How graphs are made, of all structures or of those of each dataset; None: as `GraphSettings` does by default."""
    dtype: torch.dtype = torch.float32
    """Type of distances, vectors and forces."""
    device: torch.device | str = "cpu"
    """Device of the batches. For CUDA they pass through pinned memory and are copied in the background."""
    num_workers: int = 0
    """Number of worker processes; 0: batches are made in this process, when asked for."""
    prefetch: int = 2
    """Batches that each worker makes ahead. They wait in shared memory, some 0.3 MB per 10 atoms of a slab."""
    start_method: Literal["fork", "forkserver", "spawn"] = "fork"
    """How workers start. "fork" takes milliseconds. Where this process has used OpenMP (GNU's), a forked one hangs as
    soon as it uses more than one thread: a dataset must not call `torch.set_num_threads`. The others take seconds,
    pickle the datasets and need a main module that can be imported; prefer them where an MPI library forbids forks."""

    def __post_init__(self) -> None:
        """Check that datasets, sampler and graph settings belong together.

        Raises:
            ValueError: naming the field that does not fit.
        """
        sizes = [len(dataset) for dataset in self.datasets]
        if list(self.sampler.sizes) != sizes:
            raise ValueError(f"sampler: expected the datasets' sizes {sizes}, got {list(self.sampler.sizes)}")
        if isinstance(self.settings, Sequence) and len(self.settings) != len(sizes):
            raise ValueError(f"settings: expected one or one per dataset ({len(sizes)}), got {len(self.settings)}")
        if self.start_method not in multiprocessing.get_all_start_methods():
            methods = multiprocessing.get_all_start_methods()
            raise ValueError(f"start_method: expected one of {methods}, got {self.start_method!r}")
        for name, least in (("num_workers", 0), ("prefetch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yield this rank's batches, one per step.

        Args:
            start: position of the first step: 0, or the `position` of the last batch before.
            stop: no step begins at or after this position. None: the end of the epoch that `start` is in.

        Raises:
            ValueError: if start is negative, a dataset is damaged, or no graph can be built of a structure.
            RuntimeError: if a worker dies, also in the middle of handing over a batch.
        """
        size, step = self.sampler.epoch_size, self.sampler.step_size
        if start < 0:
            raise ValueError(f"start: expected a position from 0 on, got {start}")
        positions = range(start, (start // size + 1) * size if stop is None else stop, step)
        requests = ((position + step, self.sampler.batch(position)) for position in positions)
        device = torch.device(self.device)
        workers = {"prefetch_factor": self.prefetch, "multiprocessing_context": self.start_method}
        loaded = DataLoader(
            _Maker(self),
            batch_size=None,
            sampler=(request for request in requests if len(request[1])),
            num_workers=self.num_workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # of its own: a run that goes on must not draw more numbers than one that ran
            **workers if self.num_workers else {},
        )
        try:
            for packed in _handed_over(loaded):
                yield packed.to(device).unpack()
        except Exception as error:
            # The traceback holds the workers' queues in a cycle. Garbage collection would close the queues before it
            # tells the workers to stop, and then wait 5 s for each.
            traceback.clear_frames(error.__traceback__)
            raise


def _handed_over(loaded: DataLoader[Packed]) -> Iterator[Packed]:
    """Yield what the workers make; a connection to one that breaks is a RuntimeError, as a worker's death is.

    The memory of a batch is handed over through a socket. Where a worker dies while it does that, torch can meet the
    broken socket before the system lists the process as ended, and then raises the socket's error as it is.
    """
    try:
        yield from loaded
    except (OSError, EOFError) as error:
        if not loaded.num_workers or "in DataLoader worker" in str(error):  # raised by a dataset: its type stays
            raise
        raise RuntimeError(f"a data worker exited, or could not hand over its batch: {error!r}") from error


class _Maker(TorchDataset[Packed]):
    """Makes the batch of each request, in a worker process."""

    def __init__(self, loader: Loader) -> None:
        self.datasets = list(loader.datasets)
        settings = loader.settings
        self.settings = (
            settings if isinstance(settings, Sequence) else [settings or GraphSettings()] * len(self.datasets)
        )
        self.dtype = loader.dtype

    def __getitem__(self, request: Request) -> Packed:
        position, pairs = request
        which = pairs[:, 0].tolist()
        structures = [self.datasets[d][i] for d, i in pairs.tolist()]
        try:
            batch = make_batch(
                structures,
                which,
                settings=[self.settings[d] for d in which],
                dtype=self.dtype,
                position=position,
            )
        except ValueError as error:
            names = [f"{self.datasets[d].info.name}[{i}]" for d, i in pairs.tolist()]
            raise ValueError(f"batch of {', '.join(names)}: {error}{self._blame(structures, which, names)}") from error
        return pack(batch)

    def _blame(self, structures: list[Structure], which: list[int], names: list[str]) -> str:
        """Return which structure of a batch cannot be used, with its id; "" if each by itself can."""
        for structure, d, name in zip(structures, which, names, strict=True):
            try:
                make_batch([structure], [d], settings=[self.settings[d]], dtype=self.dtype)
            except ValueError:
                return f" (in {name}, id {structure.id!r})"
        return ""
