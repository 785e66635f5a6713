"""Checkpoints as JMP's own code and its users save them: fine-tuned heads, prefixes, averages, configs as objects."""

import dataclasses
import enum
import pathlib
import sys
import types

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.inputs import load_golden, shared_file

import ejmp


def backbone(weights, *, forces):
    """The tensors of a fine-tuned model's backbone under upstream's names, with the force branch or without."""
    branch = ("out_mlp_F", "seq_forces", "dense_rbf_F", "scale_rbf_F")
    kept = {
        name: value
        for name, value in weights.items()
        if name.startswith("backbone.") and (forces or not any(part in name for part in branch))
    }
    return {"embedding.weight": weights["embedding.atom_embedding.weight"]} | kept


def head(weights, which="energy", number=0):
    """Weights and biases of a golden head by layer."""
    prefix = f"output.out_{which}.{number}."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def by_hand(tiny, graph, layers):
    """Energies from the model's features and a head's layers, in float64: linear maps and scaled SiLU, atoms summed."""
    x = tiny.features(graph).mlp_E[-1].double()
    numbers = sorted({int(name.split(".")[0]) for name in layers})
    for k in numbers:
        x = x @ layers[f"{k}.weight"].double().T
        if f"{k}.bias" in layers:
            x = x + layers[f"{k}.bias"].double()
        if k != numbers[-1]:
            x = torch.nn.functional.silu(x) / 0.6
    return torch.zeros(graph.num_structures, dtype=torch.float64).index_add(0, graph.batch, x[:, 0])


@pytest.mark.parametrize("forces", [False, True])
def test_fine_tuned_on_energies_and_gradient_forces(tmp_path, tiny, tiny_weights, forces):
    layers = {name: value for name, value in head(tiny_weights).items() if name.endswith("weight")}
    state = backbone(tiny_weights, forces=forces) | {f"out_energy.{name}": value for name, value in layers.items()}
    torch.save({"state_dict": state, "hyper_parameters": {"molecule": "aspirin"}}, tmp_path / "rmd17.ckpt")
    model = ejmp.load(tmp_path / "rmd17.ckpt")
    assert (model.config.num_tasks, model.config.direct_forces, model.tasks) == (1, False, ())
    graph = load_golden("ethanol").graph()
    found = model.double()(graph).energy[:, 0]
    torch.testing.assert_close(found, by_hand(tiny, graph, layers), rtol=1e-10, atol=1e-12)


def test_fine_tuned_with_direct_forces(tmp_path, tiny, tiny_weights):
    state = backbone(tiny_weights, forces=True)
    for which in ("energy", "forces"):
        state |= {f"out_{which}.{name}": value for name, value in head(tiny_weights, which).items()}
    torch.save(state, tmp_path / "md22.pt")
    graph = load_golden("ethanol").graph()
    found, expected = ejmp.load(tmp_path / "md22.pt").double()(graph), tiny(graph)
    torch.testing.assert_close(found.energy[:, 0], expected.energy[:, 0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.forces[:, 0], expected.forces[:, 0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("inner", ["_module_dict.ft_mlp_", ""])
def test_fine_tuned_on_scalars(tmp_path, tiny, tiny_weights, inner, reduction):
    layers = head(tiny_weights)
    state = backbone(tiny_weights, forces=False)
    state |= {f"graph_outputs.{inner}U_0.out_mlp.{name}": value for name, value in layers.items()}
    settings_ = {"graph_scalar_targets": ["U_0"], "graph_scalar_reduction": {"U_0": reduction}}
    torch.save({"state_dict": state, "hyper_parameters": settings_}, tmp_path / "qm9.ckpt")
    graph = load_golden("ethanol").graph()
    expected = by_hand(tiny, graph, layers)
    expected = expected / graph.ptr.diff() if reduction == "mean" else expected
    found = ejmp.load(tmp_path / "qm9.ckpt").double()(graph).energy[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"graph_outputs._module_dict.ft_mlp_R_2_Abs.scalar_mlp.0.weight": torch.zeros(2, 2)},
            "fine-tuned.*scalar_mlp",
        ),
        ({"graph_classification_outputs._module_dict.ft_mlp_metal.out_mlp.0.weight": torch.zeros(2, 2)}, "fine-tuned"),
        ({}, "without a head"),
    ],
)
def test_other_heads_are_refused(tmp_path, tiny_weights, names, message):
    torch.save(backbone(tiny_weights, forces=False) | names, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        ejmp.load(tmp_path / "x.pt")


PREFIXES = ("", "module.", "model.", "_orig_mod.", "module.model.", "model._orig_mod.", "student.net.")
WRAPPERS = ("bare", "state_dict", "model_state_dict", "model", "ema_state_dict", "ema_dict")


def is_tiny(model, weights):
    return all(torch.equal(value.float(), weights[name].float()) for name, value in model.state_dict().items())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefix=st.sampled_from(PREFIXES),
    wrapper=st.sampled_from(WRAPPERS),
    half=st.booleans(),
    extra=st.sampled_from(["", "epoch", "n_averaged", "train_metrics.total"]),
)
def test_prefixes_and_wrappers(tmp_path, tiny_weights, prefix, wrapper, half, extra):
    cast = {name: value.half().float() if half else value for name, value in tiny_weights.items()}
    state = {prefix + name: value.half() if half else value for name, value in cast.items()}
    if extra and extra != "epoch":
        state[extra] = torch.zeros((), dtype=torch.int64)
    saved = state if wrapper == "bare" else {wrapper: state}
    if extra == "epoch" and wrapper != "bare":
        saved |= {"epoch": 3}
    if wrapper.startswith("ema"):
        saved["state_dict"] = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save(saved, tmp_path / "x.pt")
    assert is_tiny(ejmp.load(tmp_path / "x.pt"), cast)


def test_half_a_prefix_is_refused(tmp_path, tiny_weights):
    state = {("module." if "backbone" in name else "") + name: value for name, value in tiny_weights.items()}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"start with 'module\.', but not embedding"):
        ejmp.load(tmp_path / "x.pt")


def test_a_checkpoint_of_something_else():
    with pytest.raises(ValueError, match=r"other\.pt|not a JMP state dict"):
        ejmp.load(shared_file("cases/11-checkpoint-prefixes/other.pt"))


class Kind(enum.Enum):
    LARGE = "large"


@dataclasses.dataclass
class Inner:
    kind: Kind
    folder: pathlib.Path


class Config(dict):
    """A mapping with attributes, as Lightning's AttributeDict is."""


class Settings:
    def __init__(self, **values):
        self.__dict__.update(values)

    def __getstate__(self):
        return {"__dict__": dict(self.__dict__), "__fields_set__": {"inner"}}

    def __setstate__(self, state):
        self.__dict__.update(state["__dict__"])


def test_hyper_parameters_that_are_objects(tmp_path, tiny_weights, monkeypatch):
    module = types.ModuleType("jmp_configs")
    monkeypatch.setitem(sys.modules, "jmp_configs", module)
    for kind in (Kind, Inner, Config, Settings):
        monkeypatch.setattr(kind, "__module__", "jmp_configs")
        setattr(module, kind.__name__, kind)
    inner = Inner(Kind.LARGE, pathlib.PurePosixPath("/data"))
    values = Config(inner=inner, more=Settings(inner=inner, kinds={Kind.LARGE}), rate=1e-4)
    torch.save({"state_dict": dict(tiny_weights), "hyper_parameters": values, "epoch": 7}, tmp_path / "lightning.ckpt")
    monkeypatch.delitem(sys.modules, "jmp_configs")
    assert is_tiny(ejmp.load(tmp_path / "lightning.ckpt"), tiny_weights)
    assert "jmp_configs" not in sys.modules


def test_no_message_advises_to_run_code(tmp_path, tiny_weights):
    torch.save({"state_dict": dict(tiny_weights), "hyper": Running()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"not a checkpoint of plain tensors.*save only the state_dict") as caught:
        ejmp.load(tmp_path / "x.pt")
    assert "weights_only" not in str(caught.value)


class Running:
    def __reduce__(self):
        return (exec, ("raise SystemExit",))
