"""The layout of a dataset: names and units of its arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The names of a dataset's arrays of frames, and the sizes of its units."""

    numbers: str
    """Name of the atomic numbers."""
    positions: str
    """Name of the positions."""
    energy: str
    """Name of the total energies."""
    forces: str
    """Name of the forces, or of the gradients if their unit is negative."""
    length_unit: float = 1.0
    """Unit of the positions, A."""
    energy_unit: float = 1.0
    """Unit of the energies, eV."""
    force_unit: float = 1.0
    """Unit of the forces, eV/A."""
    targets: Mapping[str, float] = field(default_factory=dict)
    """Names of the other labels, and the unit of each, eV."""
