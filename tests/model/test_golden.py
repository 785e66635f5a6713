"""Everything the public JMP model computes at a tiny size, ours must compute too."""

import copy

import pytest
import torch
from support.inputs import load_golden
from support.tolerances import assert_close, relative_error

import ejmp
from ejmp.measure.flops import graph_sizes

COUNTS = {
    "n_main": "edges",
    "n_a2a": "pairs",
    "n_a2ee2a": "atom_edges",
    "n_qint": "quad_edges",
    "n_triplets_e2e": "edge_to_edge",
    "n_triplets_a2e": "atom_to_edge",
    "n_triplets_e2a": "edge_to_atom",
    "n_triplets_qint_in": "quad_inputs",
    "n_triplets_qint_out": "quad_outputs",
    "n_quadruplets": "quadruplets",
}


def edge_order(graph, values):
    """Rows of the golden main edges in the order of graph.main."""
    place = {}
    for row, (s, t, offset) in enumerate(
        zip(*values["main_edge_index"].tolist(), values["main_cell_offset"].tolist(), strict=True)
    ):
        place[s, t, *offset] = row
    main = graph.main
    keys = zip(main.source.tolist(), main.target.tolist(), main.offset.tolist(), strict=True)
    return [place[s, t, *offset] for s, t, offset in keys]


def parameter_norms(model, loss, names):
    """Gradient norms under upstream's names."""
    parameters = dict(model.named_parameters())
    assert set(names) == set(parameters)
    gradients = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
    return torch.stack([torch.zeros(()).double() if g is None else g.norm() for g in gradients])


def assert_norms(norms, expected):
    expected = torch.as_tensor(expected)
    assert not norms[expected == 0].any()
    error = ((norms - expected).abs() / expected.clamp_min(1e-300))[expected > 0].max().item()
    assert error <= 1e-6, f"relative error {error:.1e}"


def test_counts(golden):
    sizes = graph_sizes(golden.graph())
    assert {name: getattr(sizes, ours) for name, ours in COUNTS.items()} == {
        name: golden.values[name].item() for name in COUNTS
    }


@pytest.fixture
def tiny(tiny, backend):
    """The golden model in float64 on every backend."""
    tiny = copy.deepcopy(tiny).on(backend=backend)
    assert tiny.backend == backend
    return tiny


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def model(request, tiny_config, tiny_weights, backend):
    """The golden model in both dtypes on every backend."""
    model = ejmp.JMP(tiny_config, backend)
    model.load_state_dict(tiny_weights)
    return model.to(request.param)


def test_energy_and_forces(golden, model):
    dtype = model.dtype
    graph = golden.graph(dtype)
    out = model(graph)
    assert out.energy.dtype == out.forces.dtype == dtype
    assert_close(out.energy, golden.values["energy"], dtype)
    assert_close(out.forces, golden.values["forces"], dtype)
    assert_close(ejmp.gradient_forces(model, graph), golden.values["gradient_forces"], dtype, order=1)


def test_features(golden, model):
    graph, values, dtype = golden.graph(model.dtype), golden.values, model.dtype
    features = model.features(graph)
    for i, x in enumerate(features.x_E):
        assert_close(x, values[f"x_E.{i}"], dtype)
    for i, x in enumerate(features.mlp_E):
        assert_close(x, values[f"out_mlp_E.{i}"], dtype)
    if "x_F.0" in values:
        rows = edge_order(graph, values)
        for i, x in enumerate(features.x_F):
            assert_close(x, values[f"x_F.{i}"][rows], dtype)
        for i, x in enumerate(features.mlp_F):
            assert_close(x, values[f"out_mlp_F.{i}"][rows], dtype)


def test_relevance(golden, model):
    scores = ejmp.block_relevance(model, [golden.graph(model.dtype)])
    assert_close(scores.energy, golden.values["relevance_E"], model.dtype)
    assert_close(scores.forces, golden.values["relevance_F"], model.dtype)


def test_parameter_gradients(golden, tiny):
    graph, names = golden.graph(), golden.values["param_names"].tolist()
    out = tiny(graph)
    loss = (out.energy**2).sum() + (out.forces**2).sum()
    assert_norms(parameter_norms(tiny, loss, names), golden.values["grad_norm"])


def test_second_order_parameter_gradients(golden, tiny):
    graph, names = golden.graph(), golden.values["param_names"].tolist()
    loss = (ejmp.gradient_forces(tiny, graph, create_graph=True) ** 2).sum()
    expected = golden.values["grad_norm_of_gradient_force_loss"]
    assert_norms(parameter_norms(tiny, loss, names), expected)


def test_pruned(tiny):
    golden = load_golden("pruned2_batch")
    small = ejmp.prune(tiny, blocks=2)
    graph = golden.graph()
    out = small(graph)
    assert small.config.kept_blocks == (0, 1)
    assert_close(out.energy, golden.values["energy"])
    assert_close(out.forces, golden.values["forces"])
    assert_close(ejmp.gradient_forces(small, graph), golden.values["gradient_forces"], order=1)
    names = golden.values["param_names"].tolist()
    assert_norms(
        parameter_norms(small, (out.energy**2).sum() + (out.forces**2).sum(), names), golden.values["grad_norm"]
    )


def test_given_edges_give_the_same_energy(golden, tiny):
    """A graph made of upstream's own edges, in upstream's order."""
    values = golden.values
    theirs = {"main": "main", "atom_edges": "a2ee2a", "quad_edges": "qint", "atom_pairs": "a2a"}
    edges = {
        ours: (torch.as_tensor(values[f"{name}_edge_index"]), torch.as_tensor(values[f"{name}_cell_offset"]))
        for ours, name in theirs.items()
    }
    graph = ejmp.graph_from_edges(golden.structures, edges, dtype=torch.float64)
    assert relative_error(tiny(graph).energy.detach(), values["energy"]) <= 1e-9
