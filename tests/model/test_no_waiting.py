"""Nothing in a forward pass waits for a GPU: tested without one on tensors without values, and on one if there is one.

CUDA graphs, which could not be recorded otherwise, are tested here too.
"""

import contextlib
import dataclasses

import pytest
import torch
from support.compile_cases import allow_meta, assert_equal_outputs, graph_of, make_model
from support.tolerances import relative_error, tolerance
from torch.utils._python_dispatch import TorchDispatchMode

import ejmp
import ejmp.model.backend
from ejmp.graph.padding import Buckets, GraphShape, pad_graph
from ejmp_kernels import availability, unfused

BACKENDS = ("reference", "native", "triton")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


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
        torch.repeat_interleave,
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
def test_nothing_waits(tiny_config, monkeypatch, backend, precision):
    """On a device without values: build a padded graph, predict, differentiate twice."""
    model = make_model(tiny_config, backend, precision)
    graph = graph_of(model, "H2O", "CH4").to("meta")
    model.to("meta")
    allow_meta(monkeypatch, backend)
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
    reason = None if backend == "reference" else ejmp.model.backend.why_unavailable(backend, "cuda")
    if reason is not None or (backend == "triton" and availability.interpreted()):
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
    allowed = [tolerance("replayed model", precision, order) for order in (0, 1)]

    def check(graph, plain, gradient):
        with torch.no_grad():
            out = model(graph)
        return out, plain, ejmp.gradient_forces(model, graph), gradient

    found = [check(graphs[0], expected[0], forces[0])]
    with waiting_is_an_error():
        found += [check(*rest) for rest in zip(graphs, expected, forces, strict=True)]
    for out, plain, gradient, plain_gradient in found:
        assert_equal_outputs(out, plain, allowed[0])
        assert relative_error(gradient, plain_gradient) < allowed[1]
