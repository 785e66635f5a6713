"""Every op of both backends against its plain-torch specification: values, derivatives, registration, bits.

Triton's run in its interpreter, or on a GPU with TRITON_INTERPRET=0.
"""

import dataclasses
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.inputs import require_native, require_triton
from support.small_cases import CASES, DEVICE, LOW, Setup, derivatives, make_case, randn
from support.tolerances import relative_error, tolerance
from torch.utils.flop_counter import FlopCounterMode

import ejmp_kernels
from ejmp_kernels import availability, registry, unfused
from ejmp_kernels.activation import activate
from ejmp_kernels.quadruplet import quadruplet_linear
from ejmp_kernels.triplet import triplet

BOTH = ("native", "triton")

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def require(backend):
    require_native() if backend == "native" else require_triton()


@dataclasses.dataclass(frozen=True)
class Make:
    """A case of one backend, for any type and graph."""

    backend: str
    name: str

    def __call__(self, dtype, graph="full"):
        require(self.backend)
        return make_case(self.name, Setup(self.backend, dtype, graph))


PAIRS = [(backend, name) for backend in BOTH for name in CASES if (backend, name) != ("triton", "linear")]


@functools.cache
def derivatives_of(make, dtype, graph="full"):
    """Return the derivatives of an op on its case's inputs, computed once for all tests that compare with them."""
    case = make(dtype, graph)
    return derivatives(case.call, case.inputs)


@functools.cache
def exact_derivatives(backend, name):
    """Return the derivatives of an op's specification in float64, computed once for all types."""
    exact = Make(backend, name)(torch.float64)
    return derivatives(exact.spec, exact.inputs)


@pytest.fixture(params=PAIRS, ids="-".join)
def make(request):
    return Make(*request.param)


@pytest.fixture(params=BOTH)
def ops(request):
    """The ops of a backend, and its device."""
    require(request.param)
    return registry.ops_of(request.param), DEVICE[request.param]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equal_to_the_specification(make, dtype):
    results = derivatives_of(make, dtype), exact_derivatives(make.backend, make.name)
    for order, (mine, spec) in enumerate(zip(*results, strict=True)):
        for value, expected in zip(mine, spec, strict=True):
            assert relative_error(value.cpu(), expected.cpu()) <= tolerance("op", dtype, order)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_types_equal_to_the_specification(make, dtype):
    """Features in a low type, geometry and bases in float32: values and gradients of the numbers as rounded."""
    if make.backend == "native":
        pytest.skip("Triton's sums over neighbours take low types, the compiled ones do not")
    case = make(dtype)
    value = case.call(*(inputs := [x.clone().requires_grad_() for x in case.inputs]))
    expected = case.spec(*(exact := [x.double().requires_grad_() for x in case.inputs]))
    grad = randn(*value.shape, dtype=value.dtype, seed=7).to(value.device)
    results = [value, *torch.autograd.grad(value, inputs, grad)]
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for mine, spec, like in zip(results, wanted, [value, *inputs], strict=True):
        assert mine.dtype == like.dtype
        assert relative_error(mine.detach().cpu(), spec.detach().cpu()) <= tolerance("op", dtype)


def test_nothing_to_sum(make):
    """One atom without any edge: sums are zero, what is per edge is empty, and so are all gradients."""
    case = make(torch.float32, "lone")
    if make.name == "linear":
        pytest.skip("has no edges")
    for results in derivatives(case.call, case.inputs):
        assert all(not x.any() for x in results)


def test_derivatives_by_finite_differences(make):
    case = make(torch.float64, "tiny")
    inputs = [x.detach().clone().requires_grad_() for x in case.inputs]
    fast = make.backend == "triton"
    # gradients that are None are handled before the kernels, by code that both backends share
    options = {"fast_mode": fast, "check_undefined_grad": not fast}
    assert torch.autograd.gradcheck(case.call, inputs, **options)
    assert torch.autograd.gradgradcheck(case.call, inputs, **options)


def test_without_gradients_the_same(make):
    """The path that writes in place gives the same bits."""
    case = make(torch.float32)
    (with_grad,), *_ = derivatives_of(make, torch.float32)
    with torch.no_grad():
        assert torch.equal(case.call(*(x.clone() for x in case.inputs)), with_grad)


@pytest.mark.parametrize("graph", ["full", "lone"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_mixed_quadruplets(dtype, graph):
    """Without gradients the native sums are mixed by an op of its own: the same result and as many operations."""
    case, exact = (Make("native", "quadruplet")(t, graph) for t in (dtype, torch.float64))
    edges, (x, filters, weight, *_) = Setup("native", dtype, graph).make_graph(), case.inputs
    mix = randn(5, weight.shape[1] * x.shape[1], seed=3)

    def run(x):
        with FlopCounterMode(display=False) as counter:
            out = quadruplet_linear(x, filters, weight, edges.main, edges.quad_edges, mix.to(dtype))
        return out, counter.get_total_flops()

    found, flops = run(x)
    recorded, as_many = run(x.clone().requires_grad_())
    assert flops == as_many
    assert found.shape == recorded.shape
    expected = exact.spec(*exact.inputs) @ mix.double().mT
    assert found.shape == expected.shape
    assert not len(found) or relative_error(found, expected) <= tolerance("op", dtype)


def test_any_strides(make):
    case = make(torch.float64, "tiny")
    if make.name == "linear":
        pytest.skip("the vendor's product decides")
    strided = [x.mT.contiguous().mT if x.ndim > 1 else torch.stack([x, x], 1)[:, 0] for x in case.inputs]
    results = derivatives_of(make, torch.float64, "tiny"), derivatives(case.call, strided)
    for packed, other in zip(*results, strict=True):
        assert all(map(torch.equal, packed, other))


def test_same_bits_every_run_and_with_any_threads(make):
    slow = make.backend == "triton" and availability.interpreted()
    case = make(torch.float32, "tiny" if slow else "full")
    if make.name == "linear":
        pytest.skip("the vendor's product decides")
    threads = torch.get_num_threads()
    first = derivatives_of(make, torch.float32, "tiny" if slow else "full")
    try:
        for number in (3,) if slow else (threads, 1, 3):
            torch.set_num_threads(number)
            for mine, theirs in zip(derivatives(case.call, case.inputs), first, strict=True):
                assert all(map(torch.equal, mine, theirs))
    finally:
        torch.set_num_threads(threads)


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes each op of a namespace that runs, with its arguments."""

    def __init__(self, namespace):
        super().__init__()
        self.namespace, self.calls = namespace, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == self.namespace:
            self.calls[func.name()] = (func, args)
        return func(*args, **(kwargs or {}))


def test_registration(make):
    """torch's own check of schema, tracing and autograd, for every op a forward and two backwards call."""
    case = make(torch.float64, "full" if make.backend == "native" else "tiny")
    with Recorder(registry.NAMESPACES[make.backend]) as seen:
        derivatives(case.call, case.inputs)
    assert seen.calls
    torch.use_deterministic_algorithms(False)  # opcheck compares results that hold uninitialised memory
    for func, args in seen.calls.values():
        args = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(func, args)
        last = "double" in func.name() or ("radial" in func.name() and args[-1] == 2)  # no third derivatives
        if not last:
            wanted = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in args]
            args = tuple(a.requires_grad_() if grad else a for a, grad in zip(args, wanted, strict=True))
            checks = ("test_autograd_registration", "test_aot_dispatch_dynamic")
            torch.library.opcheck(func, args, test_utils=checks)


def test_registration_in_place(ops):
    namespace, device = ops
    x, y = (randn(5, 7, dtype=torch.float32, seed=i).to(device) for i in range(2))
    torch.library.opcheck(namespace.activate_, (x, y, None, 0.7, 0.3), test_utils=("test_schema", "test_faketensor"))
    before = x.clone()
    assert namespace.activate_(x, y, x.clone(), 0.7, 0.3) is x
    assert torch.equal(x, namespace.activate(before, y, before, 0.7, 0.3))


def test_quadruplets_take_weights_in_the_low_type():
    """In Triton's forward, where the weights of all blocks are half of what is read; derivatives want them whole."""
    case = Make("triton", "quadruplet")(torch.float16)
    x, filters, weight, *rest = case.inputs
    low = weight.half()
    out, exact = case.call(x, filters, low, *rest), case.call(x, filters, low.float(), *rest)
    assert relative_error(out, exact.double()) <= tolerance("op", torch.float16, 0)
    with pytest.raises(ValueError, match="weight must be float32, got float16"):
        case.call(x.requires_grad_(), filters, low, *rest).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equal_to_plain_torch(ops, dtype):
    """What runs on a GPU for ops without a CUDA kernel equals each backend's op, its backward and second backward."""
    namespace, device = ops
    if dtype == torch.float16 and namespace is registry.ops_of("native"):
        pytest.skip("the compiled ops take no float16")
    real = torch.float64 if dtype == torch.float64 else torch.float32
    at = Setup("triton" if device == "cuda" else "native", dtype)
    main, draw = at.make_graph().main, at.draw
    E, N, M = main.num_edges, len(main.ptr) - 1, 5
    x, y, z, u, v = (draw.features(E, M, seed=i) for i in range(5))
    wide, u_wide = (draw.features(E, 2 * M, seed=i) for i in (5, 6))
    atoms = [draw.wide(N, M, seed=i) for i in (7, 8)]
    offset, temps = torch.linspace(0, 1, 9, dtype=real), torch.full((9,), 40.0, dtype=real)
    basis = [main.distance.to(real), offset.to(device), temps.to(device)]
    cases = [("gather_add", a, *atoms, main.source, main.swap, main.ptr) for a in (x, None)]
    cases += [("swap_add", wide, main.swap, a, 0.7) for a in (x, None)]
    cases += [("swap_add_backward", x, wide, main.swap, 0.7), ("swap_add_double", u_wide, x, wide, main.swap, 0.7)]
    for factor in (y, None):
        cases += [("activate", x, factor, a, 0.7, 0.3) for a in (z, None)]
        cases += [("activate_backward", z, x, factor, 0.7)]
        cases += [("activate_double", u, None if factor is None else v, z, x, factor, 0.7)]
    for order in range(3):
        cases += [("radial", *basis, draw.wide(9, M, seed=9), 6.0, 5, order)]
        cases += [("radial_transposed", *basis, draw.wide(E, M, seed=10), 6.0, 5, order)]
    assert {name for name, *_ in cases} == {op.__name__ for op in unfused.OPS} - {"activate_"}
    allowed = tolerance("op in plain torch" if device == "cpu" else "op in plain torch on a GPU", dtype)
    for name, *arguments in cases:
        results = getattr(unfused, name)(*arguments), getattr(namespace, name)(*arguments)
        got, want = ([r] if isinstance(r, torch.Tensor) else r for r in results)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert not b.numel() or relative_error(a.cpu(), b.cpu()) <= allowed, name


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize(("name", "by"), [("edge_to_edge", 3), ("activate", 0), ("swap_add", 0)])
def test_third_derivative_is_refused(backend, name, by):
    case = Make(backend, name)(torch.float64, "tiny")
    inputs = [x.detach().clone().requires_grad_() for x in case.inputs]
    first = torch.autograd.grad(case.call(*inputs).square().sum(), inputs[by], create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), inputs[by], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="first and second"):
        torch.autograd.grad(second.sum(), inputs[by])


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", ["activate_all", "swap_add_to", "gather_add", "atom_sum"])
def test_low_types_are_rounded_once(name, dtype, backend):
    """Stored in a low type, computed in float32: half a unit in the last place of the largest value."""
    if dtype == torch.float16 and backend == "native":
        pytest.skip("the compiled ops take no float16")
    case = Make(backend, name)(dtype)
    exact = case.spec(*(x.double() for x in case.inputs))
    with torch.no_grad():
        value = case.call(*(x.clone() for x in case.inputs))
    assert value.dtype == (torch.float32 if name == "atom_sum" else dtype)
    error = (value.double() - exact).abs() / exact.abs().clamp_min(1e-2 * exact.abs().max())
    unit = tolerance("op rounded once", dtype)
    if dtype == torch.bfloat16 and backend == "triton" and availability.interpreted():
        unit *= 2  # the interpreter cuts off
    assert error.max() <= (1e-5 if name == "atom_sum" else unit)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # Triton's interpreter runs on NumPy
@pytest.mark.parametrize("backend", BOTH)
def test_activation_at_the_ends(backend):
    require(backend)
    x = torch.tensor([0.0, 88.0, -88.0, 1e4, -1e4, 1e30, -1e30, 1e38, -3e38, 1e-30, float("nan"), float("inf")])
    x = x.repeat(4).to(DEVICE[backend])
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            value = activate(x.to(dtype), backend=backend).double()
            expected = torch.nn.functional.silu(x.to(dtype).double()) / 0.6
            assert torch.allclose(value, expected, rtol=1e-2, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {"x": torch.zeros(3, 4)}, "x must have shape"),
        (lambda g: {"w": torch.zeros(g.main.num_edges, 2, 3, dtype=torch.float64)}, "weight must be [Ff]loat"),
        (lambda g: {"out": dataclasses.replace(g.main, source=g.main.source + 1000)}, "source must be in"),
        (lambda g: {"into": dataclasses.replace(g.main, ptr=g.main.ptr.flip(0))}, "ptr must rise"),
    ],
)
@pytest.mark.parametrize("backend", BOTH)
def test_bad_input(change, message, backend):
    require(backend)
    if backend == "triton" and "must have" not in message and "must be [" not in message:
        pytest.skip("Triton's ops do not wait for the GPU to look at indices")
    graph = Setup(backend, torch.float32).make_graph()
    E, device = graph.main.num_edges, DEVICE[backend]
    given = {"x": torch.zeros(E, 4), "w": torch.zeros(E, 2, 3), "out": graph.main, "into": graph.main} | change(graph)
    x, w = given["x"].to(device), given["w"].to(device)
    with pytest.raises(ValueError, match=message):
        triplet(x, w, given["out"], given["into"], backend=backend)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("activate_all", {1: lambda x: x[:, 1:]}, "activate_?: factor must have shape"),
        ("activate_all", {2: lambda x: x.double()}, "activate_?: add must be [Ff]loat"),
        ("swap_add", {0: lambda x: x[:, 1:]}, "swap_add: x must "),
        ("swap_add_to", {1: lambda x: x[1:]}, "swap_add: (add|input) must have shape"),
        ("gather_add", {2: lambda x: x.double()}, "gather_add: target_rows must be [Ff]loat"),
        ("gather_add", {0: lambda x: x[1:]}, "gather_add: x must have shape"),
        ("atom_sum", {1: lambda x: x[:, 1:]}, "atom_sum: factor must have shape"),
        ("pair", {0: lambda x: x[1:]}, "pair: (ptr must have|source must be in)"),
        ("pair", {1: lambda x: x.double()}, "pair: radial must be [Ff]loat"),
        ("radial", {1: lambda x: x[1:]}, "radial: weight must have shape"),
        ("radial", {0: lambda x: x.double()}, "radial: (distance|offset) must be"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", BOTH)
def test_bad_input_of_simple_ops(name, change, message, backend):
    case = Make(backend, name)(torch.float32)
    inputs = [change.get(i, lambda x: x)(x) for i, x in enumerate(case.inputs)]
    with pytest.raises(ValueError, match=message):
        case.call(*inputs)


@pytest.mark.parametrize("isa", ["avx2", "portable", "nonsense"])
def test_other_instruction_sets(isa):
    """The compiled kernels for other processors run here too and pass the same comparison."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        __file__,
        "-k",
        "native and (test_equal_to_the_specification or bfloat16)",
    ]
    run = subprocess.run(command, env={**os.environ, "EJMP_ISA": isa}, capture_output=True, text=True, check=False)
    if isa == "nonsense":
        assert run.returncode != 0
        assert "EJMP_ISA" in run.stdout
        assert "nonsense" in run.stdout
    elif "this processor and build have" in run.stdout:
        pytest.skip(f"this processor has no {isa}")
    else:
        assert run.returncode == 0, run.stdout[-2000:]


def test_nothing_but_registrations_runs_as_the_library_loads():
    """A constructor that was compiled for AVX-512 would kill the process on a processor without it."""
    require_native()
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    library = Path(ejmp_kernels.__file__).with_name("_C.so")
    symbols = subprocess.run([nm, library], capture_output=True, text=True, check=True).stdout.split()
    constructors = {name for name in symbols if name.startswith("_GLOBAL__sub_I_")}
    assert {"_GLOBAL__sub_I_cpu.cpp", "_GLOBAL__sub_I_dense.cpp"} <= constructors
    assert not [name for name in constructors if "kernels_" in name]
