"""The gradients' hooks and zeros under DeepSpeed: two ranks whose batches are of different tasks, ZeRO 0, 1 and 2."""

import dataclasses
import os
import re
import socket
import subprocess
import sys

import pytest
import torch

import ejmp
from ejmp.data import demo
from ejmp.data.batch import make_batch
from ejmp.train.groups import scale_shared_gradients
from ejmp.train.loss import multitask_loss
from ejmp.train.task import Task, Tasks

SHARED = re.compile(r"backbone\.bases\.mlp_(rbf|cbf|sbf)_\w+")
RANK = """
import sys
from pathlib import Path
import deepspeed, torch
import ejmp
from ejmp.train.groups import scale_shared_gradients
from ejmp.train.loss import multitask_loss, reach
folder = Path(sys.argv[1])
config, weights, batches, tasks = torch.load(folder / "in", weights_only=False)
deepspeed.init_distributed("gloo")
rank = torch.distributed.get_rank()
class Objective(torch.nn.Module):
    def __init__(self, alike):
        super().__init__()
        self.alike = alike
        self.model = ejmp.JMP(config)
        self.model.load_state_dict(weights)
        scale_shared_gradients(self.model)
    def forward(self, batch):
        if self.alike or rank == 0:
            forces = ejmp.gradient_forces(self.model, batch.graph, create_graph=True)
            if not self.alike:
                return reach((forces ** 2).sum(), self.model.parameters())
        out = self.model(batch.graph)
        total = multitask_loss(out.energy, out.forces, batch, tasks).total
        return total + (forces ** 2).sum() if self.alike else reach(total, self.model.parameters())
for stage, alike in ((0, True), (1, True), (2, True), (0, False), (1, False)):
    objective = Objective(alike)
    settings = {"train_batch_size": 2, "zero_optimization": {"stage": stage}, "gradient_clipping": 0.0}
    settings["zero_allow_untested_optimizer"] = True
    optimizer = torch.optim.SGD(objective.parameters(), lr=100.0)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)
    engine.backward(engine(batches[rank]))
    engine.step()
    moved = {name: p.detach().clone() for name, p in objective.model.named_parameters()}
    torch.save(moved, folder / f"{rank}{stage}{alike}")
"""


def test_two_ranks_of_different_tasks(tiny_config, tiny_weights, tmp_path):
    """A step of SGD moves every parameter by the mean gradient of the ranks, shared projections by the divided one.

    One rank has a molecule, the other a slab without forces. At last the ranks even compute different things, one
    without force branch and heads; `reach` makes that good.
    """
    pytest.importorskip("deepspeed")
    names = ("ani1x", "oc20")
    tasks = Tasks([Task.from_info(demo(name).info, head=i, force_weight=5.0) for i, name in enumerate(names)])
    items = [demo("ani1x")[0], dataclasses.replace(demo("oc20")[0], forces=None)]
    batches = [make_batch([item], [d], cutoff=6.0) for d, item in enumerate(items)]
    torch.save((tiny_config, tiny_weights, batches, tasks), tmp_path / "in")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in ("0", "1"):
        with (tmp_path / f"log{rank}").open("w") as log:
            env = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}
            command = [sys.executable, "-c", RANK, tmp_path]
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        for rank, process in enumerate(ranks):  # DeepSpeed compiles its CPU communication on the first run
            assert process.wait(timeout=300) == 0, (tmp_path / f"log{rank}").read_text()[-3000:]
    finally:
        for process in ranks:
            process.kill()
    for stage, alike in ((0, True), (1, True), (2, True), (0, False), (1, False)):
        moved, same = (torch.load(tmp_path / f"{rank}{stage}{alike}") for rank in (0, 1))
        model = mean_gradients(tiny_config, tiny_weights, batches, tasks, alike)
        for name, p in model.named_parameters():
            step = p.detach() - moved[name]
            gradient = torch.zeros_like(p) if p.grad is None else 100 * p.grad
            assert torch.allclose(step, gradient, rtol=1e-2, atol=2e-6 * p.abs().max().item()), (stage, alike, name)
            assert torch.equal(moved[name], same[name])
            assert not SHARED.match(name) or gradient.abs().max() > 1e-4, name


def mean_gradients(config, weights, batches, tasks, alike):
    """The same on one process."""
    model = ejmp.JMP(config)
    model.load_state_dict(weights)
    scale_shared_gradients(model)
    for rank, batch in enumerate(batches):
        total = 0
        if alike or rank == 0:
            total = (ejmp.gradient_forces(model, batch.graph, create_graph=True) ** 2).sum()
        if alike or rank == 1:
            out = model(batch.graph)
            total = total + multitask_loss(out.energy, out.forces, batch, tasks).total
        (total / 2).backward()
    return model
