"""The result of a loss function, of labels or of a teacher."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What a training step differentiates, and what it logs."""

    total: Tensor
    """Scalar."""
    parts: dict[str, Tensor]
    """Detached scalars by name."""
