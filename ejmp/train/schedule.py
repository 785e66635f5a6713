"""The learning rate over a run, and early stopping; both watch the validations."""

import math
from collections.abc import Mapping
from typing import Any

from ejmp.train.config import TrainConfig

THRESHOLD = 1e-4
"""Share of the best validation by which another must be below it for the plateau to be over."""
SMALLEST_FALL = 1e-8
"""The learning rate does not fall by this much or less."""

FIXED = ("patience", "threshold", "reduction")
"""Attributes that are settings, not state."""


class _BestSoFar:
    """Keeps the lowest value so far and how many values came after it; NaN is never the lowest.

    Args:
        patience: number of values in a row that may miss the best.
        threshold: share of the best by which a value must be below it to be the lowest.
    """

    def __init__(self, patience: int, threshold: float = 0.0) -> None:
        self.patience = patience
        self.threshold = threshold
        self.best = math.inf
        self.since_best = 0

    def _note(self, value: float) -> bool:
        better = value < self.best * (1 - self.threshold)
        self.best = value if better else self.best
        self.since_best = 0 if better else self.since_best + 1
        return better

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, ready for JSON (an infinite best is None)."""
        state = {name: value for name, value in vars(self).items() if name not in FIXED}
        return {**state, "best": None if math.isinf(self.best) else self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one that `state_dict` returned."""
        for name in self.state_dict():
            setattr(self, name, state[name])
        self.best = math.inf if self.best is None else self.best


class Plateau(_BestSoFar):
    """Lowers the learning rate when more than `patience` values in a row were not below the best.

    It is torch's ReduceLROnPlateau with its defaults: relative threshold 1e-4, smallest fall 1e-8.

    Args:
        patience: number of values in a row that may miss the best before the learning rate falls.
        reduction: what the learning rate is multiplied with then.
    """

    def __init__(self, patience: int, reduction: float) -> None:
        super().__init__(patience, THRESHOLD)
        self.reduction = reduction
        self.falls = 0
        """Number of times the patience has run out."""

    def update(self, value: float) -> None:
        """Take the value of the next validation."""
        self._note(value)
        if self.since_best > self.patience:
            self.falls += 1
            self.since_best = 0

    def lowered(self, lr: float) -> float:
        """Return what a learning rate has become."""
        for _ in range(self.falls):
            if lr - lr * self.reduction <= SMALLEST_FALL:
                break
            lr *= self.reduction
        return lr


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
    """The learning rates over a run: linear warm-up, cosine, then falling on plateaus or constant, as JMP's."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.cosine_steps = config.cosine_steps or max(config.steps - config.warmup_steps, 1)
        patience = config.plateau_patience
        self.plateau = None if patience is None else Plateau(patience, config.plateau_factor)

    def lr(self, step: int, largest: float) -> float:
        """Return the learning rate of a parameter group at a step, counted from 0.

        Args:
            step: number of steps before.
            largest: the group's learning rate at the end of the warm-up. The cosine takes it to `cosine_end` times the
                configured learning rate, whatever it is; a group whose largest is below that stays at its largest.
        """
        config = self.config
        if step < config.warmup_steps:
            risen = step / max(config.warmup_steps - 1, 1)
            return largest * (config.warmup_start + (1 - config.warmup_start) * risen)
        done = min((step - config.warmup_steps) / self.cosine_steps, 1)
        end = min(config.cosine_end * config.lr, largest)
        lr = end + (largest - end) * (1 + math.cos(math.pi * done)) / 2
        return lr if self.plateau is None else self.plateau.lowered(lr)

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


def cut_short(config: TrainConfig) -> str | None:
    """Return what there is to say of a run that ends inside its warm-up or cosine; None of one that does not.

    Args:
        config: settings in steps; see `TrainConfig.in_steps`.
    """
    schedule = Schedule(config)
    end = config.warmup_steps + schedule.cosine_steps
    if config.steps >= end and config.steps > config.warmup_steps:
        return None
    part = "warm-up" if config.steps <= config.warmup_steps else "cosine"
    last = schedule.lr(config.steps - 1, config.lr) / config.lr
    return (
        f"the run ends after {config.steps} steps inside the {part} of its learning rate, at {last:.3g} of the "
        f"largest; warm-up and cosine take {end} steps"
    )
