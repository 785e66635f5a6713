"""What a training run is set to: one frozen dataclass and the paper's presets."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from ejmp.model.config import Precision

MAX_STEPS = 10**9
TERMS = "forces=1,node=1,edge=1"
"""What a student is distilled by: the paper's terms."""
DEMO_TERMS = f"{TERMS},labels=0.2"
"""The same for the demo, whose teacher is far from what its data could teach."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run that do not depend on model or data. Defaults are JMP's for pre-training (arXiv 2310.16802).

    Raises:
        ValueError: naming the setting that is out of range.
    """

    steps: int = 10_000
    """Optimiser steps to take in all."""
    batch_size: int = 4
    """Structures per rank and step."""
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest gradient norm ("norm"), or largest element ("value")."""
    clip_kind: Literal["norm", "value"] = "norm"
    warmup_steps: int = 2000
    warmup_start: float = 0.2
    """Of the learning rate, at the first step; it rises linearly."""
    cosine_steps: int | None = None
    """Steps in which the cosine falls after the warm-up; None: to the end."""
    cosine_end: float = 0.1
    """Of the learning rate, at the end of the cosine."""
    plateau_patience: int | None = None
    """Validations without a better result after which the learning rate falls, once the cosine has ended."""
    plateau_factor: float = 0.8
    early_stop: int | None = None
    """Validations without a better result after which training ends."""
    ema: float | None = 0.99
    """Decay of the averaged weights that are validated and saved; None: the weights themselves."""
    edge_dropout: float = 0.0
    """Share of pairs that are left out of each training graph (JMP's pre-training: 0.1)."""
    precision: Precision = "fp32"
    zero_stage: Literal[0, 1, 2] = 1
    """DeepSpeed: what is divided among the ranks: nothing, optimiser states, also gradients."""
    seed: int = 0
    validate_every: int = 1000
    """Steps."""
    checkpoint_every: int = 1000
    """Steps."""
    keep_checkpoints: int = 2
    log_every: int = 10
    """Steps."""
    num_workers: int = 0
    """Processes per rank that make batches."""

    def __post_init__(self) -> None:
        """Check the settings."""
        least = dict.fromkeys(("steps", "batch_size", "validate_every", "checkpoint_every", "keep_checkpoints"), 1)
        least |= {"log_every": 1, "warmup_steps": 0, "num_workers": 0, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= MAX_STEPS:
                raise ValueError(f"TrainConfig.{name}: expected an integer from {low} on, got {value!r}")
        for name in ("cosine_steps", "plateau_patience", "early_stop"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"TrainConfig.{name}: expected a positive integer or None, got {value!r}")
        ranges = {"lr": (0, 10), "clip": (0, float("inf")), "weight_decay": (-1, 10), "warmup_start": (-1, 1.0001)}
        ranges |= {"cosine_end": (-1, 1.0001), "plateau_factor": (0, 1), "edge_dropout": (-1, 1)}
        for name, (low, high) in ranges.items():
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
        """Return the settings, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Return the settings of `to_dict`.

        Raises:
            ValueError: for a name there is not, or a value out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(
                f"TrainConfig: unknown settings {', '.join(unknown)}; there are {', '.join(sorted(known))}"
            )
        return cls(**{**settings, "betas": tuple(settings.get("betas", (0.9, 0.95)))})


def pretrain() -> TrainConfig:
    """Return JMP's pre-training settings; `steps` has to be chosen for the data."""
    return TrainConfig(edge_dropout=0.1)


def distill() -> TrainConfig:
    """Return the paper's distillation settings: JMP's pre-training recipe without edge dropout, on few samples."""
    return TrainConfig()


def finetune() -> TrainConfig:
    """Return JMP's fine-tuning settings; warm-up (5 epochs) and cosine (32 epochs) follow from the data's size."""
    return TrainConfig(lr=8e-5, clip_kind="value", warmup_start=0.1, early_stop=50, plateau_patience=3)


def demo(command: Literal["pretrain", "distill", "finetune"]) -> TrainConfig:
    """Return settings for the demo model on the demo data: minutes on two cores."""
    small = TrainConfig(
        steps=900,
        batch_size=12,
        lr=3e-3,
        weight_decay=0.01,
        clip=10.0,
        warmup_steps=100,
        validate_every=450,
        checkpoint_every=450,
        log_every=25,
    )
    if command == "distill":
        return dataclasses.replace(small, steps=400, lr=1e-3, warmup_steps=20, validate_every=200, checkpoint_every=200)
    if command == "finetune":
        return dataclasses.replace(small, steps=400, batch_size=8, lr=1e-3, warmup_steps=40, validate_every=100)
    return small
