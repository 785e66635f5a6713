"""The learning rate over a run, and early stopping; both watch the validations."""

import math
from collections.abc import Mapping
from typing import Any

from ejmp.train.config import TrainConfig


class _BestSoFar:
    """Keeps the lowest value so far and how many values came after it; NaN is never the lowest."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best = math.inf
        self.since_best = 0

    def _note(self, value: float) -> bool:
        better = value < self.best
        self.best = value if better else self.best
        self.since_best = 0 if better else self.since_best + 1
        return better

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, ready for JSON (an infinite best is None)."""
        state = {name: value for name, value in vars(self).items() if name not in ("patience", "reduction")}
        return {**state, "best": None if math.isinf(self.best) else self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one that `state_dict` returned."""
        for name in self.state_dict():
            setattr(self, name, state[name])
        self.best = math.inf if self.best is None else self.best


class Plateau(_BestSoFar):
    """Lowers a factor when more than `patience` values in a row were not below the best (torch's ReduceLROnPlateau).

    Args:
        patience: number of values in a row that may miss the best before the factor falls.
        reduction: what the factor is multiplied with then.
    """

    def __init__(self, patience: int, reduction: float) -> None:
        super().__init__(patience)
        self.reduction = reduction
        self.factor = 1.0
        """Present factor of the learning rate."""

    def update(self, value: float) -> None:
        """Take the value of the next validation."""
        self._note(value)
        if self.since_best > self.patience:
            self.factor *= self.reduction
            self.since_best = 0


class EarlyStop(_BestSoFar):
    """Says when `patience` values in a row were not below the best."""

    def update(self, value: float) -> bool:
        """Take the value of the next validation; return whether it is the best so far."""
        return self._note(value)

    @property
    def stop(self) -> bool:
        """Whether to end training."""
        return self.since_best >= self.patience


class Schedule:
    """The learning rate over its configured value: linear warm-up, cosine, then falling on plateaus or constant."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.cosine_steps = config.cosine_steps or max(config.steps - config.warmup_steps, 1)
        patience = config.plateau_patience
        self.plateau = None if patience is None else Plateau(patience, config.plateau_factor)

    def factor(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0, over the configured learning rate."""
        config = self.config
        if step < config.warmup_steps:
            return config.warmup_start + (1 - config.warmup_start) * step / config.warmup_steps
        done = min((step - config.warmup_steps) / self.cosine_steps, 1)
        cosine = config.cosine_end + (1 - config.cosine_end) * (1 + math.cos(math.pi * done)) / 2
        return cosine * (1 if self.plateau is None else self.plateau.factor)

    def validated(self, step: int, value: float) -> None:
        """Take the value of a validation after some number of steps; only those after the cosine can lower the rate."""
        if self.plateau is not None and step >= self.config.warmup_steps + self.cosine_steps:
            self.plateau.update(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, which is all but the step, ready for JSON."""
        return {} if self.plateau is None else {"plateau": self.plateau.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one that `state_dict` returned; one without a plateau changes nothing."""
        if self.plateau is not None and "plateau" in state:
            self.plateau.load_state_dict(state["plateau"])
