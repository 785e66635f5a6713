"""The result of a loss function, which compares a model with labels or with a teacher."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The loss that a training step differentiates, and its parts for the log."""

    total: Tensor
    """Loss to differentiate, a scalar."""
    parts: dict[str, Tensor]
    """Parts of the loss by name, detached scalars."""


def mean_losses(found: Sequence[Losses]) -> Losses:
    """Return the mean of losses that have the same parts."""
    parts = {name: torch.stack([losses.parts[name] for losses in found]).mean() for name in found[0].parts}
    return Losses(total=torch.stack([losses.total for losses in found]).mean(), parts=parts)
