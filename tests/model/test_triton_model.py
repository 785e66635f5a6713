"""The model on Triton's kernels, interpreted unless there is a GPU: golden outputs, derivatives, precisions."""

import importlib

import pytest
import torch
from support.inputs import load_golden
from support.tolerances import relative_error, tolerance

import ejmp
from ejmp_kernels import availability

pytest.importorskip("triton")
DEVICE = "cpu" if availability.interpreted() else "cuda"
HYDROGEN_PEROXIDE = ejmp.Structure(
    numbers=[8, 8, 1, 1],
    positions=[[0.0, 0.7, -0.05], [0.0, -0.7, -0.05], [0.8, 0.9, 0.4], [-0.8, -0.9, 0.4]],
)
"""The smallest molecule with a dihedral angle."""


@pytest.fixture
def models(tiny_config, tiny_weights):
    """Reference and Triton, with the golden weights."""
    found = [ejmp.JMP(tiny_config, name).to(DEVICE) for name in ("reference", "triton")]
    for model in found:
        model.load_state_dict(tiny_weights)
    return found


@pytest.fixture(params=[False, True], ids=["vendor's products", "fused"])
def fused(request, monkeypatch):
    """Whether products in float64, too, take along what follows them, as those in 16 bits do."""
    gemm = importlib.import_module("ejmp_kernels.triton_kernels.gemm")
    launched, run = [], gemm.run
    monkeypatch.setattr(gemm, "run", lambda *given, **options: (launched.append(given), run(*given, **options)))
    if request.param:
        monkeypatch.setattr(gemm, "fuses", lambda x: True)
        for module in ("dense", "sums"):
            monkeypatch.setattr(f"ejmp_kernels.{module}.LOW", (torch.float64,))
    yield
    assert bool(launched) == request.param
    kinds = {tuple(t is not None for t in (*arrays[2:7], rows[0])) for arrays, rows, _ in launched}
    assert len(kinds) == (6 if request.param else 0)  # plain; with filter, residual, two, both, rows


@pytest.mark.usefixtures("fused")
def test_equals_golden(models):
    golden = load_golden("ethanol")
    with torch.no_grad():
        out = models[1].double()(golden.graph(device=DEVICE))
    assert relative_error(out.energy.cpu(), golden.values["energy"]) <= 1e-9
    assert relative_error(out.forces.cpu(), golden.values["forces"]) <= 1e-9


@pytest.mark.parametrize("channels", [20, 40])
def test_narrower_blocks(models, channels):
    """The kernels serve widths that are no power of two, nor a multiple of eight."""
    graph = ejmp.build_graph(HYDROGEN_PEROXIDE, 8.0, dtype=torch.float64, device=DEVICE)
    small = ejmp.prune(models[0].double(), edge_channels=channels, data=[graph])
    with torch.no_grad():
        found, expected = small.on(backend="triton")(graph), small(graph)
    assert relative_error(found.energy, expected.energy) <= 1e-9
    assert relative_error(found.forces, expected.forces) <= 1e-9


def test_training_on_gradient_forces(models):
    """Gradient forces, and the gradients of a loss on them by every parameter: each op differentiated twice."""
    graph = ejmp.build_graph(HYDROGEN_PEROXIDE, 8.0, dtype=torch.float64, device=DEVICE)
    found = []
    for model in models:
        parameters = list(model.double().parameters())
        forces = ejmp.gradient_forces(model, graph, create_graph=True)
        gradients = torch.autograd.grad(forces.square().sum(), parameters, allow_unused=True)
        found.append([forces.detach(), *(g for g in gradients if g is not None)])
    assert len(found[0]) == len(found[1]) > 100
    for mine, expected in zip(found[1], found[0], strict=True):
        assert relative_error(mine, expected) <= 1e-9


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_precisions(models, precision):
    """Features in the low type, geometry and sums in float32."""
    if precision == "bf16" and DEVICE == "cpu":
        pytest.skip("the interpreter has no bfloat16 products")
    graph = ejmp.build_graph(HYDROGEN_PEROXIDE, 8.0, device=DEVICE)
    with torch.no_grad():
        out = models[1].on(precision=precision)(graph)
        expected = models[0].double()(graph.to(dtype=torch.float64))
    allowed = tolerance("Triton's model", precision)
    assert out.energy.dtype == torch.float32
    assert relative_error(out.energy, expected.energy) <= allowed
    assert relative_error(out.forces, expected.forces) <= allowed


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs programs one after another, always alike")
def test_same_bits_every_run(models):
    """No atomics in a forward pass."""
    graph = ejmp.build_graph(HYDROGEN_PEROXIDE, 8.0, device=DEVICE)
    with torch.no_grad():
        first, second = models[1](graph), models[1](graph)
    assert torch.equal(first.energy, second.energy)
    assert torch.equal(first.forces, second.forces)
