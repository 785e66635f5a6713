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
OPTIONAL = (
    "epochs",
    "samples",
    "warmup_epochs",
    "cosine_steps",
    "cosine_epochs",
    "plateau_patience",
    "early_stop",
    "validate_epochs",
    "val_structures",
)
"""Settings that are positive integers or None."""
ALTERNATIVES = (
    ("steps", "epochs", "samples"),
    ("warmup_steps", "warmup_epochs"),
    ("cosine_steps", "cosine_epochs"),
    ("validate_every", "validate_epochs"),
)
"""Settings that say the same in different units; the second and third of each stand before the first."""
RANGES = {
    "lr": (0, 10),
    "clip": (0, float("inf")),
    "weight_decay": (-1, 10),
    "warmup_start": (-1, 1.0001),
    "cosine_end": (-1, 1.0001),
    "plateau_factor": (0, 1),
    "edge_dropout": (-1, 1),
    "max_seconds": (0, float("inf")),
    "ema": (0, 1),
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
    epochs: int | None = None
    """Length of the run in epochs of the training data, instead of `steps`."""
    samples: int | None = None
    """Length of the run in structures, those of all ranks together, instead of `steps`."""
    max_seconds: float | None = None
    """Training time after which a run ends, s; None: there is no limit. Validations and checkpoints do not count, the
    time before a resumption does. It is looked at every `log_every` steps."""
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
    """Number of steps in which the learning rate rises linearly to `lr`, which the last of them has."""
    warmup_epochs: int | None = None
    """Length of the warm-up in epochs of the training data, instead of `warmup_steps`."""
    warmup_start: float = 0.2
    """Learning rate at the first step, as a fraction of `lr`."""
    cosine_steps: int | None = None
    """Number of steps in which the cosine falls after the warm-up; None: all that are left."""
    cosine_epochs: int | None = None
    """Length of the cosine after the warm-up in epochs of the training data, instead of `cosine_steps`."""
    cosine_end: float = 0.1
    """Learning rate at the end of the cosine, as a fraction of `lr`. All parts of the model end there, also those whose
    largest learning rate is below `lr`."""
    plateau_patience: int | None = None
    """Validations without a better result after which the learning rate falls, once the cosine has ended."""
    plateau_factor: float = 0.8
    """What the learning rate is multiplied with each time `plateau_patience` runs out. A result is better if it is at
    least 1e-4 of the best below it; the rate falls by steps of more than 1e-8 only."""
    early_stop: int | None = None
    """Validations without a better result after which training ends; None: it goes on to the last step."""
    ema: float | None = 0.99
    """Decay of the averaged weights that are validated and saved; None: the weights themselves are."""
    edge_dropout: float = 0.0
    """Share of atom pairs that is left out of each training graph (JMP's pre-training: 0.1)."""
    precision: Precision = "fp32"
    """Precision of the model's linear layers; see `ejmp.JMP`. "int8" trains for predictions in 8 bits: rounded as
    there, in bfloat16, while derivatives pass the rounding; validations predict in 8 bits."""
    zero_stage: Literal[0, 1, 2] = 1
    """What DeepSpeed divides among the ranks: nothing (0), optimiser states (1), or gradients as well (2)."""
    seed: int = 0
    """Seed of the order of samples and of all random numbers."""
    validate_every: int = 1000
    """Number of steps between two validations."""
    validate_epochs: int | None = None
    """Epochs of the training data between two validations, instead of `validate_every`."""
    val_structures: int | None = None
    """Most structures of each dataset that a validation takes, always the same ones, chosen at random by `seed`; None:
    all of the validation split."""
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
        optional = {name: 1 for name in OPTIONAL if getattr(self, name) is not None}
        for name, low in {**INTEGERS, **optional}.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= MAX_STEPS:
                raise ValueError(f"TrainConfig.{name}: expected an integer from {low} on, got {value!r}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is None and name in ("max_seconds", "ema"):
                continue
            if not (isinstance(value, int | float) and max(low, 0) <= value and low < value < high):
                raise ValueError(f"TrainConfig.{name}: out of range: {value!r}")
        if self.epochs is not None and self.samples is not None:
            raise ValueError(f"TrainConfig: expected epochs or samples, got {self.epochs} and {self.samples}")
        if not all(0 <= beta < 1 for beta in self.betas) or len(self.betas) != 2:
            raise ValueError(f"TrainConfig.betas: expected two numbers in 0..1, got {self.betas!r}")
        if self.zero_stage not in (0, 1, 2) or self.clip_kind not in ("norm", "value"):
            raise ValueError(f"TrainConfig: no zero_stage {self.zero_stage!r} or clip_kind {self.clip_kind!r}")
        if self.precision == "fp8":
            raise ValueError('TrainConfig.precision: fp8 is for predictions; train at "int8" for 8 bits, or "bf16"')

    def in_steps(self, *, epoch_size: int, step_size: int) -> Self:
        """Return the settings with steps for all that counts epochs or structures; a part of a step counts as one.

        No number of steps becomes larger than a billion.

        Args:
            epoch_size: number of samples in an epoch of the training data.
            step_size: number of samples in a step, those of all ranks together.
        """
        per_epoch = -(-epoch_size // step_size)
        found = {} if self.samples is None else {"steps": -(-self.samples // step_size)}
        for steps, epochs, *_ in ALTERNATIVES:
            count = getattr(self, epochs)
            found |= {} if count is None else {steps: count * per_epoch}
        found = {name: min(count, MAX_STEPS) for name, count in found.items()}
        return dataclasses.replace(self, **found)

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
