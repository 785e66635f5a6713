"""Edge dropout: what is left, against loops over the pairs; and the scaling of the output blocks."""

import dataclasses

import pytest
import torch
from support.inputs import GOLDEN_CASES, load_golden
from support.tolerances import assert_close

import ejmp
from ejmp.graph.graph import EDGE_SETS
from ejmp.graph.settings import GraphSettings
from ejmp.train.dropout import drop_edges, scaled_outputs


def fields(graph):
    for name in EDGE_SETS:
        edges = getattr(graph, name)
        for field in dataclasses.fields(edges):
            yield f"{name}.{field.name}", getattr(edges, field.name)


def rows(edges, keep=slice(None)):
    return list(zip(edges.source.tolist(), edges.target.tolist(), map(tuple, edges.offset.tolist()), strict=True))[keep]


@pytest.mark.parametrize("case", GOLDEN_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_dropout_nothing_changes(case, dtype):
    golden = load_golden(case)
    graph = golden.graph(dtype)
    same = drop_edges(graph, 0.0, golden.settings)
    for (name, value), (_, expected) in zip(fields(same), fields(graph), strict=True):
        equal = torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected
        assert equal, name


@pytest.mark.parametrize("case", ["batch", "slab"])
def test_sets_are_chosen_from_the_pairs_left(case):
    """Every edge set is what the rules of build_graph, as loops over atoms, choose from the pairs that are left."""
    golden = load_golden(case)
    graph, most = golden.graph(), golden.values["max_neighbors"].tolist()
    left = drop_edges(graph, 0.3, golden.settings, generator=torch.Generator().manual_seed(0))
    pairs = rows(left.atom_pairs)
    assert set(pairs) < set(rows(graph.atom_pairs))
    assert len(pairs) / graph.atom_pairs.num_edges == pytest.approx(0.7, abs=0.05)
    near, quad, main = [], [], set()
    for atom in range(graph.num_atoms):
        own = [edge for edge in pairs if edge[1] == atom]  # nearest first
        k = most[graph.batch[atom]]
        near += own[: k * 20 // 30]
        quad += [e for e in own[: k * 8 // 30] if graph.tags[e[0]] > 0 or graph.tags[e[1]] > 0]
        for s, t, offset in own[:k]:
            if s < t or (s == t and offset < (0, 0, 0)):
                main |= {(s, t, offset), (t, s, tuple(-x for x in offset))}
    assert rows(left.atom_edges) == near
    assert rows(left.quad_edges) == quad
    assert len(rows(left.main)) == len(main)
    assert set(rows(left.main)) == main
    swapped = rows(left.main)
    for (s, t, offset), e in zip(swapped, left.main.swap.tolist(), strict=True):
        assert swapped[e] == (t, s, tuple(-x for x in offset))


def test_the_model_takes_it(tiny, backend):
    golden = load_golden("batch")
    model = tiny.on(backend=backend)
    generator = torch.Generator().manual_seed(1)
    graph = drop_edges(golden.graph(), 0.5, golden.settings, generator=generator)
    with scaled_outputs(model, 0.5):
        out = model(graph)
    (out.energy.sum() + out.forces.sum()).backward()
    edges = {name: (torch.stack([e.source, e.target]), e.offset) for name in EDGE_SETS if (e := getattr(graph, name))}
    given = ejmp.graph_from_edges(golden.structures, edges, dtype=torch.float64)
    assert_close(model(given).energy.detach(), model(graph).energy.detach())
    assert out.energy.isfinite().all()
    tiny.zero_grad()


def test_output_sums_are_scaled(tiny):
    graph = load_golden("ethanol").graph()
    sums = []
    hooks = [
        block.layers.register_forward_pre_hook(lambda _m, args: sums.append(args[0].detach()))
        for block in tiny.backbone.out_blocks
    ]
    model = tiny.on(backend="reference")
    unscaled = model(graph)
    with scaled_outputs(model, 0.2):
        model(graph)
    with pytest.raises(KeyError), scaled_outputs(model, 0.2):
        raise KeyError
    half = len(sums) // 2
    assert half == 4
    for one, other in zip(sums[:half], sums[half:], strict=True):
        assert_close(other, one / 0.8)
    assert torch.equal(model(graph).energy, unscaled.energy)
    for hook in hooks:
        hook.remove()


def test_losing_every_edge_is_allowed():
    graph = ejmp.build_graph(load_golden("ethanol").structures, 8.0)
    left = drop_edges(graph, 1 - 1e-12, [GraphSettings(cutoff=8.0)])
    assert [getattr(left, name).num_edges for name in EDGE_SETS] == [0, 0, 0, 0]
    assert left.main.swap.shape == (0,)


def test_refused():
    graph = ejmp.build_graph(load_golden("ethanol").structures, 8.0)
    with pytest.raises(ValueError, match="share: expected 0 or more and less than 1, got 1"):
        drop_edges(graph, 1.0, [GraphSettings(cutoff=8.0)])
    with pytest.raises(ValueError, match=r"settings: expected one per structure \(1\), got 2"):
        drop_edges(graph, 0.1, [GraphSettings(cutoff=8.0)] * 2)
    with pytest.raises(ValueError, match="edge dropout needs graphs with one cutoff"):
        drop_edges(graph, 0.1, [GraphSettings(cutoff=8.0, atom_pairs=(9.0, 100))])
