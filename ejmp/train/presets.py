"""Training recipes: the paper's, and a short one for the demo model on the demo data."""

import dataclasses
from typing import Literal

from ejmp.train.config import TrainConfig

TERMS = "forces=1,node=1,edge=1"
"""The paper's distillation terms and their weights, as the flag --terms writes them."""
DEMO_TERMS = f"{TERMS},labels=0.2"
"""Distillation terms for the demo mix, with labels, because the demo teacher knows less than its data could teach."""


def pretrain() -> TrainConfig:
    """Return JMP's pre-training settings; `steps` has to be chosen for the data."""
    return TrainConfig(edge_dropout=0.1)


def distill() -> TrainConfig:
    """Return the paper's distillation settings: JMP's pre-training recipe without edge dropout, on few samples."""
    return TrainConfig()


def finetune() -> TrainConfig:
    """Return JMP's fine-tuning settings; warm-up (5 epochs) and cosine (32 epochs) follow from the data's size."""
    return TrainConfig(lr=8e-5, clip_kind="value", warmup_start=0.1, early_stop=50, plateau_patience=3)


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
