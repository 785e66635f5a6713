"""`JMP.compile`: no graph breaks, one compilation per shape, the plain model's results, and nothing waits for a GPU.

Tracing is tested with torch.compile's backends that generate no code; what needs a GPU runs where there is one.
"""

import contextlib
import copy
import dataclasses
import io

import pytest
import torch
import torch._dynamo
from ase.build import molecule
from conftest import require_native, require_triton
from tolerances import relative_error
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import ejmp
from ejmp.compiled import Compiled
from ejmp.padding import Buckets, GraphShape, pad_graph
from ejmp_kernels import extension, unfused

NAMES = (
    *("H2", "H2O", "NH3", "CH4", "CO2", "HCN", "C2H2", "C2H4", "C2H6", "CH3OH", "CH3CN", "CH3CHO", "CH3CH2OH"),
    *("C3H8", "CH3SH", "C5H5N", "C6H6", "C4H4S", "C3H6_D3h", "isobutane"),
)
BACKENDS = ("reference", "native", "triton")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def meta(monkeypatch):
    """Let models of a backend run on the "meta" device, whose tensors have no values and whose ops do nothing."""

    def allow(backend):
        monkeypatch.setattr("ejmp.model.resolve", lambda *_: backend)
        monkeypatch.setattr("ejmp.model.check_precision", lambda *_: None)
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())

    return allow


def make(config, backend="reference", precision="fp32", **sizes):
    if backend == "native":
        require_native()
    if backend == "triton":
        require_triton()
    torch.manual_seed(0)
    sizes = {"blocks": 1, "num_tasks": 2, **sizes}
    model = ejmp.JMP(dataclasses.replace(config, **sizes), backend=backend, precision=precision)
    return model.double() if precision == "fp32" else model


def graph_of(model, *names):
    return ejmp.build_graph([molecule(name) for name in names], 8.0, dtype=model.dtype)


def assert_equal_outputs(out, expected, allowed=1e-12):
    assert relative_error(out.energy.detach(), expected.energy.detach()) < allowed
    assert relative_error(out.forces.detach(), expected.forces.detach()) < allowed


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
def test_no_graph_breaks(tiny_config, meta, backend, precision, device):
    model = make(tiny_config, backend, precision, blocks=2)
    graph = graph_of(model, "H2O", "CH4").to(device)
    model.to(device)
    if device == "meta":
        meta(backend)
    with torch.no_grad():
        found = torch._dynamo.explain(model)(graph)
    assert (found.graph_count, found.graph_break_count) == (1, 0)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_one_compilation_per_shape(tiny_config, backend):
    """More shapes than torch.compile traces on its own (8)."""
    model = make(tiny_config, backend)
    graphs = [graph_of(model, name) for name in NAMES]
    assert len({graph.num_atoms for graph in graphs}) > 9
    expected = [model(graph) for graph in graphs]
    compiler, buckets = CompileCounterWithBackend("eager"), Buckets(growth=1.0)
    model.compile(buckets=buckets, compiler=compiler)
    with torch.no_grad():
        for _ in range(2):
            for graph, plain in zip(graphs, expected, strict=True):
                assert_equal_outputs(model(graph), plain)
    assert 8 < len(buckets.shapes) < len(graphs)
    assert compiler.frame_count == len(buckets.shapes)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_gradient_forces_and_training(tiny_config, backend):
    """Through AOTAutograd, which traces the derivatives too."""
    model = make(tiny_config, backend)
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


def test_triton_is_traced_with_its_derivatives(tiny_config, meta):
    """Without values, which in the interpreter would take minutes; padded graphs have theirs in test_padding.py."""
    model = make(tiny_config, "triton")
    graph = graph_of(model, "H2O", "CH4").to("meta")
    model.to("meta")
    meta("triton")
    model.compile(compiler="aot_eager")
    assert ejmp.gradient_forces(model, graph).shape == (8, 3)
    out = model(graph)
    (out.energy.sum() + out.forces.sum()).backward()
    assert model.backbone.int_blocks[0].dense_ca.linear.weight.grad.shape == (64, 64)


@pytest.mark.parametrize(("backend", "precision"), [("reference", "bf16"), ("native", "bf16"), ("reference", "fp16")])
def test_low_precision(tiny_config, backend, precision):
    model = make(tiny_config, backend, precision)
    graph = graph_of(model, "CH3CH2OH")
    with torch.no_grad():
        expected = model(graph)
        model.compile(compiler="eager")
        assert_equal_outputs(model(graph), expected, 1e-2)


@pytest.mark.parametrize("sizes", [{"energy_reduction": "mean"}, {"direct_forces": False, "num_tasks": 1}])
def test_other_models(tiny_config, sizes):
    model = make(tiny_config, **sizes)
    graph = graph_of(model, "H2O", "CH4")
    with torch.no_grad():
        expected = model(graph)
        model.compile(compiler="eager")
        out = model(graph)
    assert relative_error(out.energy, expected.energy) < 1e-12
    assert (out.forces is None) == (expected.forces is None)


def test_direct_forces_can_be_left_out(tiny_config):
    model = make(tiny_config)
    model.compile(compiler="eager")
    assert model(graph_of(model, "H2O"), direct_forces=False).forces is None


def test_the_model_stays_what_it_is(tiny_config):
    model = make(tiny_config)
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
        assert_equal_outputs(copied(graph), model.plain(graph))
    before = compiler.frame_count
    model.compile("off")
    assert_equal_outputs(model(graph), model.plain(graph))
    assert compiler.frame_count == before


def test_weights_may_change(tiny_config):
    model, other = make(tiny_config), make(tiny_config)
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
    model = make(tiny_config)
    with pytest.raises(ValueError, match=r"mode: expected .*'quick'"):
        model.compile("quick")
    with pytest.raises(RuntimeError, match="needs a CUDA device, the model is on cpu"):
        model.compile("latency")
    model.compile(buckets=Buckets(growth=None), compiler="eager")
    with pytest.raises(ValueError, match="fits in a shape"):
        model(graph_of(model, "H2O"))
    with pytest.raises(ValueError, match=r"expected dtype torch\.float64"):
        model(graph_of(model, "H2O").to(dtype=torch.float32))


class Recorded:
    """Stands for CUDA graphs on the CPU: replaying runs the function again, on the same inputs into the same outputs."""

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
def recorded(tiny_config, monkeypatch):
    """A model and its stand-in for CUDA graphs, with one shape for small molecules."""
    model, recorder = make(tiny_config), Recorded()
    buckets = Buckets([GraphShape.holding(GraphShape.of(graph_of(model, "C2H6", "CH3OH")))], growth=None)
    compiled = Compiled(model, "throughput", buckets, None)
    compiled.record = recorder
    monkeypatch.setattr(compiled, "_check", model.check)
    return model, compiled, recorder


def test_replay_is_the_plain_model(recorded):
    model, compiled, recorder = recorded
    graphs = [graph_of(model, *names) for names in (("C2H6",), ("CH4", "H2O"), ("H2O", "CH3OH"), ("C2H6",))]
    expected = [model(graph) for graph in graphs]
    forces = [ejmp.gradient_forces(model, graph, 1) for graph in graphs]
    model.compiled = compiled
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
    model.compiled = compiled
    out = model(graph_of(model, "CH4"))
    out.energy.sum().backward()
    assert model.embedding.atom_embedding.weight.grad.any()
    assert recorder.count == 0


def test_moved_parameters_are_recorded_anew(recorded):
    model, compiled, recorder = recorded
    graph = graph_of(model, "CH4")
    model.compiled = compiled
    with torch.no_grad():
        model(graph)
        model.float().double()
        assert_equal_outputs(model(graph), model.plain(graph))
    assert recorder.count == 2


class NoWaiting(TorchDispatchMode):
    """Refuses what makes a GPU's host wait: values, sizes that depend on values, copies between devices.

    Tensors on the "meta" device have no values, so most of it fails there anyway.
    """

    FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "bincount", "lift_fresh", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(name == word or name.startswith(f"_{word}") for word in self.FORBIDDEN), name
        if name in ("_to_copy", "copy_"):
            devices = {x.device for x in args if isinstance(x, torch.Tensor)} | {(kwargs or {}).get("device")}
            assert len(devices - {None}) == 1, f"{name} between devices"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: bool(x.any()),
        lambda x: torch.repeat_interleave(x),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x.cpu(),
    ],
)
def test_waiting_would_be_noticed(wait):
    with NoWaiting(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        wait(torch.ones(3, dtype=torch.long, device="meta"))


@pytest.mark.parametrize(
    ("backend", "precision"),
    [("reference", "fp32"), ("native", "fp32"), ("native", "bf16"), ("triton", "fp32"), ("triton", "bf16")],
)
def test_nothing_waits(tiny_config, meta, backend, precision):
    """On a device without values: build a padded graph, predict, differentiate twice."""
    model = make(tiny_config, backend, precision)
    graph = graph_of(model, "H2O", "CH4").to("meta")
    model.to("meta")
    meta(backend)
    with NoWaiting():
        buckets = Buckets()
        padded = pad_graph(graph, buckets.choose(graph))
        for given in (graph, padded):
            with torch.no_grad():
                assert model(given).energy.shape == (given.num_structures, 2)
            model(given).forces.sum().backward()
            forces = ejmp.gradient_forces(model, given, create_graph=True)
            assert forces.shape == (given.num_atoms, 3)
            (forces**2).sum().backward()
        model.compile(compiler=None)
        with torch.no_grad():
            assert model(graph).forces.shape == (8, 2, 3)
        assert ejmp.gradient_forces(model, graph).shape == (8, 3)


def test_unfused_ops_wait_for_nothing():
    """What stands in for kernels on a GPU; above, only the shapes of its results are computed."""
    x, wide, factor = (torch.ones(6, n, device="meta") for n in (8, 16, 8))
    swap, ptr = torch.arange(6, device="meta"), torch.arange(4, device="meta")
    distance, offset, weight = (torch.ones(n, device="meta") for n in (6, 5, 5))
    calls = {
        "activate": (x, factor, x, 1.0, 1.0),
        "activate_": (x, factor, x, 1.0, 1.0),
        "activate_backward": (x, x, factor, 1.0),
        "activate_double": (x, x, x, x, factor, 1.0),
        "swap_add": (wide, swap, x, 1.0),
        "swap_add_backward": (x, wide, swap, 1.0),
        "swap_add_double": (wide, x, wide, swap, 1.0),
        "gather_add": (x, x, x, swap, swap, ptr),
        "radial": (distance, offset, weight, weight[:, None], 12.0, 5, 0),
        "radial_transposed": (distance, offset, weight, x, 12.0, 5, 1),
    }
    assert set(calls) == {op.__name__ for op in unfused.OPS}
    with NoWaiting():
        for op in unfused.OPS:
            op(*calls[op.__name__])


@contextlib.contextmanager
def waiting_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(config, backend, precision):
    reason = None if backend == "reference" else ejmp.backend.missing(backend, "cuda")
    if reason is not None or (backend == "triton" and extension.interpreted()):
        pytest.skip(reason or "Triton is interpreted here: TRITON_INTERPRET=0")
    if precision in ("tf32", "bf16") and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(f"the device has no {precision}")
    torch.manual_seed(0)
    model = ejmp.JMP(dataclasses.replace(config, blocks=2), backend=backend, precision=precision).cuda()
    graphs = [graph_of(model, *names).to("cuda") for names in (("C2H6", "CH4"), ("H2O", "CH3OH"), ("CH3CN", "CO2"))]
    return model, graphs


@GPU
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_on_a_gpu(tiny_config, backend, precision):
    model, graphs = on_gpu(tiny_config, backend, precision)
    shape = GraphShape.holding(GraphShape.of(graphs[0]), 1.5)

    def run(graph):
        with torch.no_grad():
            model(graph)
        ejmp.gradient_forces(model, graph)
        pad_graph(graph, shape)

    run(graphs[0])  # what is compiled and loaded once may wait
    with waiting_is_an_error():
        for graph in graphs:
            run(graph)


@GPU
@pytest.mark.parametrize("compiler", [None, "inductor"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graphs_replay_the_plain_model(tiny_config, backend, precision, compiler):
    model, graphs = on_gpu(tiny_config, backend, precision)
    with torch.no_grad():
        expected = [model(graph) for graph in graphs]
    forces = [ejmp.gradient_forces(model, graph) for graph in graphs]
    buckets = Buckets([GraphShape.holding(GraphShape.of(graphs[0]), 2.0)], growth=None)
    model.compile("latency", buckets=buckets, compiler=compiler)
    allowed = {"fp32": 1e-4, "tf32": 1e-2}.get(precision, 5e-2)

    def check(graph, plain, gradient):
        with torch.no_grad():
            out = model(graph)
        return out, plain, ejmp.gradient_forces(model, graph), gradient

    found = [check(graphs[0], expected[0], forces[0])]
    with waiting_is_an_error():
        found += [check(*rest) for rest in zip(graphs, expected, forces, strict=True)]
    for out, plain, gradient, plain_gradient in found:
        assert_equal_outputs(out, plain, allowed)
        assert relative_error(gradient, plain_gradient) < 5 * allowed
