"""Scenarios that the tests of training run in several processes: `python train_script.py SCENARIO [ARGUMENTS]`.

Each rank writes what it saw to OUT/rank<r>.json.
"""

import copy
import dataclasses
import errno
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
import types
from functools import partial
from operator import mul
from pathlib import Path

import numpy as np
import torch
from torch import nn

import ejmp
from ejmp.compress.losses import Losses
from ejmp.train import checkpoint
from ejmp.train.config import TrainConfig
from ejmp.train.distributed import Preemption, host, sum_over_ranks
from ejmp.train.engine import Engine
from ejmp.train.faults import session
from ejmp.train.moments import optimizer_state
from ejmp.train.objective import Objective
from ejmp.train.randomness import seed_all


class Toy(nn.Module):
    """A body and three heads, of which a sample trains one; one parameter is empty, one is frozen."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 7)
        self.heads = nn.ModuleList(nn.Linear(7, 1) for _ in range(3))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)

    def forward(self, x, head):
        return self.heads[head](torch.tanh(self.body(x)) * self.frozen)


class ToyObjective(Objective):
    """Fits the toy model to a batch, whose `poison` makes loss or gradient not finite."""

    def __init__(self, model, half=False):
        super().__init__(model)
        self.half = half

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
        return Losses(total=total, parts={"energy": total.detach()})


def _bad_gradient(parameter):
    """Return 0, with an infinite gradient."""
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
    """Return a batch per rank of the step's eight samples: the first half trains head 0, the second head 1."""
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
    return Engine(ToyObjective(model, half=half), groups(model), config, ranks)


def one(ranks, step, poison=None):
    """Return this rank's batch; a run of one process takes the first half."""
    if ranks.world_size == 2:
        return batches(step, 2, poison)[ranks.rank]
    batch = copy.copy(batches(step, 2, poison)[0])
    batch.poison = poison
    return batch


def engine_scenarios(ranks):
    seen = {}
    for stage in (0, 1, 2):
        for kind, clip in (("norm", 0.5), ("value", 0.05)):
            engine = build(ranks, TrainConfig(zero_stage=stage, clip_kind=kind, clip=clip))
            results = []
            for step in range(5):
                engine.set_lr(partial(mul, 1.0 - 0.1 * step))
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
            engine = build(ranks, TrainConfig(zero_stage=stage))
            steps = (0, 1, 2, 3, 4) if poisons else (0, 1, 4)
            taken = [engine.step(one(ranks, step, poisons.get(step))) for step in steps]
            state = trained(engine) | optimizer_state(engine)
            runs.append((digest(state), [r.skipped for r in taken], [r.suspects for r in taken], engine.state_dict()))
        seen[f"poison{stage}"] = runs
        engine = build(ranks, TrainConfig(zero_stage=stage))
        try:
            for step in range(30):
                engine.step(one(ranks, step, "gradient"))
        except RuntimeError as error:
            seen[f"gave_up{stage}"] = (step, str(error))
        engine = build(ranks, TrainConfig(zero_stage=stage, precision="fp16", clip=1e9), half=True)
        taken = [engine.step(one(ranks, 0)) for _ in range(12)]
        seen[f"half{stage}"] = ([r.skipped for r in taken], [r.grad_norm for r in taken], engine.state_dict())
    return seen


class Quadratic(Objective):
    """Pulls the weights of a JMP towards a sample's number, with noise from three generators."""

    def __init__(self, model, noise):
        super().__init__(model)
        self.noise = noise

    def forward(self, numbers):
        noise = 0.0
        if self.noise:
            noise = torch.rand(()) + random.random() + np.random.random()
        total = sum((p - 0.01 * n + 0.001 * noise).square().mean() for p in self.model.parameters() for n in numbers)
        total = total / len(numbers)
        return Losses(total=total, parts={})


def small_jmp():
    sizes = {name: 4 for name in vars(ejmp.jmp_s()) if name.startswith("emb_size")}
    torch.manual_seed(0)
    return ejmp.JMP(dataclasses.replace(ejmp.jmp_s(blocks=1), **sizes), backend="reference")


def quadratic(ranks, stage, *, noise, keep=2):
    model = small_jmp()
    chosen = [{"params": list(model.parameters()), "lr": 1e-3}]
    seed_all(0, ranks.rank)
    config = TrainConfig(zero_stage=stage, keep_checkpoints=keep, precision="fp16" if noise else "fp32")
    return Engine(Quadratic(model, noise), chosen, config, ranks)


def advance(engine, start, stop):
    """Take steps over four samples each, dealt out to the ranks, and return the losses."""
    ranks, losses = engine.ranks, []
    for step in range(start, stop):
        numbers = range(4 * step, 4 * step + 4)[ranks.rank :: ranks.world_size]
        engine.set_lr(partial(mul, 1 / (1 + step)))
        losses.append(engine.step([n % 7 for n in numbers]).loss)
    return losses


def bits(engine):
    """Return hashes of this rank's weights, moments (on rank 0) and next random numbers; loss scale and counts."""
    draws = {"draws": torch.tensor([random.random(), np.random.random(), torch.rand(()).item()])}
    return [digest(trained(engine)), digest(optimizer_state(engine)), digest(draws), engine.state_dict()]


def checkpoint_saves(ranks):
    """Train without a break and save half-way."""
    seen, runs = {}, Path(sys.argv[3])
    for stage in (0, 1, 2):
        for noise in (False, True):
            engine = quadratic(ranks, stage, noise=noise)
            advance(engine, 0, 3)
            engine.skipped = 5
            engine.loss_scale /= 64 if noise else 1
            run = runs / f"{stage}{noise}{ranks.world_size}"
            averages = {name: p.detach() + ranks.rank for name, p in engine.objective.model.named_parameters()}
            checkpoint.save(engine, run, 3, {"position": 12}, ema=averages)
            losses = advance(engine, 3, 9)
            seen[f"{stage}{noise}"] = [bits(engine), losses, as_lists(trained(engine))]
    run = runs / f"kept{ranks.world_size}"
    for step in (1, 2, 3, 4, 5, 5):
        checkpoint.save(engine, run, step, {"again": step}, best=step == 2)
    (run / ".step-00000006.new").mkdir(exist_ok=True)
    checkpoint.save(engine, run, 4, {"again": "yes"})
    seen["kept"] = sorted(path.name for path in run.iterdir())
    return seen


def checkpoint_resumes(ranks):
    """Go on from the checkpoints with as many ranks, at the same stage."""
    seen, runs = {}, Path(sys.argv[3])
    for stage in (0, 1, 2):
        for noise in (False, True):
            engine = quadratic(ranks, stage, noise=noise)
            advance(engine, 0, 1)  # what is loaded replaces what is there
            restored = checkpoint.resume(engine, runs / f"{stage}{noise}{ranks.world_size}")
            losses = advance(engine, restored.step, 9)
            seen[f"{stage}{noise}"] = [bits(engine), losses, as_lists(restored.ema), restored.state]
    return seen


def checkpoint_changes(ranks):
    """Go on from where a run of another number of ranks and another stage stopped, for three steps."""
    seen, runs = {}, Path(sys.argv[3])
    for stage in (0, 1, 2):
        run = runs / f"{stage}False1"
        engine = quadratic(ranks, (stage + ranks.world_size) % 3, noise=False)
        restored = checkpoint.resume(engine, run)
        losses = advance(engine, restored.step, restored.step + 3)
        checkpoint.save(engine, run, restored.step + 3, restored.state)
        seen[stage] = [losses, as_lists(trained(engine)), engine.skipped]
    return seen


class Regression(Objective):
    """Fits numbers to the features of samples; a batch is a list of samples."""

    def forward(self, samples):
        parts = [batches(n, 2)[0] for n in samples]
        total = sum((self.model(b.x, 0) - b.y).square().mean() for b in parts) / len(parts)
        return Losses(total=total, parts={})


def curve(ranks):
    """Return the losses of 20 steps over two samples each, and where this rank is."""
    model = toy()
    engine = Engine(Regression(model), groups(model), TrainConfig(zero_stage=1), ranks)
    share = slice(ranks.rank, None, ranks.world_size)
    losses = [engine.step(list(range(2 * step, 2 * step + 2))[share]).loss for step in range(20)]
    return {"losses": losses, "place": [ranks.rank, ranks.local_rank, ranks.world_size], "host": host()}


def hello(ranks):
    """Return where this rank is, and a sum over all ranks."""
    total = sum_over_ranks(torch.tensor([1 + ranks.rank])).item()
    return {"place": [ranks.rank, ranks.local_rank, ranks.world_size], "sum": total}


def full_disk(text):
    """What the system raises on a full disk."""
    return OSError(errno.ENOSPC, text)


def fault(ranks):
    """Let one rank (or both) fail in some way while the other waits for it in a collective."""
    kind, who = sys.argv[3], int(sys.argv[4])
    sum_over_ranks(torch.zeros(1))
    if ranks.rank == who or kind == "both":
        time.sleep(1)
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"mistake": ValueError, "full": full_disk}.get(kind, RuntimeError)("oc20[17] is damaged")
    if kind == "exit":
        time.sleep(600)
    sum_over_ranks(torch.zeros(1))


def preempted(ranks):
    """Take steps until some rank is told to stop, and return how many."""
    steps = 0
    with Preemption() as preemption:
        (Path(sys.argv[2]) / f"pid{ranks.rank}").write_text(str(os.getpid()))
        while not preemption.requested():
            steps += 1
            time.sleep(0.01)
    return steps


def kills():
    """Kill a run that saves after every step, at random moments; return what each start resumed and announced."""
    run, count, chance, seen = Path(sys.argv[3]), int(sys.argv[4]), random.Random(int(sys.argv[5])), []
    import deepspeed  # noqa: F401 - once, and not in every process

    for _ in range(count):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(run, writer)
            finally:
                traceback.print_exc()
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader) as lines:
            resumed, saved = int(lines.readline()), [int(lines.readline())]
            time.sleep(chance.uniform(0, 0.2))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            saved += [int(line) for line in lines]
        seen.append({"resumed": resumed, "saved": saved[-1], "left": sorted(path.name for path in run.iterdir())})
    last = checkpoint.latest(run)
    with session() as ranks:
        engine = quadratic(ranks, 1, noise=True)
        advance(engine, 0, checkpoint.step_of(last))
        whole = bits(engine)
        checkpoint.load(engine, last)
        return {"kills": seen, "whole": whole, "resumed": bits(engine), "step": checkpoint.step_of(last)}


def save_for_ever(run, writer):
    with session() as ranks:
        engine = quadratic(ranks, 1, noise=True)
        step = checkpoint.resume(engine, run).step if checkpoint.steps(run) else 0
        os.write(writer, f"{step}\n".encode())
        while True:
            advance(engine, step, step + 1)
            step += 1
            checkpoint.save(engine, run, step, {"position": 4 * step})
            os.write(writer, f"{step}\n".encode())


def main(scenarios):
    sys.argv = [word for word in sys.argv if not word.startswith("--local_rank")]  # the deepspeed launcher adds it
    scenario, out = sys.argv[1], Path(sys.argv[2])
    if scenario == "kills":
        (out / "rank0.json").write_text(json.dumps(kills()))
        return
    with session() as ranks:
        seen = scenarios[scenario](ranks)
        (out / f"rank{ranks.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(globals())
