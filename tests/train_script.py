"""What the tests of training run in several processes: `python train_script.py SCENARIO [ARGUMENTS]`.

Each rank writes what it saw to OUT/rank<r>.json.
"""

import copy
import hashlib
import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ejmp.train.config import TrainConfig
from ejmp.train.engine import Engine
from ejmp.train.faults import session


@dataclass
class Losses:
    total: torch.Tensor
    parts: dict


class Toy(nn.Module):
    """A body and two heads, of which a sample trains one; one parameter is empty, one is frozen."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 7)
        self.heads = nn.ModuleList(nn.Linear(7, 1) for _ in range(3))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)

    def forward(self, x, head):
        return self.heads[head](torch.tanh(self.body(x)) * self.frozen)


class Objective(nn.Module):
    def __init__(self, model, half=False):
        super().__init__()
        self.model, self.half = model, half

    def forward(self, batch):
        if self.half:  # gradients pass through float16, as in a model that computes in it
            x = (batch.x.half() @ self.model.body.weight.half().T).float()
            total = x.sum(1).mean() * 4.0 + 0 * self.model.heads[0].weight.sum()
        else:
            total = (self.model(batch.x, batch.head) - batch.y).square().mean()
        if batch.poison == "loss":
            total = total * float("nan")
        if batch.poison == "gradient":
            total = total + _bad_gradient(self.model.body.bias)
        return Losses(total, {"energy": total.detach()})


def _bad_gradient(parameter):
    """0, with an infinite gradient."""
    zero = (parameter - parameter.detach()).sum()
    return torch.where(zero == 0, zero * torch.tensor(float("inf")), zero).nan_to_num(0.0)


def toy():
    torch.manual_seed(0)
    return Toy()


def groups(model):
    body = [p for p in model.body.parameters() if p.requires_grad]
    rest = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("body")]
    return [{"params": body, "lr": 0.01, "weight_decay": 0.1}, {"params": rest, "lr": 0.02, "weight_decay": 0.0}]


def batches(step, world_size, poison=None):
    """One batch per rank of the step's eight samples: the first half trains head 0, the second head 1."""
    generator = torch.Generator().manual_seed(100 + step)
    x, y = torch.randn(8, 5, generator=generator), torch.randn(8, 1, generator=generator)
    halves = [
        types.SimpleNamespace(
            x=x[4 * h : 4 * h + 4], y=y[4 * h : 4 * h + 4], head=h, poison=None, ids=(f"s{step}h{h}",)
        )
        for h in range(2)
    ]
    if poison:
        halves[1].poison = poison
    return halves if world_size == 2 else [types.SimpleNamespace(halves=halves)]


def settings(stage, **changes):
    return TrainConfig(zero_stage=stage, **changes)


def digest(tensors):
    code = hashlib.blake2b()
    for name in sorted(tensors):
        code.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return code.hexdigest()


def trained(engine):
    model = engine.objective.model
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def as_lists(tensors):
    return {name: value.tolist() for name, value in tensors.items()}


def build(ranks, config, half=False):
    model = toy()
    return Engine(Objective(model, half=half), groups(model), config, ranks)


def one(ranks, step, poison=None):
    """This rank's batch; a run of one process takes both halves as one, when they are alike."""
    if ranks.world_size == 2:
        return batches(step, 2, poison)[ranks.rank]
    batch = copy.copy(batches(step, 2, poison)[0])
    batch.poison = poison
    return batch


def engine_scenarios(ranks):
    from ejmp.train.moments import optimizer_state

    seen = {}
    for stage in (0, 1, 2):
        for kind, clip in (("norm", 0.5), ("value", 0.05)):
            engine = build(ranks, settings(stage, clip_kind=kind, clip=clip))
            results = []
            for step in range(5):
                engine.set_lr(1.0 - 0.1 * step)
                results.append(engine.step(one(ranks, step)))
            seen[f"{kind}{stage}"] = {
                "weights": as_lists(trained(engine)),
                "moments": as_lists(optimizer_state(engine)),
                "norms": [r.grad_norm for r in results],
                "losses": [r.loss for r in results],
                "lrs": [r.lr for r in results],
            }
        runs = []
        for poisons in ({}, {2: "gradient", 3: "loss"}):
            engine = build(ranks, settings(stage))
            taken = []
            for step in (0, 1, 2, 3, 4) if poisons else (0, 1, 4):
                taken.append(engine.step(one(ranks, step, poisons.get(step))))
            state = trained(engine) | optimizer_state(engine)
            runs.append((digest(state), [r.skipped for r in taken], [r.suspects for r in taken], engine.state_dict()))
        seen[f"poison{stage}"] = runs
        engine = build(ranks, settings(stage))
        try:
            for step in range(30):
                engine.step(one(ranks, step, "gradient"))
        except RuntimeError as error:
            seen[f"gave_up{stage}"] = (step, str(error))
        engine = build(ranks, settings(stage, precision="fp16", clip=1e9), half=True)
        taken = [engine.step(one(ranks, 0)) for _ in range(12)]
        seen[f"half{stage}"] = ([r.skipped for r in taken], [r.grad_norm for r in taken], engine.state_dict())
    return seen


def main():
    scenario, out = sys.argv[1], Path(sys.argv[2])
    with session() as ranks:
        seen = globals()[scenario](ranks)
        (out / f"rank{ranks.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
