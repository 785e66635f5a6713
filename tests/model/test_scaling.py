"""ScaleFactor fitting against the definition, with triplets and quadruplets listed one by one."""

import numpy as np
import pytest
import torch
from ase.build import molecule

import ejmp
from ejmp.model.angle_tables import angle_tables


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return ejmp.JMP(tiny_config, "reference").double()


@pytest.fixture(scope="module")
def graphs():
    names = (("CH3CH2OH", "CH3NO2"), ("CH3CONH2",))
    return [ejmp.build_graph([molecule(n) for n in batch], 5.0, dtype=torch.float64) for batch in names]


def capture(model, graph, module):
    """Inputs of one module in a forward pass."""
    seen = []
    handle = module.register_forward_hook(lambda _m, inputs, output: seen.append((inputs[0].detach(), output.detach())))
    with torch.no_grad():
        model(graph)
    handle.remove()
    return seen[0]


def pooled(outputs, references):
    """sqrt(sum n var(reference) / sum n var(output)), by numpy."""
    rows = [len(output) for output in outputs]
    variance = [[np.var(x.numpy(), axis=0, ddof=1).mean() for x in group] for group in (references, outputs)]
    return np.sqrt(np.dot(rows, variance[0]) / np.dot(rows, variance[1]))


def test_every_factor_is_fitted_in_forward_order(model, graphs):
    fitted = ejmp.fit_scale_factors(model, graphs[:1])
    names = {name.removesuffix(".scale_factor") for name in model.state_dict() if name.endswith("scale_factor")}
    assert set(fitted) == names
    order = list(fitted)
    assert order[0] == "backbone.out_blocks.0.scale_sum"
    assert order.index("backbone.int_blocks.0.quad_interaction.scale_cbf") < order.index(
        "backbone.int_blocks.0.quad_interaction.scale_sbf_sum"
    )
    later = "backbone.int_blocks.1.trip_interaction.scale_rbf"
    assert order.index("backbone.out_blocks.1.scale_sum") < order.index(later)
    assert all(0 < value != 1 for value in fitted.values())


def test_values_follow_the_definition(model, graphs):
    """Fitted factors give outputs their reference's variance, pooled over batches; checked in the last block."""
    ejmp.fit_scale_factors(model, graphs)
    block = model.backbone.int_blocks[2]
    state = {name: value.item() for name, value in model.state_dict().items() if value.ndim == 0}
    expected = {}
    trip, quad, near, pair = (
        block.trip_interaction,
        block.quad_interaction,
        block.atom_edge_interaction,
        block.atom_interaction,
    )
    outs, refs = {}, {}

    def add(name, output, reference):
        outs.setdefault(name, []).append(output)
        refs.setdefault(name, []).append(reference)

    for graph in graphs:
        tables = angle_tables(graph, model.config.num_spherical)
        for name, layer, triplets in (
            ("trip_interaction", trip, tables.edge_to_edge),
            ("atom_edge_interaction", near, tables.atom_to_edge),
        ):
            x = capture(model, graph, layer.dense_ba)[1]
            if name == "atom_edge_interaction":
                x = x[graph.atom_edges.source]
            down_in, down_out = capture(model, graph, layer.down_projection)
            add(f"{name}.scale_rbf", down_in / layer.scale_rbf.scale_factor, x)
            inputs = down_out[triplets.table[triplets.valid]]
            add(f"{name}.scale_cbf_sum", capture(model, graph, layer.mlp_cbf)[1], inputs)
        quads = tables.quadruplets
        x = capture(model, graph, quad.down_projection)[1]
        x = torch.cat([x, torch.zeros_like(x[:1])])[quads.inputs]
        x_t = x * capture(model, graph, quad.mlp_cbf)[1]
        add("quad_interaction.scale_cbf", x_t[quads.inputs_valid], x[quads.inputs_valid])
        x_t = torch.cat([x_t, torch.zeros_like(x_t[:1])]) * quad.scale_cbf.scale_factor
        add("quad_interaction.scale_sbf_sum", capture(model, graph, quad.mlp_sbf)[1], x_t[quads.middles][quads.valid])
        x = capture(model, graph, pair.down_projection)[1]
        near_atoms, triplets = block.edge_atom_interaction, tables.edge_to_atom
        down_out = capture(model, graph, near_atoms.down_projection)[1]
        inputs = down_out[triplets.table[triplets.valid]]
        add("edge_atom_interaction.scale_cbf_sum", capture(model, graph, near_atoms.mlp_cbf)[1], inputs)
        update = block.atom_update
        scaled = capture(model, graph, update.layers)[0]
        after_skip = capture(model, graph, block.layers_after_skip)[1]
        add("atom_update.scale_sum", scaled / update.scale_sum.scale_factor, after_skip)
        add("atom_interaction.scale_rbf_sum", capture(model, graph, pair.bilinear)[1], x[graph.atom_pairs.source])
    for name, outputs in outs.items():
        expected[name] = pooled(outputs, refs[name])
    got = {name: state[f"backbone.int_blocks.2.{name}.scale_factor"] for name in expected}
    assert got == pytest.approx(expected, rel=1e-9)


def test_batches_that_say_nothing_do_not_count(model, graphs):
    """HCl has no triplet: its batch adds nothing to factors of triplets, and the others are still fitted."""
    two_atoms = ejmp.build_graph(molecule("HCl"), 5.0, dtype=torch.float64)
    alone = ejmp.fit_scale_factors(model, graphs[:1])
    both = ejmp.fit_scale_factors(model, [*graphs[:1], two_atoms])
    assert all(0 < value < float("inf") for value in both.values())
    assert both["backbone.out_blocks.0.scale_sum"] != alone["backbone.out_blocks.0.scale_sum"]
    with pytest.raises(ValueError, match="triplets"):
        ejmp.fit_scale_factors(model, [two_atoms])


def test_fitting_again_changes_nothing(model, graphs):
    first = ejmp.fit_scale_factors(model, graphs[:1])
    assert ejmp.fit_scale_factors(model, graphs[:1]) == pytest.approx(first, rel=1e-12)


def test_refused_and_nothing_lost(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="at least one batch"):
        ejmp.fit_scale_factors(model, [])
    helium = ejmp.build_graph(ejmp.Structure(numbers=[2], positions=[[0.0, 0, 0]]), dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot be fitted"):
        ejmp.fit_scale_factors(model, [helium])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
