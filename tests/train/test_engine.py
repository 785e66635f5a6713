"""The DeepSpeed engine against plain torch, at stages 0, 1 and 2, with 1 and 2 processes (support/train_script.py)."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from support import train_model_script, train_script
from support.launching import SCRIPT, launch, results

from ejmp.train.config import TrainConfig
from ejmp.train.distributed import Ranks
from ejmp.train.engine import FIRST_SCALE, Engine, deepspeed_json
from ejmp.train.groups import scale_shared_gradients

STAGES = (0, 1, 2)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def seen(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("engine")
    return results(launch(request.param, "engine_scenarios", out), out, request.param)


def plain_torch(world_size, kind, clip):
    """Train as `train_script` does, on one process without DeepSpeed and in float64."""
    model = train_script.toy().double()
    config = TrainConfig()
    optimizer = torch.optim.AdamW(train_script.groups(model), betas=config.betas)
    base = [group["lr"] for group in optimizer.param_groups]
    norms, losses = [], []
    for step in range(5):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * (1 - 0.1 * step)
        parts = train_script.batches(step, 2)[:world_size]
        loss = sum((model(b.x.double(), b.head) - b.y).square().mean() for b in parts) / world_size
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(math.sqrt(sum(g.square().sum() for g in gradients)))
        losses.append(loss.item())
        if kind == "norm":
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        else:
            torch.nn.utils.clip_grad_value_(model.parameters(), clip)
        optimizer.step()
    state = {
        f"{moment}.{name}": optimizer.state[p][moment]
        for name, p in model.named_parameters()
        for moment in ("exp_avg", "exp_avg_sq")
        if p.requires_grad and p.numel()
    }
    return dict(model.named_parameters()), state, norms, losses


@pytest.mark.parametrize(("kind", "clip"), [("norm", 0.5), ("value", 0.05)])
def test_steps_are_those_of_plain_torch(seen, kind, clip):
    weights, moments, norms, losses = plain_torch(len(seen), kind, clip)
    assert max(norms) > clip
    for stage in STAGES:
        for rank, result in enumerate(seen):
            own = result[f"{kind}{stage}"]
            assert own["norms"] == pytest.approx(norms, rel=1e-5)
            assert own["losses"] == pytest.approx(losses, rel=1e-5)
            assert own["lrs"] == pytest.approx([0.01, 0.009, 0.008, 0.007, 0.006])
            for name, value in weights.items():
                found = torch.tensor(own["weights"][name], dtype=torch.float64).reshape(value.shape)
                torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6)
            assert set(own["moments"]) == (set(moments) if rank == 0 else set())
            for name in own["moments"]:
                found = torch.tensor(own["moments"][name], dtype=torch.float64)
                torch.testing.assert_close(found, moments[name], rtol=1e-4, atol=1e-9)


def test_a_step_that_is_not_finite_changes_nothing(seen):
    for stage in STAGES:
        for rank, result in enumerate(seen):
            (clean, *_), (poisoned, skipped, suspects, state) = result[f"poison{stage}"]
            assert poisoned == clean
            assert skipped == [False, False, True, True, False]
            assert state["skipped"] == 2
            assert state["skipped_in_row"] == 0
            poisoned_rank = len(seen) - 1
            assert suspects[2] == [f"s2h{rank}"]  # after the reduction nobody knows whose gradient it was
            assert suspects[3] == ([f"s3h{rank}"] if rank == poisoned_rank else [])


def test_it_gives_up_after_20_bad_steps(seen):
    for stage in STAGES:
        for result in seen:
            step, message = result[f"gave_up{stage}"]
            assert step == 19
            assert "20 steps in a row had a gradient that is not finite" in message


def test_fp16_finds_a_scale_that_does_not_overflow(seen):
    model = train_script.toy()
    x = train_script.batches(0, 1)[0].halves[0].x
    loss = (x.double() @ model.body.weight.double().T).sum(1).mean() * 4
    exact = torch.autograd.grad(loss, model.body.weight)[0].norm().item()
    for stage in STAGES:
        for result in seen:
            skipped, norms, state = result[f"half{stage}"]
            bad = skipped.index(False)
            assert 1 <= bad < 8
            assert not any(skipped[bad:])
            assert state["loss_scale"] == FIRST_SCALE / 2**bad
            if len(seen) == 1:
                assert norms[bad] == pytest.approx(exact, rel=2e-3)


def of_one_process(kind):
    """Return losses and gradient norms of `train_model_script` without DeepSpeed, both ranks' batches in turn."""
    model = train_model_script.model_of(kind)
    scale_shared_gradients(model)
    objective = train_model_script.objective_of(model, kind)
    optimizer = torch.optim.AdamW(train_model_script.groups(model), betas=TrainConfig().betas)
    seen = []
    for step in range(train_model_script.STEPS):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        losses = [objective(train_model_script.batch_of(step, rank)).total / 2 for rank in (0, 1)]
        for loss in losses:
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen.append([sum(losses).item(), norm.item()])
    return seen


def test_ranks_may_train_different_heads_of_a_model(tmp_path):
    """JMP with direct and with gradient forces: each rank's batches train another head than the other's."""
    script = SCRIPT.with_name("train_model_script.py")
    seen = results(launch(2, "real", tmp_path, script=script), tmp_path, 2)
    for kind in ("direct", "gradient"):
        expected = torch.tensor(of_one_process(kind))
        for stage in STAGES:
            for result in seen:
                found = torch.tensor(result[f"{kind}{stage}"])
                assert not found[:, 2].any()
                torch.testing.assert_close(found[:, :2], expected, rtol=1e-3, atol=0)
    for stage in STAGES:
        *_, (loss, norm, skipped) = seen[0][f"fp16{stage}"]
        assert not skipped
        assert math.isfinite(loss + norm)
        if len(seen[0][f"fp16{stage}"]) == train_model_script.STEPS:
            assert norm == pytest.approx(seen[0][f"direct{stage}"][-1][1], rel=0.1)


def test_json_is_what_deepspeed_takes():
    for stage in STAGES:
        made = deepspeed_json(TrainConfig(zero_stage=stage, batch_size=3, lr=0.5), 4)
        assert json.loads(json.dumps(made)) == made
        assert made["train_batch_size"] == 12
        assert made["zero_optimization"]["stage"] == stage
        assert made["optimizer"]["params"]["lr"] == 0.5


def test_what_cannot_be_trained_is_refused(monkeypatch):
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    model = train_script.toy()
    objective, groups = train_script.ToyObjective(model), train_script.groups(model)

    def engine(chosen, groups=groups):
        return Engine(chosen, groups, TrainConfig(), ranks)

    with pytest.raises(
        ValueError, match=r"groups: expected each of the 9 .* missing: model.empty, model.heads.0.weight"
    ):
        engine(objective, groups[:1])
    with pytest.raises(ValueError, match="groups: expected each"):
        engine(objective, [*groups, groups[0]])
    outside = train_script.ToyObjective(model)
    outside.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"inside objective\.model, got extra\.weight, extra\.bias"):
        engine(outside, [*groups, {"params": list(outside.extra.parameters()), "lr": 1.0}])
    double = train_script.toy().double()
    with pytest.raises(ValueError, match=r"float32 parameters, got \['torch.float64'\]"):
        engine(train_script.ToyObjective(double), train_script.groups(double))
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install ejmp\[train\]"):
        engine(SimpleNamespace())
