"""How much work the runs of a study may take, and the training settings that follow; needs no torch."""

import dataclasses
import math
from dataclasses import dataclass

from ejmp.catalog import CATALOG
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

    distill_steps: int
    """Steps of a distillation, and of its control from random weights."""
    finetune_steps: int | None
    """Steps of a fine-tuning run, the same for all numbers of blocks; None: 32 epochs, JMP's warm-up and cosine."""
    validations: int
    """Validations during a fine-tuning run, at equal distances: the points of Figure 4."""
    distill_validations: int
    """Validations during a distillation, the best of which counts."""
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
    distill_steps=150,
    finetune_steps=60,
    validations=6,
    distill_validations=1,
    relevance_structures=32,
    inference_batch=8,
    inference_seconds=30.0,
)
"""Lengths on the demo data: Table 1 within 9 minutes, everything within 45 minutes on two cores."""
FULL = Budget(
    distill_steps=425_000,
    finetune_steps=None,
    validations=32,
    distill_validations=10,
    relevance_structures=1000,
    inference_batch=4,
    inference_seconds=120.0,
)
"""Lengths on the real data: distillation on 1.7 million samples in batches of 4, below 1.5% of 120 million."""
SEEDS, FINETUNE_SEEDS = 3, 1
"""Seeds of each distillation and of each fine-tuning run, unless somebody asks for others."""


def distill_config(budget: Budget, *, demo: bool, seed: int) -> TrainConfig:
    """Return the settings of a distillation."""
    config = presets.demo("distill") if demo else presets.distill()
    return _scaled(config, budget.distill_steps, budget.distill_validations, seed)


def scratch_config(budget: Budget, *, demo: bool, seed: int) -> TrainConfig:
    """Return the settings of training from random weights for as many steps as a distillation."""
    config = presets.demo("pretrain") if demo else presets.pretrain()
    return _scaled(config, budget.distill_steps, budget.distill_validations, seed)


def finetune_config(budget: Budget, *, demo: bool, seed: int, dataset: str, structures: int) -> TrainConfig:
    """Return the settings of a fine-tuning run: on real data JMP's for the dataset, warm-up and cosine included.

    Args:
        budget: lengths of the runs.
        demo: whether the data is the demo's.
        seed: seed of the run.
        dataset: name of the dataset.
        structures: number of structures in its training split.
    """
    config = presets.demo("finetune") if demo else presets.finetune(CATALOG[dataset].finetuning[0])
    if budget.finetune_steps is not None:
        return _scaled(config, budget.finetune_steps, budget.validations, seed)
    whole = (config.warmup_epochs or 0) + (config.cosine_epochs or 0)
    config = dataclasses.replace(config, epochs=whole, seed=seed)
    return config.in_steps(epoch_size=structures, step_size=config.batch_size)


def _scaled(config: TrainConfig, steps: int, validations: int, seed: int) -> TrainConfig:
    """Return settings for fewer steps: a warm-up of a sixth at most, and checkpoints often enough to go on from."""
    every = math.ceil(steps / validations)
    return dataclasses.replace(
        config,
        steps=steps,
        epochs=None,
        samples=None,
        warmup_epochs=None,
        cosine_epochs=None,
        validate_epochs=None,
        seed=seed,
        warmup_steps=min(config.warmup_steps, steps // 6),
        validate_every=every,
        checkpoint_every=min(1000, math.ceil(steps / CHECKPOINTS)),
        log_every=min(config.log_every, max(1, every // 2)),
    )
