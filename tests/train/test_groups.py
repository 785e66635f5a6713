"""Parameter groups and the division of shared gradients: by names and shapes, and by hand."""

import copy
import re

import pytest
import torch
from support.inputs import load_golden

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
    parts = ["embedding", *{"block 0", *(f"block {i}" for i in kept)}, "rest"]
    assert sorted(group["name"] for group in groups) == sorted(parts)
    for group in groups:
        assert group["lr_factor"] == numbers[group["name"]]
        assert group["lr"] == pytest.approx(1e-3 * numbers[group["name"]])
        assert group["weight_decay"] == 0.1
    # A block's group is as large as the block and its output block, both found by name in the unpruned model.
    sizes = {group["name"]: sum(p.numel() for p in group["params"]) for group in groups}
    tensors = dict(tiny.named_parameters())
    for i in {0, *kept}:
        prefixes = [f"backbone.{kind}_blocks.{i + after}." for kind, after in (("int", 0), ("out", 1)) if i in kept]
        prefixes = (*prefixes, *["backbone.out_blocks.0."] * (i == 0))  # that of the embedding
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
    """Gradients of the basis projections are divided by the number of blocks, also through gradient forces."""
    graph = load_golden("ethanol").graph()
    undivided = ejmp.prune(tiny, blocks=blocks).on(backend=backend)
    divided = copy.deepcopy(undivided)
    handles = scale_shared_gradients(divided)
    seen = set()
    for one, other in zip(losses(divided, graph), losses(undivided, graph), strict=True):
        for model, loss in ((divided, one), (undivided, other)):
            model.zero_grad()
            loss.backward()
        for (name, p), q in zip(divided.named_parameters(), undivided.parameters(), strict=True):
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
    undivided.zero_grad()
    next(losses(undivided, graph)).backward()
    assert torch.equal(
        divided.backbone.bases.mlp_rbf_h.linear.weight.grad, undivided.backbone.bases.mlp_rbf_h.linear.weight.grad
    )
