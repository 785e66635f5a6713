"""Training recipes: the paper's, and a short one for the demo model on the demo data."""

import dataclasses
from typing import Literal

from ejmp.catalog import Finetuning
from ejmp.train.config import TrainConfig

DISTILLATION_SAMPLES = 1_800_000
"""Structures of a distillation by default: 1.5% of JMP's 120 million, the most that the paper needs."""
ON_LARGE_DATA = TrainConfig(validate_every=10_000, val_structures=10_000)
"""Settings of a run on JMP's mix, whose validation splits have millions of structures: 10,000 of each are taken."""
TERMS = "forces=1,node=1,edge=1"
"""The paper's distillation terms and their weights, as the flag --terms writes them."""
DEMO_TERMS = f"{TERMS},labels=0.1"
"""Distillation terms for the demo mix: with labels, which help a student that sees few samples."""


def pretrain() -> TrainConfig:
    """Return JMP's pre-training settings: two epochs of the mix, warm-up and cosine included."""
    return dataclasses.replace(ON_LARGE_DATA, epochs=2, edge_dropout=0.1)


def distill() -> TrainConfig:
    """Return the paper's distillation settings: JMP's pre-training recipe without edge dropout, on few samples."""
    return dataclasses.replace(ON_LARGE_DATA, samples=DISTILLATION_SAMPLES)


def finetune(recipe: Finetuning | None = None) -> TrainConfig:
    """Return JMP's fine-tuning settings, in epochs of the data: 5 of warm-up, 27 of cosine, then falling on plateaus.

    Args:
        recipe: task whose own numbers replace those that most tasks share; None: data of the user's own.
    """
    shared = TrainConfig(
        epochs=500,
        max_seconds=7 * 24 * 3600.0,
        lr=8e-5,
        clip_kind="value",
        warmup_epochs=5,
        warmup_start=0.1,
        cosine_epochs=27,
        plateau_patience=3,
        early_stop=50,
        ema=None,
        validate_epochs=1,
    )
    if recipe is None:
        return shared
    return dataclasses.replace(
        shared,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        plateau_patience=recipe.plateau_patience,
        early_stop=recipe.early_stop,
    )


def teacher() -> TrainConfig:
    """Return settings for the demo teacher that ships, an hour of one core; see `ejmp.train.make_teacher`."""
    return TrainConfig(
        steps=5000,
        batch_size=16,
        lr=3e-3,
        weight_decay=0.01,
        clip=10.0,
        warmup_steps=300,
        cosine_end=0.02,
        ema=0.995,
        validate_every=1000,
        checkpoint_every=500,
        log_every=100,
    )


def demo(command: Literal["pretrain", "distill", "finetune"], *, blocks: int | None = None) -> TrainConfig:
    """Return settings for the demo model on the demo data: minutes on two cores.

    Args:
        command: what is done with it.
        blocks: number of the demo teacher's six blocks that a student keeps. One that keeps five starts so near its
            teacher that the learning rate of the others would first lead it away.
    """
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
        return dataclasses.replace(
            small,
            steps=400,
            lr=1e-3 if blocks == 5 else 2e-3,
            warmup_steps=20,
            cosine_end=0.01,
            validate_every=200,
            checkpoint_every=200,
        )
    if command == "finetune":
        return dataclasses.replace(small, steps=400, batch_size=8, lr=1e-3, warmup_steps=40, validate_every=100)
    return small
