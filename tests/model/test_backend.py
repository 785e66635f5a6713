"""Backends of the model: what is chosen, what is refused, and that results and state dict do not depend on it."""

import dataclasses

import pytest
import torch
from ase.build import molecule
from support.inputs import load_golden, require_native
from support.tolerances import relative_error
from torch.utils.flop_counter import FlopCounterMode

import ejmp
from ejmp import cli
from ejmp.measure import workloads
from ejmp.measure.bench import workload_graph
from ejmp.model import backend
from ejmp_kernels import availability


@pytest.fixture
def pair_of_models(tiny_config, tiny_weights):
    require_native()
    models = [ejmp.JMP(tiny_config, name) for name in ("reference", "native")]
    for model in models:
        model.load_state_dict(tiny_weights)
    return models


def test_state_dict_does_not_depend_on_it(pair_of_models):
    reference, native = (model.state_dict() for model in pair_of_models)
    assert list(reference) == list(native)
    assert all(torch.equal(reference[name], native[name]) for name in native)


def test_choice(tiny_config):
    require_native()
    assert ejmp.JMP(tiny_config).backend == "native"
    assert ejmp.JMP(tiny_config, precision="bf16").backend == "native"
    half = ejmp.JMP(tiny_config, precision="fp16")
    backend.resolve.cache_clear()
    with pytest.warns(UserWarning, match="float16"):
        assert half.backend == "reference"
    small = ejmp.prune(ejmp.JMP(tiny_config, "reference"), blocks=2)
    assert small.requested_backend == "reference"


def test_refused_with_the_reason(tiny_config, monkeypatch):
    require_native()
    with pytest.raises(ValueError, match="backend: expected one of"):
        ejmp.JMP(tiny_config, "cuda")
    with monkeypatch.context() as patch:
        patch.setattr(availability, "why_triton_unavailable", lambda device=None: "Triton is not installed")
        with pytest.raises(RuntimeError, match="Triton is not installed"):
            ejmp.JMP(tiny_config, "triton")
    half = ejmp.JMP(tiny_config, "native", "fp16")
    with pytest.raises(RuntimeError, match="float16"):
        half(ejmp.build_graph(molecule("H2O"), 8.0))
    monkeypatch.setattr(availability, "why_unavailable", lambda device="cpu": "no compiler")
    backend.resolve.cache_clear()
    with pytest.raises(RuntimeError, match="no compiler"):
        ejmp.JMP(tiny_config, "native")
    with pytest.warns(UserWarning, match="no compiler"):
        assert ejmp.JMP(tiny_config).backend == "reference"
    backend.resolve.cache_clear()


def test_low_precision_is_as_good(pair_of_models):
    """bf16 on both backends stays equally near float64."""
    golden = load_golden("batch")
    graph, expected = golden.graph(torch.float32), golden.values["energy"]
    errors = []
    for model in pair_of_models:
        with torch.no_grad():
            errors.append(relative_error(model.on(precision="bf16")(graph).energy, expected))
    assert errors[1] <= errors[0]


def test_bf16_trains(pair_of_models):
    """Gradients with respect to float32 parameters, also through gradient forces."""
    reference, native = pair_of_models
    graph = load_golden("ethanol").graph(torch.float32)

    def gradients(model):
        loss = (ejmp.gradient_forces(model, graph, create_graph=True) ** 2).sum()
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    exact = gradients(reference)
    low = gradients(native.on(precision="bf16"))
    assert low.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(low, exact, dim=0) > 0.99


@pytest.mark.parametrize("grad", [False, True])
def test_flops_are_counted(tiny_config, grad):
    """torch's counter sees native ops; of the many-body sums they do less than the model defines."""
    require_native()
    graph = workload_graph(workloads.molecules())
    counts = {}
    for name in ("native", "reference"):
        model = ejmp.JMP(tiny_config, name)
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            model(graph)
        counts[name] = counter.get_flop_counts()["Global"], counter.get_total_flops()
    by_op, total = counts["native"]
    by_name = {str(op).removeprefix("ejmp.").removesuffix("_mixed"): flops for op, flops in by_op.items()}
    assert {"matmul", "triplet", "quadruplet", "pair", "radial"} <= set(by_name)
    pairs = (graph.main.ptr.diff() ** 2).sum().item()
    near = (graph.main.ptr.diff() * graph.atom_edges.ptr.diff()).sum().item()
    C, A, S, E = tiny_config.emb_size_trip_in, tiny_config.emb_size_cbf, tiny_config.num_spherical, graph.main.num_edges
    one = pairs + 2 * near + A * (2 * E + graph.atom_edges.num_edges)
    assert by_name["triplet"] == tiny_config.blocks * 2 * S * C * one
    assert total < counts["reference"][1]


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("quadruplets", "cpu  float32", "triton backend", "matrix products"):
        assert word in text


def test_a_model_on_another_backend_shares_its_parameters(tiny_config):
    require_native()
    model = ejmp.JMP(dataclasses.replace(tiny_config, blocks=1), "native")
    model.compile(compiler=None)
    other = model.on(backend="reference", precision="bf16")
    assert (other.backend, other.precision, other.compiled) == ("reference", "bf16", None)
    assert (model.backend, model.precision) == ("native", "fp32")
    assert model.compiled is not None
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    graph = ejmp.build_graph([molecule("CH3OH")], 8.0)
    reference = model.on(backend="reference")
    before = reference(graph).energy
    with torch.no_grad():
        model.output.out_energy[0][-1].weight.mul_(2)
    assert torch.equal(reference(graph).energy[:, 0], 2 * before[:, 0])
    assert model.on().precision == "fp32"


def test_a_model_for_one_task_shares_its_parameters(tiny, tmp_path):
    tasks = [ejmp.Task(name=name, head=i, std=1.0 + i) for i, name in enumerate(("a", "b", "c", "d"))]
    model = ejmp.prune(tiny, blocks=1)
    model.tasks = tasks
    other = model.for_task("c")
    assert other.tasks == (dataclasses.replace(tasks[2], head=0),)
    places = {name: value.data_ptr() for name, value in model.state_dict().items()}
    for name, value in other.state_dict().items():
        whole = name.replace("out_energy.0.", "out_energy.2.").replace("out_forces.0.", "out_forces.2.")
        assert value.data_ptr() == places[whole]
    graph = ejmp.build_graph([molecule("CH3OH")], 8.0, dtype=torch.float64)
    expected, found = model(graph), other(graph)
    assert torch.equal(found.energy, expected.energy[:, 2:3])
    assert torch.equal(found.forces, expected.forces[:, 2:3])
    ejmp.save(other, tmp_path / "one")
    saved = ejmp.load(tmp_path / "one")
    assert saved.tasks == other.tasks
    assert torch.equal(saved(graph).forces, found.forces)
    with pytest.raises(ValueError, match="task: expected one of a, b, c, d, got 'e'"):
        model.for_task("e")


def test_there_is_no_other_backend_or_precision(tiny_config):
    with torch.device("meta"):
        model = ejmp.JMP(dataclasses.replace(tiny_config, blocks=1))
    with pytest.raises(ValueError, match="backend: expected one of"):
        model.on(backend="fast")
    with pytest.raises(ValueError, match="precision: expected one of"):
        model.on(precision="fp4")


@torch.no_grad()
def test_weights_that_change_unnoticed_between_training_and_evaluation(tiny_config, tiny_weights):
    """DeepSpeed's optimizers write through views that no version counts; copies in bfloat16 must not outlive that."""
    require_native()
    model = ejmp.JMP(tiny_config, backend="native", precision="bf16")
    model.load_state_dict(tiny_weights)
    graph = load_golden("ethanol").graph(torch.float32)
    model.eval()
    before = model(graph).energy
    for parameter in model.backbone.out_mlp_E.parameters():
        parameter.data.mul_(1.5)
    in_training = model.train()(graph).energy
    torch.testing.assert_close(model.eval()(graph).energy, in_training, rtol=0, atol=0)
    assert (in_training - before).norm() > 0.1 * before.norm()
