"""Learning rate, plateau, early stop and EMA: against torch's schedulers and closed forms."""

import copy
import json
import math

import pytest
import torch
from torch.optim import lr_scheduler

from ejmp.catalog import CATALOG, FINETUNING
from ejmp.train import presets
from ejmp.train.config import TrainConfig
from ejmp.train.ema import EMA
from ejmp.train.groups import LayerFactors, parameter_groups
from ejmp.train.schedule import EarlyStop, Plateau, Schedule, cut_short

NAN = float("nan")


def optimizer(lr=1.0):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates_by_hand(largest, base, per_epoch, patience, values):
    """Yield the learning rates of groups at each step of epochs that end with validations, by JMP's rules.

    Up to epoch 5 they rise linearly from a tenth of each group's own, until epoch 32 they fall along a cosine to a
    tenth of the base rate, and then torch's ReduceLROnPlateau has them.
    """
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in largest]
    held = torch.optim.SGD(groups)
    plateau = lr_scheduler.ReduceLROnPlateau(held, factor=0.8, patience=patience)
    warm, end = 5 * per_epoch, 32 * per_epoch
    for epoch, value in enumerate(values):
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            for group, lr in zip(held.param_groups, largest, strict=True):
                if step < warm:
                    group["lr"] = 0.1 * lr + 0.9 * lr * step / (warm - 1)
                elif step < end:
                    angle = math.pi / 2 * (step - warm) / (end - warm)
                    group["lr"] = lr * math.cos(angle) ** 2 + 0.1 * base * math.sin(angle) ** 2
            yield [group["lr"] for group in held.param_groups]
        if epoch == 31:
            for group in held.param_groups:
                group["lr"] = 0.1 * base
        if epoch >= 31:
            plateau.step(value)


@pytest.mark.parametrize("recipe", [None, *FINETUNING])
def test_rates_of_every_group_over_50_epochs(tiny, recipe):
    """The blocks start at rates of their own and end at one; improvements too small to count do not put off a fall."""
    config = presets.finetune(recipe and FINETUNING[recipe])
    world_size, size = 3, 501
    per_epoch = math.ceil(size / (config.batch_size * world_size))
    steps = config.in_steps(epoch_size=size, step_size=config.batch_size * world_size)
    factors = LayerFactors(blocks=(0.55, 0.40, 0.30))
    groups = parameter_groups(tiny, lr=steps.lr, weight_decay=steps.weight_decay, factors=factors)
    largest = [group["lr"] for group in groups]
    assert sorted(lr / 8e-5 for lr in largest) == pytest.approx([0.3, 0.3, 0.4, 0.55, 1.0])
    values = [10 * (1 - 2e-6) ** epoch for epoch in range(50)]
    patience = 10 if recipe == "aspirin" else 3
    ours = Schedule(steps)
    for step, expected in enumerate(rates_by_hand(largest, 8e-5, per_epoch, patience, values)):
        found = [ours.lr(step, lr) for lr in largest]
        assert found == pytest.approx(expected, rel=1e-12, abs=0)
        if (step + 1) % per_epoch == 0:
            assert steps.validate_every == per_epoch
            ours.validated(step + 1, values[step // per_epoch])
            state, ours = json.loads(json.dumps(ours.state_dict())), Schedule(steps)  # go on from a checkpoint
            ours.load_state_dict(state)
    assert step + 1 == 50 * per_epoch
    assert ours.plateau.falls == (1 if recipe == "aspirin" else 4)


def test_warmup_and_cosine_are_torchs():
    config = TrainConfig(lr=0.5, warmup_steps=8, warmup_start=0.2, cosine_steps=20, cosine_end=0.1)
    ours = Schedule(config)
    theirs = optimizer(0.5)
    warmup = lr_scheduler.LinearLR(theirs, start_factor=0.2, total_iters=7)
    flat = lr_scheduler.ConstantLR(theirs, factor=1.0)
    cosine = lr_scheduler.CosineAnnealingLR(theirs, T_max=20, eta_min=0.05)
    both = lr_scheduler.SequentialLR(theirs, [warmup, flat, cosine], milestones=[7, 8])
    for step in range(28):
        assert ours.lr(step, 0.5) == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
        theirs.step()
        both.step()
    assert [ours.lr(step, 0.5) for step in (0, 7, 8, 28, 1000)] == pytest.approx([0.1, 0.5, 0.5, 0.05, 0.05])


def test_cosine_to_the_end():
    ours = Schedule(TrainConfig(lr=1.0, steps=100, warmup_steps=20, cosine_end=0.0))
    assert ours.lr(60, 1.0) == pytest.approx(0.5)
    assert ours.lr(100, 1.0) == pytest.approx(0)
    assert Schedule(TrainConfig(warmup_steps=0)).lr(0, 0.3) == 0.3
    assert 0 < Schedule(TrainConfig(steps=10, warmup_steps=20)).lr(9, 1.0) < 1
    assert Schedule(TrainConfig(warmup_steps=1, warmup_start=0.2)).lr(0, 1.0) == 0.2


def test_a_group_below_the_end_of_the_cosine_stays_there():
    ours = Schedule(TrainConfig(lr=1.0, steps=100, warmup_steps=0, cosine_end=0.1))
    assert [ours.lr(step, 0.05) for step in (0, 50, 100)] == pytest.approx([0.05] * 3)


@pytest.mark.parametrize("patience", [1, 3])
def test_plateau_is_torchs(patience):
    """Also where improvements are too small to count, and where the rate is too small to fall."""
    values = torch.rand(120, generator=torch.Generator().manual_seed(0)).tolist()
    values[5] = NAN
    values[20] = min(v for v in values if not math.isnan(v)) * (1 - 9e-5)
    theirs = optimizer(2e-7)
    reference = lr_scheduler.ReduceLROnPlateau(theirs, factor=0.8, patience=patience)
    ours = Plateau(patience, 0.8)
    for i, value in enumerate(values):
        if i % 7 == 3:  # go on from a checkpoint
            state, ours = json.loads(json.dumps(ours.state_dict())), Plateau(patience, 0.8)
            ours.load_state_dict(state)
        reference.step(value)
        ours.update(value)
        assert ours.lowered(2e-7) == theirs.param_groups[0]["lr"]
    assert ours.falls > 10
    assert ours.lowered(2e-7) == pytest.approx(2e-7 * 0.8**7)  # 4.2e-8; the next fall would be 8.4e-9


@pytest.mark.parametrize("size", [1, 7, 100, 950, 10_000, 110_000, 10**8])
@pytest.mark.parametrize("world_size", [1, 8])
@pytest.mark.parametrize("preset", ["pretrain", "distill", "own frames", *FINETUNING])
def test_a_preset_ends_its_schedule_or_says_so(preset, size, world_size):
    """Fine-tuning always ends it; the others say so where the data is too small for 2000 steps of warm-up."""
    makers = {"pretrain": presets.pretrain, "distill": presets.distill, "own frames": presets.finetune}
    config = makers[preset]() if preset in makers else presets.finetune(FINETUNING[preset])
    step_size = config.batch_size * world_size
    steps = config.in_steps(epoch_size=size, step_size=step_size)
    last = Schedule(steps).lr(steps.steps - 1, steps.lr) / steps.lr
    said = cut_short(steps)
    if preset not in ("pretrain", "distill"):
        assert steps.steps == min(config.epochs * math.ceil(size / step_size), 10**9)
        ends = steps.steps >= 32 * math.ceil(size / step_size)
        assert ends == (said is None)
        assert ends or size == 10**8  # no run has more than a billion steps
    elif said is None:
        assert steps.steps > 2000
        assert last == pytest.approx(0.1, rel=1e-4)  # the step after it would be the end of the cosine
    else:
        assert steps.steps <= 2000
        assert f"after {steps.steps} steps inside the warm-up" in said
    if preset == "distill":
        assert steps.steps == math.ceil(1_800_000 / step_size)


def test_what_is_said_of_a_run_that_is_cut_short():
    config = TrainConfig(steps=20, warmup_steps=10, cosine_steps=30, lr=1.0)
    at_19 = 0.1 + 0.9 * (1 + math.cos(math.pi * 9 / 30)) / 2
    assert cut_short(config) == (
        f"the run ends after 20 steps inside the cosine of its learning rate, at {at_19:.3g} of the largest; warm-up "
        "and cosine take 40 steps"
    )
    assert cut_short(TrainConfig(steps=40, warmup_steps=10, cosine_steps=30)) is None
    assert "inside the warm-up" in cut_short(TrainConfig(steps=10, warmup_steps=10))
    for command in ("pretrain", "distill", "finetune"):
        assert cut_short(presets.demo(command)) is None


def test_presets_are_jmps():
    """Settings of the corrected specification, and of the configuration JMP's authors run all targets with."""
    shared = {"lr": 8e-5, "betas": (0.9, 0.95), "weight_decay": 0.1, "clip": 1.0, "clip_kind": "value", "ema": None}
    shared |= {"warmup_epochs": 5, "warmup_start": 0.1, "cosine_epochs": 27, "cosine_end": 0.1, "plateau_factor": 0.8}
    shared |= {"max_seconds": 604800.0, "validate_epochs": 1, "edge_dropout": 0.0}
    own = {
        "aspirin": (1, 10, 1000, 100_000),
        "qm9_u0": (48, 3, 50, 500),
        "solvated_amino_acids": (2, 3, 50, 500),
        "ac_ala3_nhme": (2, 3, 50, 500),
        "qmof_gap": (4, 3, 50, 500),
    }
    assert set(own) == set(FINETUNING)
    for name, expected in own.items():
        config = presets.finetune(FINETUNING[name])
        assert {key: getattr(config, key) for key in shared} == shared
        assert (config.batch_size, config.plateau_patience, config.early_stop, config.epochs) == expected
    pretraining = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "clip": 1.0, "clip_kind": "norm", "ema": 0.99}
    pretraining |= {"warmup_steps": 2000, "warmup_start": 0.2, "cosine_end": 0.1, "epochs": 2, "edge_dropout": 0.1}
    assert {key: getattr(presets.pretrain(), key) for key in pretraining} == pretraining
    assert {name: row.finetuning[0].reduction for name, row in CATALOG.items() if row.finetuning} == {
        "rmd17": "sum", "qm9": "sum", "spice": "sum", "md22": "sum", "qmof": "mean"
    }  # fmt: skip


def test_early_stop():
    stop = EarlyStop(2)
    assert [(stop.update(v), stop.stop) for v in (3.0, 2.0, 2.0, 1.0, NAN, 1.0)] == [
        (True, False),
        (True, False),
        (False, False),
        (True, False),
        (False, False),
        (False, True),
    ]
    again = EarlyStop(2)
    again.load_state_dict(json.loads(json.dumps(EarlyStop(2).state_dict())))
    assert again.best == math.inf
    again.load_state_dict(stop.state_dict())
    assert again.stop
    assert again.best == 1


def test_plateau_counts_after_the_cosine_only():
    config = TrainConfig(lr=1.0, warmup_steps=2, cosine_steps=8, plateau_patience=1, plateau_factor=0.5, cosine_end=0.1)
    schedule = Schedule(config)
    for step in range(10):
        schedule.validated(step, 1.0)
    assert schedule.lr(10, 1.0) == pytest.approx(0.1)
    for step in (10, 11, 12):
        schedule.validated(step, 1.0)
    assert schedule.lr(13, 1.0) == pytest.approx(0.05)
    resumed = Schedule(config)
    resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert resumed.lr(13, 1.0) == schedule.lr(13, 1.0)
    without = Schedule(TrainConfig())
    assert without.state_dict() == {}
    without.load_state_dict(schedule.state_dict())


def test_ema(tiny):
    model = copy.deepcopy(tiny)
    parameters = dict(model.named_parameters())
    ema = EMA(parameters, 0.9)
    begin = {name: p.detach().clone() for name, p in parameters.items()}
    for step in range(5):
        with torch.no_grad():
            for p in parameters.values():
                p.add_(step)
        ema.update()
    # parameters after the steps are begin + 0, 1, 3, 6, 10
    added = sum(0.1 * 0.9 ** (4 - i) * value for i, value in enumerate((0, 1, 3, 6, 10)))
    for name, p in parameters.items():
        assert torch.allclose(ema.averages[name], begin[name] + added, rtol=1e-12)
        assert torch.equal(p, begin[name] + 10)
    tied = model.backbone.out_blocks[0]
    with ema.swapped_in():
        assert torch.equal(
            parameters["embedding.atom_embedding.weight"], ema.averages["embedding.atom_embedding.weight"]
        )
        assert tied.seq_energy_pre[0].linear.weight is tied.layers[0].linear.weight
    with pytest.raises(KeyError), ema.swapped_in():
        raise KeyError
    for name, p in parameters.items():
        assert torch.equal(p, begin[name] + 10)


def test_ema_state():
    half = {"a": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), "b": torch.nn.Parameter(torch.zeros(2))}
    ema = EMA(half, 0.999)
    with torch.no_grad():
        half["a"].add_(1)
    ema.update()
    assert ema.averages["a"].tolist() == pytest.approx([1.001] * 3)  # bfloat16 would stay at 1
    with ema.swapped_in():
        assert half["a"].dtype == torch.bfloat16
    other = EMA(half, 0.999)
    other.load_state_dict({name: value.clone() for name, value in ema.state_dict().items()})
    assert all(torch.equal(other.averages[name], ema.averages[name]) for name in half)
    with pytest.raises(ValueError, match="different names, such as b"):
        other.load_state_dict({"a": torch.ones(3)})
    with pytest.raises(ValueError, match=r"b: expected \[2\], got \[3\]"):
        other.load_state_dict({"a": torch.ones(3), "b": torch.ones(3)})
    with pytest.raises(ValueError, match="decay: expected"):
        EMA(half, 1.0)
