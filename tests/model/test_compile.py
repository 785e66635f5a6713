"""`JMP.compile`: no graph breaks, one compilation per shape, the plain model's results.

Tracing is tested with torch.compile's backends that generate no code.
"""

import copy
import io
import logging

import pytest
import torch
import torch._dynamo
from support.compile_cases import allow_meta, assert_equal_outputs, graph_of, make_model
from support.tolerances import relative_error
from torch._dynamo.testing import CompileCounterWithBackend

import ejmp
from ejmp.graph.padding import Buckets, GraphShape
from ejmp.model.compiled import Compiled

NAMES = (
    *("H2", "H2O", "NH3", "CH4", "CO2", "HCN", "C2H2", "C2H4", "C2H6", "CH3OH", "CH3CN", "CH3CHO", "CH3CH2OH"),
    *("C3H8", "CH3SH", "C5H5N", "C6H6", "C4H4S", "C3H6", "C4H10"),
)


@pytest.fixture(autouse=True)
def fresh_dynamo(monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # or pytest keeps thousands of lines
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("backend", "precision", "device"),
    [
        ("reference", "fp32", "cpu"),
        ("reference", "bf16", "cpu"),
        ("native", "fp32", "cpu"),
        ("native", "bf16", "meta"),
        ("triton", "fp32", "meta"),
        ("triton", "fp16", "meta"),
    ],
)
def test_no_graph_breaks(tiny_config, monkeypatch, backend, precision, device):
    model = make_model(tiny_config, backend, precision, blocks=2)
    graph = graph_of(model, "H2O", "CH4").to(device)
    model.to(device)
    if device == "meta":
        allow_meta(monkeypatch, backend)
    with torch.no_grad():
        found = torch._dynamo.explain(model)(graph)
    assert (found.graph_count, found.graph_break_count) == (1, 0)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_one_compilation_per_shape(tiny_config, backend):
    """More shapes than torch.compile traces on its own (8)."""
    model = make_model(tiny_config, backend)
    graphs = [graph_of(model, *NAMES[i : i + 1 + i % 4]) for i in range(len(NAMES))]
    if backend == "reference":  # it takes longer to trace
        graphs = graphs[:6]
    expected = [model(graph) for graph in graphs]
    compiler, buckets = CompileCounterWithBackend("eager"), Buckets(growth=1.0)
    model.compile(buckets=buckets, compiler=compiler)
    with torch.no_grad():
        for _ in range(2):
            for graph, plain in zip(graphs, expected, strict=True):
                assert_equal_outputs(model(graph), plain)
    assert len(buckets.shapes) < len(graphs)
    assert backend == "reference" or len(buckets.shapes) > 8
    assert compiler.frame_count == len(buckets.shapes)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_gradient_forces_and_training(tiny_config, backend):
    """Through AOTAutograd, which traces the derivatives too."""
    model = make_model(tiny_config, backend)
    graph = graph_of(model, "CH3CN", "H2O")

    def gradients():
        positions = graph.positions.clone().requires_grad_()
        out = model(graph.with_positions(positions))
        loss = (out.energy**2).sum() + (out.forces**2).sum()
        return out, torch.autograd.grad(loss, [positions, *model.parameters()], materialize_grads=True)

    forces, (out, plain) = ejmp.gradient_forces(model, graph, 1), gradients()
    compiler = CompileCounterWithBackend("aot_eager")
    model.compile(compiler=compiler)
    assert relative_error(ejmp.gradient_forces(model, graph, 1), forces) < 1e-12
    before = compiler.frame_count
    assert before > 0
    compiled_out, compiled = gradients()
    assert compiler.frame_count > before
    assert_equal_outputs(compiled_out, out)
    for value, expected in zip(compiled, plain, strict=True):
        assert relative_error(value, expected) < 1e-9
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    again = ejmp.gradient_forces(model, graph, 1, create_graph=True)
    assert relative_error(again.detach(), forces) < 1e-12
    (second,) = torch.autograd.grad((again**2).sum(), model.backbone.bases.mlp_rbf_qint.linear.weight)
    assert second.any()


def test_triton_is_traced_with_its_derivatives(tiny_config, monkeypatch):
    """Without values, which in the interpreter would take minutes; padded graphs have theirs in test_padding.py."""
    model = make_model(tiny_config, "triton")
    graph = graph_of(model, "H2O", "CH4").to("meta")
    model.to("meta")
    allow_meta(monkeypatch, "triton")
    model.compile(compiler="aot_eager")
    assert ejmp.gradient_forces(model, graph).shape == (8, 3)
    out = model(graph)
    (out.energy.sum() + out.forces.sum()).backward()
    assert model.backbone.int_blocks[0].dense_ca.linear.weight.grad is not None


@pytest.mark.parametrize(("backend", "precision"), [("reference", "bf16"), ("native", "bf16"), ("reference", "fp16")])
def test_low_precision(tiny_config, backend, precision):
    model = make_model(tiny_config, backend, precision)
    graph = graph_of(model, "CH3CH2OH")
    with torch.no_grad():
        expected = model(graph)
        model.compile(compiler="eager")
        assert_equal_outputs(model(graph), expected, 1e-2)


@pytest.mark.parametrize("sizes", [{"energy_reduction": "mean"}, {"direct_forces": False, "num_tasks": 1}])
def test_other_models(tiny_config, sizes):
    model = make_model(tiny_config, **sizes)
    graph = graph_of(model, "H2O", "CH4")
    with torch.no_grad():
        expected = model(graph)
        model.compile(compiler="eager")
        out = model(graph)
    assert relative_error(out.energy, expected.energy) < 1e-12
    assert (out.forces is None) == (expected.forces is None)


def test_direct_forces_can_be_left_out(tiny_config):
    model = make_model(tiny_config)
    model.compile(compiler="eager")
    assert model(graph_of(model, "H2O"), direct_forces=False).forces is None


def test_the_model_stays_what_it_is(tiny_config):
    model = make_model(tiny_config)
    names, graph = list(model.state_dict()), graph_of(model, "H2O")
    compiler = CompileCounterWithBackend("eager")
    model.compile(compiler=compiler)
    with torch.no_grad():
        model(graph)
    ejmp.gradient_forces(model, graph)
    assert list(model.state_dict()) == names
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert copied.compiled is None
        assert_equal_outputs(copied(graph), model.forward(graph))
    before = compiler.frame_count
    model.compile("off")
    assert_equal_outputs(model(graph), model.forward(graph))
    assert compiler.frame_count == before


def test_weights_may_change(tiny_config):
    model, other = make_model(tiny_config), make_model(tiny_config)
    graph = graph_of(model, "CH4")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    model.compile(compiler="eager")
    ejmp.gradient_forces(model, graph)
    model(graph)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    for assign in (False, True):
        assert_equal_outputs(model(graph), other(graph))
        assert relative_error(ejmp.gradient_forces(model, graph), ejmp.gradient_forces(other, graph)) < 1e-12
        with torch.no_grad():
            other.backbone.bases.mlp_rbf_aint.weight.mul_(2.0)
        model.load_state_dict(other.state_dict(), assign=assign)
    model.float()
    single, plain = graph.to(dtype=torch.float32), other.float()
    assert_equal_outputs(model(single), plain(single), 1e-4)
    assert relative_error(ejmp.gradient_forces(model, single), ejmp.gradient_forces(plain, single)) < 1e-3


def test_refusals(tiny_config):
    model = make_model(tiny_config)
    with pytest.raises(ValueError, match=r"mode: expected .*'quick'"):
        model.compile("quick")
    with pytest.raises(RuntimeError, match="needs a CUDA device, the model is on cpu"):
        model.compile("latency")
    model.compile(buckets=Buckets(growth=None), compiler="eager")
    with pytest.raises(ValueError, match="fits in a shape"):
        model(graph_of(model, "H2O"))
    with pytest.raises(ValueError, match=r"expected dtype torch\.float64"):
        model(graph_of(model, "H2O").to(dtype=torch.float32))


@pytest.mark.parametrize(
    ("backend", "mode", "compiler"),
    [("native", "throughput", "inductor"), ("native", "latency", None), ("reference", "latency", "inductor")],
)
def test_cuda_graphs_of_kernels_are_recorded_without_a_compiler(tiny_config, monkeypatch, backend, mode, compiler):
    asked = []
    monkeypatch.setattr("ejmp.model.jmp.Compiled", lambda model, *given: asked.append(given))
    make_model(tiny_config, backend).compile(mode)
    assert asked == [(mode, None, compiler)]


class Recorded:
    """Stands for CUDA graphs on the CPU: replaying runs the function again on its inputs, into the same outputs."""

    def __init__(self):
        self.count = 0

    def __call__(self, function):
        self.count += 1
        result = function()

        def launch():
            for value, new in zip(result, function(), strict=True):
                value.copy_(new)

        return result, launch


@pytest.fixture
def recorded(tiny_config):
    """A model and its stand-in for CUDA graphs, with one shape for small molecules."""
    model, recorder = make_model(tiny_config), Recorded()
    buckets = Buckets([GraphShape.holding(GraphShape.of(graph_of(model, "C2H6", "CH3OH")))], growth=None)
    compiled = Compiled(model, "throughput", buckets, None)
    compiled.record = recorder
    return model, compiled, recorder


def test_replay_is_the_plain_model(recorded):
    model, compiled, recorder = recorded
    graphs = [graph_of(model, *names) for names in (("C2H6",), ("CH4", "H2O"), ("H2O", "CH3OH"), ("C2H6",))]
    expected = [model(graph) for graph in graphs]
    forces = [ejmp.gradient_forces(model, graph, 1) for graph in graphs]
    model._compiled_call_impl = compiled
    with torch.no_grad():
        out = [model(graph) for graph in graphs]
    with torch.inference_mode():
        out += [model(graph) for graph in graphs]
    for value, plain in zip(out, expected * 2, strict=True):
        assert_equal_outputs(value, plain)
        assert not value.energy.requires_grad
    assert recorder.count == 1
    found = [ejmp.gradient_forces(model, graph, 1) for graph in graphs]
    for value, plain in zip(found, forces, strict=True):
        assert relative_error(value, plain) < 1e-12
    assert recorder.count == 2


def test_replay_leaves_training_alone(recorded):
    model, compiled, recorder = recorded
    model._compiled_call_impl = compiled
    out = model(graph_of(model, "CH4"))
    out.energy.sum().backward()
    assert model.embedding.atom_embedding.weight.grad.any()
    assert recorder.count == 0


def test_moved_parameters_are_recorded_anew(recorded):
    model, compiled, recorder = recorded
    graph = graph_of(model, "CH4")
    model._compiled_call_impl = compiled
    with torch.no_grad():
        model(graph)
        model.float().double()
        assert_equal_outputs(model(graph), model.forward(graph))
    assert recorder.count == 2
