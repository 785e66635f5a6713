"""Models in 8 bits: near the float32 model, and refused where they cannot be had."""

import pytest
import torch
from support.inputs import load_golden, require_native

import ejmp
from ejmp.model import precision
from ejmp.train.demo import demo_teacher
from ejmp.train.distributed import Ranks
from ejmp.train.evaluate import evaluate
from ejmp.train.faults import session
from ejmp.train.sources import at_most, demo_mix
from ejmp_kernels import quantized


@pytest.fixture(autouse=True)
def vnni():
    require_native()
    if quantized.why_unavailable():
        pytest.skip(quantized.why_unavailable())


@pytest.fixture
def models(tiny_config, tiny_weights):
    model = ejmp.JMP(tiny_config)
    model.load_state_dict(tiny_weights)
    return model, model.on(precision="int8")


@pytest.mark.parametrize("case", ["ethanol", "oxide", "batch"])
@torch.no_grad()
def test_near_float32(models, case):
    """Linear maps have errors of about 1%, and so have energies and forces of the golden structures."""
    graph = load_golden(case).graph(torch.float32)
    exact, found = (model(graph) for model in models)
    for name in ("energy", "forces"):
        x, y = getattr(exact, name), getattr(found, name)
        assert 0 < (x - y).norm() <= 0.05 * x.norm(), name


@torch.no_grad()
def test_weights_that_change(models):
    graph = load_golden("ethanol").graph(torch.float32)
    exact, found = models
    before = found(graph).energy
    for parameter in exact.backbone.out_mlp_E.parameters():
        parameter *= 1.5
    exact, found = exact(graph).energy, found(graph).energy
    assert not torch.allclose(before, found)
    assert (exact - found).norm() <= 0.05 * exact.norm()


def test_errors_of_the_demo_teacher():
    """At most 3% more error of forces than in float32, without any training."""
    with session("cpu") as ranks:
        assert isinstance(ranks, Ranks)
        model = ejmp.load(demo_teacher())
        sources = [at_most(source, "val", 12, seed=0) for source in demo_mix()]
        exact, found = (evaluate(model.on(precision=name), sources, ranks) for name in ("fp32", "int8"))
    for dataset, errors in exact.items():
        assert found[dataset]["forces_meV_per_A"] <= 1.03 * errors["forces_meV_per_A"], dataset


def test_no_derivatives(models):
    graph = load_golden("ethanol").graph(torch.float32)
    with pytest.raises(RuntimeError, match=r'precision="int8" has no derivatives: predict .* precision="bf16"'):
        models[1](graph)
    with pytest.raises(RuntimeError, match='precision="int8" has no derivatives'), torch.no_grad():
        ejmp.gradient_forces(models[1], graph)


def test_refused(models, monkeypatch):
    graph = load_golden("ethanol").graph(torch.float32)
    with pytest.raises(ValueError, match="cannot be compiled"):
        models[1].compile()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match='precision="int8" is computed by the native backend, this is reference'):
            models[1].on(backend="reference")(graph)
        with pytest.raises(ValueError, match="needs float32 parameters"):
            models[0].on(precision="int8").double()(graph.to(dtype=torch.float64))
        models[0].float()
        monkeypatch.setattr(quantized, "why_unavailable", lambda: "this processor has no AVX-512 VNNI instructions")
        with pytest.raises(ValueError, match=r"needs a CPU with AVX-512 VNNI: this processor has no"):
            models[1](graph)
    with pytest.raises(ValueError, match="the model is on cuda"):
        precision.check_precision("int8", torch.device("cuda"))
