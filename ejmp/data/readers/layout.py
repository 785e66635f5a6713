"""What a dataset calls its arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a dataset calls its arrays of frames, and what its units are in eV and A."""

    numbers: str
    positions: str
    energy: str
    forces: str
    length: float = 1.0
    per_energy: float = 1.0
    per_force: float = 1.0
    targets: Mapping[str, float] = field(default_factory=dict)
    """By what the source calls them, the unit in eV."""
