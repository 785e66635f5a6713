"""Parameter groups and the division of shared gradients: by names and shapes, by hand, and under DeepSpeed."""

import copy
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from conftest import load_golden

import ejmp
from ejmp.train.groups import LayerFactors, parameter_groups, scale_shared_gradients

SHARED = re.compile(r"backbone\.bases\.mlp_(rbf|cbf|sbf)_\w+")


@pytest.mark.parametrize("keep", [None, (0, 2), (1,)])
@pytest.mark.parametrize("factors", [None, LayerFactors()])
def test_every_parameter_once(tiny, keep, factors):
    model = tiny if keep is None else ejmp.prune(tiny, keep=keep)
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.1, factors=factors)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters()}
    torch.optim.AdamW(groups)  # refuses a parameter that appears twice
    if factors is None:
        assert [group["name"] for group in groups] == ["all"]
        return
    numbers = {"embedding": 0.3, "block 0": 0.55, "block 1": 0.40, "block 2": 0.30, "rest": 1.0}
    kept = keep or (0, 1, 2)
    parts = ["embedding", *(f"block {i}" for i in kept), "rest"]
    assert sorted(group["name"] for group in groups) == sorted(parts)
    for group in groups:
        assert group["lr_factor"] == numbers[group["name"]]
        assert group["lr"] == pytest.approx(1e-3 * numbers[group["name"]])
        assert group["weight_decay"] == 0.1
    # A block's group is as large as the block and its output block, both found by name in the unpruned model.
    sizes = {group["name"]: sum(p.numel() for p in group["params"]) for group in groups}
    tensors = dict(tiny.named_parameters())
    for i in kept:
        prefixes = (f"backbone.int_blocks.{i}.", f"backbone.out_blocks.{i + 1}.")
        assert sizes[f"block {i}"] == sum(p.numel() for name, p in tensors.items() if name.startswith(prefixes))
    heads = list(model.output.parameters())
    rest = next(group for group in groups if group["name"] == "rest")
    assert {id(p) for p in heads} <= {id(p) for p in rest["params"]}


def test_frozen_parameters_are_left_out(tiny):
    model = copy.deepcopy(tiny)
    model.embedding.requires_grad_(False)
    groups = parameter_groups(model, lr=1.0, weight_decay=0.0, factors=LayerFactors())
    assert "embedding" not in {group["name"] for group in groups}


def test_missing_factor(tiny):
    with pytest.raises(ValueError, match="factors: expected one for block 2, got 1 blocks"):
        parameter_groups(tiny, lr=1.0, weight_decay=0.0, factors=LayerFactors(blocks=(1.0,)))


def losses(model, graph):
    out = model(graph)
    yield (out.energy**2).sum() + (out.forces**2).sum()
    yield (ejmp.gradient_forces(model, graph, create_graph=True) ** 2).sum()


@pytest.mark.parametrize("blocks", [3, 2])
def test_shared_gradients(tiny, blocks, backend):
    """First order and through gradient forces: the projections of bases, divided by how many blocks use them."""
    graph = load_golden("ethanol").graph()
    plain = ejmp.prune(tiny, blocks=blocks)
    plain.requested_backend = backend
    divided = copy.deepcopy(plain)
    handles = scale_shared_gradients(divided)
    seen = set()
    for ours, theirs in zip(losses(divided, graph), losses(plain, graph), strict=True):
        for model, loss in ((divided, ours), (plain, theirs)):
            model.zero_grad()
            loss.backward()
        for (name, p), q in zip(divided.named_parameters(), plain.parameters(), strict=True):
            users = 1
            if SHARED.match(name):
                users = blocks + 1 if "mlp_rbf_out" in name else blocks
                seen.add(name)
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.allclose(p.grad * users, q.grad, rtol=1e-9, atol=1e-12), name
    assert len(seen) == 12
    assert not any("edge_emb" in name for name in seen)
    for handle in handles:
        handle.remove()
    divided.zero_grad()
    next(losses(divided, graph)).backward()
    plain.zero_grad()
    next(losses(plain, graph)).backward()
    assert torch.equal(
        divided.backbone.bases.mlp_rbf_h.linear.weight.grad, plain.backbone.bases.mlp_rbf_h.linear.weight.grad
    )


DEEPSPEED = """
import sys
from pathlib import Path
import deepspeed, torch
from safetensors.torch import save_file
import ejmp
from ejmp.train.groups import scale_shared_gradients
config, weights, graph = torch.load(sys.argv[1], weights_only=False)
class Objective(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = ejmp.JMP(config)
        self.model.load_state_dict(weights)
    def forward(self, graph):
        return (ejmp.gradient_forces(self.model, graph, create_graph=True) ** 2).sum() + self.model(graph).forces.sum()
deepspeed.init_distributed("gloo")
for stage in (0, 1):
    objective = Objective()
    scale_shared_gradients(objective.model)
    settings = {"train_batch_size": 1, "zero_optimization": {"stage": stage}, "gradient_clipping": 0.0}
    settings["zero_allow_untested_optimizer"] = True
    optimizer = torch.optim.SGD(objective.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)
    engine.backward(engine(graph))
    engine.step()
    moved = {name: p.detach().clone() for name, p in engine.module.model.named_parameters()}
    save_file(moved, Path(sys.argv[1]).with_name(str(stage)))
"""


def test_shared_gradients_under_deepspeed(tiny_config, tiny_weights, tmp_path):
    """A step of SGD, with ZeRO 0 and 1, moves the projections by the divided gradient."""
    from safetensors.torch import load_file

    pytest.importorskip("deepspeed")
    graph = load_golden("ethanol").graph(torch.float32)
    torch.save((tiny_config, tiny_weights, graph), tmp_path / "in")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    run = subprocess.run(
        [sys.executable, "-c", DEEPSPEED, tmp_path / "in"],
        env={**os.environ, **ranks, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,  # DeepSpeed compiles its CPU communication on the first run
    )
    assert run.returncode == 0, run.stderr[-3000:]
    model = ejmp.JMP(tiny_config)
    model.load_state_dict(tiny_weights)
    scale_shared_gradients(model)
    (model(graph).forces.sum() + (ejmp.gradient_forces(model, graph, create_graph=True) ** 2).sum()).backward()
    for stage in ("0", "1"):
        moved = load_file(tmp_path / stage)
        for name, p in model.named_parameters():
            if SHARED.match(name):
                step = (p - moved[name]).detach()
                assert torch.allclose(step, p.grad, rtol=1e-2, atol=1e-6 * p.abs().max().item()), (stage, name)
                assert p.grad.abs().max() > 1e-5
