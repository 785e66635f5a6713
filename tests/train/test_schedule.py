"""Learning rate, plateau, early stop and EMA: against torch's schedulers and closed forms."""

import copy
import json
import math

import pytest
import torch
from torch.optim import lr_scheduler

from ejmp.train.config import TrainConfig
from ejmp.train.ema import EMA
from ejmp.train.schedule import EarlyStop, Plateau, Schedule

NAN = float("nan")


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def test_warmup_and_cosine_are_torchs():
    config = TrainConfig(warmup_steps=7, warmup_start=0.2, cosine_steps=20, cosine_end=0.1)
    ours = Schedule(config)
    theirs = optimizer()
    warmup = lr_scheduler.LinearLR(theirs, start_factor=0.2, total_iters=7)
    cosine = lr_scheduler.CosineAnnealingLR(theirs, T_max=20, eta_min=0.1)
    both = lr_scheduler.SequentialLR(theirs, [warmup, cosine], milestones=[7])
    for step in range(27):
        assert ours.factor(step) == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
        theirs.step()
        both.step()
    assert [ours.factor(step) for step in (0, 7, 27, 1000)] == pytest.approx([0.2, 1.0, 0.1, 0.1])


def test_cosine_to_the_end():
    ours = Schedule(TrainConfig(steps=100, warmup_steps=20, cosine_end=0.0))
    assert ours.factor(60) == pytest.approx(0.5)
    assert ours.factor(100) == pytest.approx(0)
    assert Schedule(TrainConfig(warmup_steps=0)).factor(0) == 1
    assert 0 < Schedule(TrainConfig(steps=10, warmup_steps=20)).factor(9) < 1


@pytest.mark.parametrize("patience", [1, 3])
def test_plateau_is_torchs(patience):
    values = torch.rand(60, generator=torch.Generator().manual_seed(0)).tolist()
    values[5] = NAN
    theirs = optimizer()
    reference = lr_scheduler.ReduceLROnPlateau(theirs, factor=0.8, patience=patience, threshold=0.0)
    ours = Plateau(patience, 0.8)
    for i, value in enumerate(values):
        if i % 7 == 3:  # go on from a checkpoint
            state, ours = json.loads(json.dumps(ours.state_dict())), Plateau(patience, 0.8)
            ours.load_state_dict(state)
        reference.step(value)
        ours.update(value)
        assert ours.factor == pytest.approx(theirs.param_groups[0]["lr"])
    assert ours.factor < 0.8


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
    config = TrainConfig(warmup_steps=2, cosine_steps=8, plateau_patience=1, plateau_factor=0.5, cosine_end=0.1)
    schedule = Schedule(config)
    for step in range(10):
        schedule.validated(step, 1.0)
    assert schedule.factor(10) == pytest.approx(0.1)
    for step in (10, 11, 12):
        schedule.validated(step, 1.0)
    assert schedule.factor(13) == pytest.approx(0.05)
    resumed = Schedule(config)
    resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert resumed.factor(13) == schedule.factor(13)
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
