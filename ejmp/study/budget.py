"""How much work the runs of a study may take, and the training settings that follow; needs no torch."""

import dataclasses
import math
from dataclasses import dataclass

from ejmp.catalog import Finetuning
from ejmp.train import presets
from ejmp.train.config import TrainConfig

CHECKPOINTS = 4
"""Least number of checkpoints of a run, so that an interruption costs a quarter of it at most."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Lengths of the runs of a study.

    Raises:
        ValueError: if a number is not positive.
    """

    distill_steps: int | None
    """Steps of a distillation, and of its control from random weights; None: 1.8 million structures."""
    finetune_steps: int | None
    """Steps of a fine-tuning run, the same for all numbers of blocks; None: as many as JMP's recipe has."""
    finetune_seconds: float | None
    """Training time of a fine-tuning run, twice that on QM9, s; None: there is no limit, so that it can be repeated."""
    validations: int | None
    """Validations during a fine-tuning run, at equal distances: the points of Figure 4; None: one per epoch."""
    distill_validations: int | None
    """Validations during a distillation, the best of which counts; None: as often as in pre-training."""
    val_structures: int | None
    """Most validation structures of each pre-training dataset, the same ones in all runs; None: all."""
    relevance_structures: int
    """Most structures of each dataset for the relevance of blocks."""
    inference_batch: int
    """Structures in the batch that is timed."""
    inference_seconds: float
    """Time for timing all numbers of blocks by turns, s."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"Budget.{name}: expected a positive number, got {value!r}")


DEMO = Budget(
    distill_steps=400,
    finetune_steps=60,
    finetune_seconds=None,
    validations=6,
    distill_validations=1,
    val_structures=None,
    relevance_structures=32,
    inference_batch=8,
    inference_seconds=30.0,
)
"""Lengths on the demo data: Table 1 of one seed takes 6 minutes on two cores of 2025, everything half an hour."""
FULL = Budget(
    distill_steps=None,
    finetune_steps=None,
    finetune_seconds=24 * 3600.0,
    validations=None,
    distill_validations=None,
    val_structures=10_000,
    relevance_structures=1000,
    inference_batch=4,
    inference_seconds=120.0,
)
"""Lengths on the real data: the paper's, a GPU-day for each fine-tuning run, two for QM9."""
SEEDS, FINETUNE_SEEDS = 3, 1
"""Seeds of each distillation and of each fine-tuning run, unless somebody asks for others."""


def distill_config(budget: Budget, *, demo: bool, blocks: int | None, seed: int) -> TrainConfig:
    """Return the settings of a distillation into a student of so many blocks."""
    config = presets.demo("distill", blocks=blocks) if demo else presets.distill()
    return _scaled(config, budget.distill_steps, budget.distill_validations, seed)


def scratch_config(budget: Budget, *, demo: bool, seed: int) -> TrainConfig:
    """Return the settings of training from random weights for as many steps as a distillation."""
    config = presets.demo("pretrain") if demo else presets.pretrain()
    config = dataclasses.replace(config, epochs=None, samples=None if demo else presets.DISTILLATION_SAMPLES)
    return _scaled(config, budget.distill_steps, budget.distill_validations, seed)


def finetune_config(budget: Budget, *, recipe: Finetuning | None, seed: int) -> TrainConfig:
    """Return the settings of a fine-tuning run.

    Args:
        budget: lengths of the runs.
        recipe: JMP's recipe for the task; None: the demo's.
        seed: seed of the run.
    """
    config = presets.demo("finetune") if recipe is None else presets.finetune(recipe)
    if budget.finetune_seconds is not None:
        times = 2 if recipe is not None and recipe.task == "qm9_u0" else 1
        config = dataclasses.replace(config, max_seconds=times * budget.finetune_seconds)
    return _scaled(config, budget.finetune_steps, budget.validations, seed)


def _scaled(config: TrainConfig, steps: int | None, validations: int | None, seed: int) -> TrainConfig:
    """Return settings for fewer steps: a warm-up of a sixth, and checkpoints often enough to go on from.

    Args:
        config: a recipe.
        steps: number of steps; None: the recipe's length, warm-up, cosine and validations stay.
        validations: number of validations at equal distances.
        seed: seed of the run.
    """
    if steps is None:
        return dataclasses.replace(config, seed=seed)
    every = math.ceil(steps / (validations or 10))
    return dataclasses.replace(
        config,
        steps=steps,
        epochs=None,
        samples=None,
        seed=seed,
        warmup_steps=min(config.warmup_steps, steps // 6),
        warmup_epochs=None,
        cosine_steps=None,
        cosine_epochs=None,
        validate_every=every,
        validate_epochs=None,
        checkpoint_every=min(1000, math.ceil(steps / CHECKPOINTS)),
        log_every=min(config.log_every, max(1, every // 2)),
    )
