"""Pruning: what is kept, what the final MLP reads, what is refused. Golden outputs are in test_golden.py."""

import pytest
import torch
from ase.build import molecule
from support.tolerances import assert_close

import ejmp


def test_keeping_everything_changes_nothing(tiny):
    graph = ejmp.build_graph(molecule("CH3OH"), 8.0, dtype=torch.float64)
    same = ejmp.prune(tiny, blocks=3)
    assert torch.equal(same(graph).energy, tiny(graph).energy)
    assert same.embedding.atom_embedding.weight is not tiny.embedding.atom_embedding.weight


@pytest.mark.parametrize("keep", [(0,), (1,), (0, 2), (1, 2)])
def test_any_subset(tiny, keep):
    """The pruned model is the full one, whose final MLP is fed only the outputs of the kept blocks."""
    graph = ejmp.build_graph(molecule("CH3OH"), 8.0, dtype=torch.float64)
    small = ejmp.prune(tiny, keep=keep)
    assert small.config.kept_blocks == keep
    columns = [0, *(i + 1 for i in keep)]
    features = small.features(graph)
    for branch, x in (("E", features.x_E), ("F", features.x_F)):
        layer = getattr(tiny.backbone, f"out_mlp_{branch}").out_mlp[0]
        full = torch.zeros(len(x[0]), 4, x[0].shape[1], dtype=torch.float64)
        for column, value in zip(columns, x, strict=True):
            full[:, column] = value
        assert_close(getattr(features, f"mlp_{branch}")[0].detach(), layer(full.flatten(1)).detach())
    if keep[0] == 0:
        assert torch.equal(features.x_E[1], tiny.features(graph).x_E[1])


def test_pruning_twice_remembers_the_original_blocks(tiny):
    twice = ejmp.prune(ejmp.prune(tiny, keep=(0, 2)), keep=(1,))
    assert twice.config.kept_blocks == (2,)
    once = ejmp.prune(tiny, keep=(2,))
    graph = ejmp.build_graph(molecule("H2O"), 8.0, dtype=torch.float64)
    assert torch.equal(twice(graph).energy, once(graph).energy)


def test_random_final_mlp(tiny):
    sliced, fresh = ejmp.prune(tiny, blocks=2), ejmp.prune(tiny, blocks=2, final_mlp="random")
    different = {n for n, value in sliced.state_dict().items() if not torch.equal(value, fresh.state_dict()[n])}
    assert different == {f"backbone.out_mlp_{branch}.out_mlp.0.linear.weight" for branch in "EF"}
    weight = fresh.backbone.out_mlp_E.out_mlp[0].linear.weight
    assert (weight.var(1) * weight.shape[1]).detach().numpy() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blocks": 1, "keep": (0,)},
        {"blocks": 0},
        {"blocks": 4},
        {"keep": ()},
        {"keep": (2, 1)},
        {"keep": (0, 3)},
        {"keep": (-1,)},
        {"blocks": 1, "final_mlp": "new"},
    ],
)
def test_refused(tiny, options):
    with pytest.raises(ValueError, match=r"prune|final_mlp"):
        ejmp.prune(tiny, **options)
