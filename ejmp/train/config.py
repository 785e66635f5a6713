"""The settings of a training run: one frozen dataclass that checks itself. `presets` has the recipes."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from ejmp.model.config import Precision

MAX_STEPS = 10**9
INTEGERS = {
    "steps": 1,
    "batch_size": 1,
    "validate_every": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "log_every": 1,
    "warmup_steps": 0,
    "num_workers": 0,
    "seed": 0,
}
"""The smallest value of each setting that counts something."""
OPTIONAL_INTEGERS = ("cosine_steps", "plateau_patience", "early_stop")
RANGES = {
    "lr": (0, 10),
    "clip": (0, float("inf")),
    "weight_decay": (-1, 10),
    "warmup_start": (-1, 1.0001),
    "cosine_end": (-1, 1.0001),
    "plateau_factor": (0, 1),
    "edge_dropout": (-1, 1),
}
"""Open intervals of the settings that are real numbers, none of which may be negative."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run that do not depend on model or data. Defaults are JMP's for pre-training (arXiv 2310.16802).

    Raises:
        ValueError: naming the setting that is out of range.
    """

    steps: int = 10_000
    """Number of optimiser steps in the whole run."""
    batch_size: int = 4
    """Number of structures per rank and step."""
    lr: float = 3e-4
    """Largest learning rate: the one at the end of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moments."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    clip: float = 1.0
    """Largest gradient norm (`clip_kind` "norm") or largest gradient element ("value")."""
    clip_kind: Literal["norm", "value"] = "norm"
    """What `clip` limits: the norm of the whole gradient, or each of its elements."""
    warmup_steps: int = 2000
    """Number of steps in which the learning rate rises linearly to `lr`."""
    warmup_start: float = 0.2
    """Learning rate at the first step, as a fraction of `lr`."""
    cosine_steps: int | None = None
    """Number of steps in which the cosine falls after the warm-up; None: all that are left."""
    cosine_end: float = 0.1
    """Learning rate at the end of the cosine, as a fraction of `lr`."""
    plateau_patience: int | None = None
    """Validations without a better result after which the learning rate falls, once the cosine has ended."""
    plateau_factor: float = 0.8
    """What the learning rate is multiplied with each time `plateau_patience` runs out."""
    early_stop: int | None = None
    """Validations without a better result after which training ends; None: it goes on to the last step."""
    ema: float | None = 0.99
    """Decay of the averaged weights that are validated and saved; None: the weights themselves are."""
    edge_dropout: float = 0.0
    """Share of atom pairs that is left out of each training graph (JMP's pre-training: 0.1)."""
    precision: Precision = "fp32"
    """Precision of the model's linear layers; see `ejmp.JMP`."""
    zero_stage: Literal[0, 1, 2] = 1
    """What DeepSpeed divides among the ranks: nothing (0), optimiser states (1), or gradients as well (2)."""
    seed: int = 0
    """Seed of the order of samples and of all random numbers."""
    validate_every: int = 1000
    """Number of steps between two validations."""
    checkpoint_every: int = 1000
    """Number of steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    log_every: int = 10
    """Number of steps between two lines of the log."""
    num_workers: int = 0
    """Number of processes per rank that make batches; 0: the training process does."""

    def __post_init__(self) -> None:
        """Check the settings."""
        for name, low in INTEGERS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= MAX_STEPS:
                raise ValueError(f"TrainConfig.{name}: expected an integer from {low} on, got {value!r}")
        for name in OPTIONAL_INTEGERS:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"TrainConfig.{name}: expected a positive integer or None, got {value!r}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not (isinstance(value, int | float) and max(low, 0) <= value and low < value < high):
                raise ValueError(f"TrainConfig.{name}: out of range: {value!r}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"TrainConfig.ema: expected a decay between 0 and 1, or None, got {self.ema!r}")
        if not all(0 <= beta < 1 for beta in self.betas) or len(self.betas) != 2:
            raise ValueError(f"TrainConfig.betas: expected two numbers in 0..1, got {self.betas!r}")
        if self.zero_stage not in (0, 1, 2) or self.clip_kind not in ("norm", "value"):
            raise ValueError(f"TrainConfig: no zero_stage {self.zero_stage!r} or clip_kind {self.clip_kind!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dictionary that is ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Make a config of settings by name, as `to_dict` returns them.

        Raises:
            ValueError: for a name that does not exist, or a value out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(
                f"TrainConfig: unknown settings {', '.join(unknown)}; there are {', '.join(sorted(known))}"
            )
        return cls(**{**settings, "betas": tuple(settings.get("betas", (0.9, 0.95)))})
