"""A description of a dataset from one pass over it: linear reference, statistics and histograms."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ejmp.data.info import Dataset
from ejmp.data.store.stats import Tally
from ejmp.graph.structure import MAX_ATOMIC_NUMBER, Structure

_BINS = 16


@dataclass
class Histogram:
    """Counts of values between edges; values beyond the outer edges count in the first and last bin."""

    unit: str
    """Unit of the values; empty if they are counts."""
    edges: np.ndarray
    """Edges of the bins, [n + 1], ascending."""
    counts: np.ndarray = field(init=False)
    """Number of values in each bin, [n]."""

    def __post_init__(self) -> None:
        self.counts = np.zeros(len(self.edges) - 1, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count some values."""
        inner = np.clip(values, self.edges[0], self.edges[-1])
        self.counts += np.histogram(inner, self.edges)[0]


@dataclass(frozen=True, kw_only=True)
class Description:
    """What `describe` found."""

    tally: Tally
    """What the linear reference and the statistics follow from."""
    elements: dict[int, int]
    """Number of atoms of each element, by atomic number."""
    histograms: dict[str, Histogram]
    """Histograms by what they count."""


def describe(dataset: Dataset, progress: Callable[[int, int], None] | None = None) -> Description:
    """Read every structure of a dataset once, and collect statistics and histograms.

    Args:
        dataset: a store or any other dataset; its linear reference is subtracted before energies are counted.
        progress: called with the number of structures done and of all.

    Raises:
        DamagedRecord: if a structure cannot be read.
    """
    histograms = {"atoms": _count_histogram(dataset.num_atoms), "edges (estimate)": _count_histogram(dataset.num_edges)}
    energy = dataset.info.statistics.get("energy")
    if energy is not None and energy.std > 0:
        reach = np.linspace(-4, 4, _BINS + 1)
        histograms["energy less reference"] = Histogram("eV", energy.mean + energy.std * reach)
    forces = Histogram("eV/A", np.logspace(-4, 2, 13))
    tally, elements = Tally(), np.zeros(MAX_ATOMIC_NUMBER + 1, np.int64)
    for number in range(len(dataset)):
        structure = dataset[number]
        tally.add(structure)
        elements += np.bincount(structure.numbers, minlength=len(elements))
        if structure.energy is not None and "energy less reference" in histograms:
            histograms["energy less reference"].add(np.array([_less_reference(structure, dataset)]))
        if structure.forces is not None:
            forces.add(np.linalg.norm(structure.forces, axis=1))
        if progress is not None and (number % 100 == 99 or number + 1 == len(dataset)):
            progress(number + 1, len(dataset))
    if forces.counts.any():
        histograms["force on an atom"] = forces
    atoms = {int(z): int(elements[z]) for z in np.flatnonzero(elements)}
    return Description(tally=tally, elements=atoms, histograms=histograms)


def _count_histogram(values: np.ndarray) -> Histogram:
    low, high = int(values.min()), int(values.max()) + 1
    step = -(-(high - low) // _BINS)
    histogram = Histogram("", np.arange(low, high + step, step))
    histogram.add(values)
    return histogram


def _less_reference(structure: Structure, dataset: Dataset) -> float:
    reference = dataset.info.linear_reference
    assert structure.energy is not None
    return structure.energy - sum(reference.get(z, 0.0) for z in structure.numbers.tolist())
