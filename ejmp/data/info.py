"""What is known of a dataset as a whole, and what every dataset can be asked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ejmp.graph.structure import Structure

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and standard deviation of a label."""

    mean: float
    std: float
    unit: str


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """One split of a dataset: the contents of `dataset.json`."""

    name: str
    format: str
    split: str
    count: int
    source: str
    """Where it came from: a URL, a path, or how it was made."""
    licence: str
    linear_reference: Mapping[int, float] = field(default_factory=dict)
    """eV by atomic number: least squares of the training split's energy on element counts."""
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    """Of the training split: "energy" after the linear reference, "forces" (mean 0) by component, targets by name."""
    units: Mapping[str, str] = field(default_factory=lambda: {"length": "A", "energy": "eV", "forces": "eV/A"})
    schema_version: int = SCHEMA_VERSION


class Dataset(Protocol):
    """What a record store and the demo mix have in common."""

    info: DatasetInfo
    num_atoms: np.ndarray[Any, Any]
    """[len] atoms of each structure, memory-mapped where large."""
    num_edges: np.ndarray[Any, Any]
    """[len] estimated main edges of each structure, for balancing."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Structure: ...
