"""Calibration for 8 bits: the layers it names are those that matter, and what it keeps is kept, also in a file."""

import copy
import dataclasses

import pytest
import torch
from support.inputs import load_golden, require_8_bits

import ejmp
from ejmp.compress.calibration import keep_in_bf16, layer_errors


@pytest.fixture(autouse=True)
def vnni():
    require_8_bits()


@pytest.fixture
def model(tiny_config, tiny_weights):
    model = ejmp.JMP(tiny_config)
    model.load_state_dict(tiny_weights)
    return model.eval()


@pytest.fixture
def graph():
    return load_golden("ethanol").graph(torch.float32)


@torch.no_grad()
def change(model, graph, precision="bf16"):
    exact = model.on(precision=precision)(graph).forces
    return ((model.on(precision="int8")(graph).forces - exact).norm() / exact.norm()).item()


def test_each_layer_has_the_error_of_its_rounded_rows(model, graph):
    """By the model with the rows of one layer's weight and of what it reads rounded by hand, in float64."""
    errors = layer_errors(model, [graph])
    assert len(errors) > 20
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    exact = copy.deepcopy(model).double().on(backend="reference")
    in_double = graph.to(dtype=torch.float64)
    with torch.no_grad():
        expected = exact(in_double)
        for name in [name for name in errors if ".mlp_cbf." not in name][::12]:
            layer = exact.get_submodule(name).linear
            whole = layer.weight.clone()
            layer.weight.copy_(rounded(whole))
            hook = layer.register_forward_pre_hook(lambda _layer, given: rounded(given[0]))
            found = exact(in_double)
            hook.remove()
            layer.weight.copy_(whole)
            pairs = [(getattr(found, kind), getattr(expected, kind)) for kind in ("energy", "forces")]
            by_hand = sum(((x - y).norm() / y.norm()) ** 2 for x, y in pairs).sqrt().item()
            assert errors[name] == pytest.approx(by_hand, rel=0.1, abs=1e-6), name


def rounded(x):
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    return (x / step.clamp_min(1e-30)).round() * step


def test_keeping_all_is_bf16(model, graph):
    names = layer_errors(model, [graph, load_golden("oxide").graph(torch.float32)])
    assert change(keep_in_bf16(model, names), graph) == 0
    assert change(model, graph) > 0


@torch.no_grad()
def test_kept_in_a_file_and_dropped_by_pruning(model, tmp_path):
    name = "backbone.int_blocks.0.layers_before_skip.0.dense_mlp.1"
    kept = keep_in_bf16(model, [name])
    ejmp.save(kept, tmp_path / "small", weights="int8")
    loaded = ejmp.load(tmp_path / "small", precision="int8")
    assert loaded.config.bf16_layers == (name,)
    weight = loaded.get_submodule(name).linear.weight
    assert torch.equal(weight, model.get_submodule(name).linear.weight.half().float())
    assert ejmp.prune(loaded, blocks=1).config.bf16_layers == ()
    assert model.config.bf16_layers == ()


def test_refused(model):
    with pytest.raises(ValueError, match="graphs: expected some"):
        layer_errors(model, [])
    for name in ("backbone.int_blocks.9.dense_ca", "backbone.bases", ""):
        with pytest.raises(ValueError, match=r"JMPConfig\.bf16_layers: there is no linear layer"):
            keep_in_bf16(model, [name])
    with pytest.raises(ValueError, match=r"JMPConfig\.bf16_layers: there is no linear layer 'x'"):
        ejmp.JMP(dataclasses.replace(model.config, bf16_layers=("x",)))
