"""The result of a loss function, which compares a model with labels or with a teacher."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The loss that a training step differentiates, and its parts for the log."""

    total: Tensor
    """Loss to differentiate, a scalar."""
    parts: dict[str, Tensor]
    """Parts of the loss by name, detached scalars."""
