"""Sizes: parameter counts of the published models, upstream's names, and what a config refuses."""

import dataclasses
import json

import pytest
import torch
from support.inputs import shared_file

import ejmp

PARAMETERS = {
    # (preset, scalar, blocks): ../shared/spec/model.md; the scalar JMP-L column rounds to the paper's table 2
    ("l", True, 6): 160_875_776,
    ("l", True, 5): 134_537_472,
    ("l", True, 4): 108_199_168,
    ("l", True, 3): 81_860_864,
    ("l", True, 2): 55_522_560,
    ("l", False, 6): 234_267_648,
    ("l", False, 5): 200_556_544,
    ("l", False, 4): 166_845_440,
    ("l", False, 3): 133_134_336,
    ("l", False, 2): 99_423_232,
    ("s", True, 4): 28_871_936,
    ("s", False, 4): 44_131_328,
    ("s", True, 3): 22_190_848,
    ("s", False, 3): 35_607_040,
    ("s", True, 2): 15_509_760,
    ("s", False, 2): 27_082_752,
}
PRESETS = {"l": ejmp.jmp_l, "s": ejmp.jmp_s}


def on_meta(config):
    with torch.device("meta"):
        return ejmp.JMP(config)


@pytest.mark.parametrize(("preset", "scalar", "blocks"), PARAMETERS)
def test_parameter_counts(preset, scalar, blocks):
    model = on_meta(PRESETS[preset](blocks=blocks, scalar=scalar))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[preset, scalar, blocks]


@pytest.mark.parametrize("preset", PRESETS)
def test_state_dict_is_upstreams(preset):
    expected = json.loads(shared_file(f"spec/jmp_{preset}_state_dict.json").read_text())
    model = on_meta(PRESETS[preset]())
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert {
        name: {"shape": list(value.shape), "kind": "parameter" if name in parameters else "buffer"}
        for name, value in model.state_dict().items()
    } == expected
    factors = json.loads(shared_file(f"spec/jmp_{preset}_scale_factors.json").read_text())
    assert {f"backbone.{name}.scale_factor" for name in factors} <= set(expected)


def test_from_upstream_matches_the_weights(tiny_config, tiny_weights):
    assert {name: value.shape for name, value in on_meta(tiny_config).state_dict().items()} == {
        name: value.shape for name, value in tiny_weights.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation"),
        ({"num_blocks": None}, "num_blocks"),
        ({"cbf": {"name": "x"}}, "cbf"),
        ({"num_output_afteratom": 0}, "num_output_afteratom: expected 1 or more"),
    ],
)
def test_from_upstream_refuses(change, message):
    config = json.loads(shared_file("golden/tiny.json").read_text()) | change
    config = {name: value for name, value in config.items() if value is not None or name == "rbf_spherical"}
    with pytest.raises(ValueError, match=message):
        ejmp.JMPConfig.from_upstream(config)


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": 0},
        {"blocks": 2.0},
        {"blocks": "2"},
        {"rbf_cutoff": float("nan")},
        {"emb_size_edge": -1},
        {"energy_reduction": "max"},
        {"kept_blocks": (0, 1)},
        {"bf16_layers": None},
        {"bf16_layers": "backbone.bases"},
        {"bf16_layers": (3,)},
    ],
)
def test_config_refuses(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(ejmp.jmp_l(), **change)
