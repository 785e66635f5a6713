"""The facts about a dataset as a whole, and the interface that every dataset has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import numpy as np

    from ejmp.graph.structure import Structure

SCHEMA_VERSION = 1
"""Version of the contents of `dataset.json`."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and standard deviation of one label over the training split."""

    mean: float
    """Mean, in the label's unit."""
    std: float
    """Standard deviation, in the label's unit."""
    unit: str
    """Unit of the label; empty if it is not known."""


@dataclass(frozen=True, kw_only=True)
class LabelRow:
    """One array of a source, and the label that it became."""

    array: str
    """Name of the array in the source, and its shape if it has one."""
    per: str
    """Whether it has values per "atom" or one per "structure"."""
    label: str
    """Label that it became, with its unit where the source states one; or "not read"."""
    structures: int
    """Number of structures that have it."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What is known of one split of a dataset: the contents of `dataset.json`."""

    name: str
    """Name of the dataset."""
    format: str
    """Format it was converted from, a name of `ejmp.data.read.FORMATS`, "custom" or "demo"."""
    split: str
    """Name of the split."""
    count: int
    """Number of structures in the split."""
    source: str
    """Where the structures came from: a URL, a path, or how they were made."""
    licence: str
    """Licence of the data."""
    linear_reference: Mapping[int, float] = field(default_factory=dict)
    """Energy of each element, eV by atomic number: least squares of the training split's energy on element counts."""
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    """Statistics of the training split: "energy" after the linear reference, "forces" (mean 0) by component, and every
    target by its name."""
    units: Mapping[str, str] = field(default_factory=lambda: {"length": "A", "energy": "eV", "forces": "eV/A"})
    """Unit of each physical quantity."""
    labels: Sequence[LabelRow] = ()
    """What each array of the source became; empty for stores that are older than this table."""
    schema_version: int = SCHEMA_VERSION
    """Version of these fields."""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Return the information whose fields JSON has kept, with numbers as text and statistics as mappings."""
        reference = {int(number): energy for number, energy in fields["linear_reference"].items()}
        statistics = {label: Statistics(**values) for label, values in fields["statistics"].items()}
        labels = [LabelRow(**row) for row in fields.get("labels", ())]
        return cls(**{**fields, "linear_reference": reference, "statistics": statistics, "labels": labels})


class Dataset(Protocol):
    """The interface that record stores and demo datasets have in common: structures by their number."""

    info: DatasetInfo
    """What is known of the dataset as a whole."""
    num_atoms: "np.ndarray[Any, Any]"
    """Atoms of each structure, [len]; memory-mapped if it is large."""
    num_edges: "np.ndarray[Any, Any]"
    """Estimated main edges of each structure, [len], by which the work of ranks is balanced."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> "Structure": ...
