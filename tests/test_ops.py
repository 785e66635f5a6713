"""Every native op against its plain-torch specification: values, first and second derivatives, registration, bits."""

import dataclasses
import functools
import os
import subprocess
import sys

import pytest
import torch
from conftest import require_native
from tolerances import relative_error

import ejmp
from ejmp_kernels import angles, reference, unfused

require_native()
from ejmp_kernels.activation import activate, swap_add  # noqa: E402
from ejmp_kernels.atom_sum import atom_sum  # noqa: E402
from ejmp_kernels.edge_embedding import gather_add  # noqa: E402
from ejmp_kernels.linear import linear  # noqa: E402
from ejmp_kernels.pair import pair  # noqa: E402
from ejmp_kernels.quadruplet import quadruplet  # noqa: E402
from ejmp_kernels.radial import radial  # noqa: E402
from ejmp_kernels.triplet import triplet  # noqa: E402

OPS = torch.ops.ejmp
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-4}


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make_graph(dtype, *, tiny=False):
    """A crystal of three atoms (several images of each neighbour), a bent molecule, and a lone atom."""
    cell = [[3.1, 0, 0], [0.4, 3.3, 0], [-0.2, 0.5, 3.6]]
    crystal = ejmp.Structure(
        numbers=[12, 8, 8],
        positions=[[0.1, 0.2, 0], [1.7, 1.5, 1.6], [0.3, 1.9, 2.2]],
        cell=cell,
        pbc=True,
        tags=[1, 2, 0],
    )
    bent = ejmp.Structure(
        numbers=[6, 8, 1, 7, 1],
        positions=[[0, 0, 0], [1.2, 0.1, 0.2], [-0.6, 0.9, 0.3], [-0.5, -0.8, 1.0], [0.3, 0.4, -1.1]],
    )
    lone = ejmp.Structure(numbers=[2], positions=[[0.0, 0, 0]])
    dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    if tiny:
        return ejmp.build_graph([bent, lone], 5.0, 30, dtype=dtype)
    return ejmp.build_graph([crystal, bent, lone], 6.0, 12, dtype=dtype)


@dataclasses.dataclass
class Case:
    """One op: what differentiates, the function under test, its specification."""

    inputs: list
    native: object
    spec: object


def randn(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def with_vector(edges, vector):
    return dataclasses.replace(edges, vector=vector)


def make_triplet(out, into, to_atoms, dtype, tiny):
    graph = make_graph(dtype, tiny=tiny)
    out, into = getattr(graph, out), getattr(graph, into)
    C, A, S = (2, 2, 3) if tiny else (20, 6, 7)
    inputs = [
        randn(into.num_edges, C, dtype=dtype), randn(out.num_edges, A, S, dtype=dtype), out.vector, into.vector,
    ]  # fmt: skip

    def call(function):
        return lambda x, w, v_out, v_in: function(
            x, w, with_vector(out, v_out), with_vector(into, v_in), to_atoms=to_atoms
        )

    return Case(inputs, call(triplet), call(angles.triplet))


def make_quadruplet(dtype, tiny):
    graph = make_graph(dtype, tiny=tiny)
    main, middle = graph.main, graph.quad_edges
    C, A, S = (2, 1, 3) if tiny else (20, 14, 7)
    inputs = [
        randn(main.num_edges, C, dtype=dtype),
        randn(middle.num_edges, S, C, dtype=dtype),
        randn(main.num_edges, A, S * S, dtype=dtype),
        main.vector,
        middle.vector,
    ]

    def call(function):
        return lambda x, f, w, v, v_mid: function(x, f, w, with_vector(main, v), with_vector(middle, v_mid))

    return Case(inputs, call(quadruplet), call(angles.quadruplet))


def make_pair(dtype, tiny):
    edges = make_graph(dtype, tiny=tiny).atom_pairs
    atoms = len(edges.ptr) - 1
    inputs = [randn(atoms, 3 if tiny else 12, dtype=dtype), randn(edges.num_edges, 2 if tiny else 10, dtype=dtype)]
    return Case(
        inputs,
        lambda h, r: pair(h, r, edges.ptr, edges.source),
        lambda h, r: angles.pair(h, r, edges.ptr, edges.source),
    )


def make_radial(dtype, tiny):
    # upstream's float32 centres; a distance beyond the cutoff, and none on it (b has a third derivative's jump there)
    distance = torch.tensor([0.9, 1.7, 3.05, 4.4, 5.99, 6.5, 2.2, 11.0], dtype=dtype)
    R = 8 if tiny else 128
    offset, temps = torch.linspace(0, 1, R).to(dtype), torch.full((R,), 0.5 * (R - 1) ** 2, dtype=dtype)
    return Case(
        [distance, randn(R, 3 if tiny else 37, dtype=dtype)],
        lambda d, w: radial(d, offset, temps, w, 6.0, 5),
        lambda d, w: reference.gaussian_basis(d, offset, temps, 6.0, 5) @ w,
    )


def make_atom_sum(dtype, tiny):
    edges = make_graph(dtype, tiny=tiny).main
    shape = (edges.num_edges, 3 if tiny else 150)
    return Case(
        [randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)],
        lambda m, f: atom_sum(m, f, edges.ptr),
        lambda m, f: reference.atom_sum(m, f, edges.target, len(edges.ptr) - 1),
    )


def make_gather_add(dtype, tiny):
    edges = make_graph(dtype, tiny=tiny).main
    atoms, M = len(edges.ptr) - 1, 3 if tiny else 37
    rows = torch.float32 if dtype == torch.bfloat16 else dtype
    inputs = [randn(edges.num_edges, M, dtype=dtype), *(randn(atoms, M, dtype=rows, seed=i) for i in (1, 2))]
    return Case(
        inputs,
        lambda x, a, b: gather_add(x, a, b, edges.source, edges.swap, edges.ptr),
        lambda x, a, b: reference.gather_add(x, a, b, edges.source, edges.target),
    )


def make_activate(terms, dtype, tiny):
    shape = (2, 3) if tiny else (7, 301)
    inputs = [4 * randn(*shape, dtype=dtype, seed=i) for i in range(1 + len(terms))]

    def call(function):
        return lambda x, *rest: function(x, **dict(zip(terms, rest, strict=True)), scale=0.7, add_scale=0.3)

    return Case(inputs, call(functools.partial(activate, in_place=True)), call(reference.activate))


def make_swap_add(add, dtype, tiny):
    edges = make_graph(dtype, tiny=tiny).main
    M = 3 if tiny else 21
    inputs = [randn(edges.num_edges, 2 * M, dtype=dtype), randn(edges.num_edges, M, dtype=dtype)][: 1 + add]

    def call(function):
        return lambda x, *rest: function(x, edges.swap, *rest, scale=0.7)

    return Case(inputs, call(swap_add), call(reference.swap_add))


def make_linear(dtype, tiny):
    rows, fan_in, fan_out = (2, 3, 4) if tiny else (17, 33, 65)
    inputs = [randn(rows, fan_in, dtype=dtype), randn(fan_out, fan_in, dtype=dtype)]
    return Case(inputs, linear, torch.nn.functional.linear)


CASES = {
    "edge_to_edge": lambda *a: make_triplet("main", "main", False, *a),
    "atom_to_edge": lambda *a: make_triplet("main", "atom_edges", False, *a),
    "edge_to_atom": lambda *a: make_triplet("atom_edges", "main", True, *a),
    "quadruplet": make_quadruplet,
    "pair": make_pair,
    "radial": make_radial,
    "atom_sum": make_atom_sum,
    "gather_add": make_gather_add,
    "activate": lambda *a: make_activate((), *a),
    "activate_factor": lambda *a: make_activate(("factor",), *a),
    "activate_residual": lambda *a: make_activate(("add",), *a),
    "activate_all": lambda *a: make_activate(("factor", "add"), *a),
    "swap_add": lambda *a: make_swap_add(0, *a),
    "swap_add_to": lambda *a: make_swap_add(1, *a),
    "linear": make_linear,
}


@pytest.fixture(params=CASES)
def make(request):
    return CASES[request.param]


def derivatives(function, inputs):
    """Value, gradients of a random projection, and gradients of a random projection of those and of their squares."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    grad = randn(*value.shape, dtype=value.dtype, seed=7).requires_grad_()
    first = torch.autograd.grad(value, inputs, grad, create_graph=True)
    loss = sum((g * randn(*g.shape, dtype=g.dtype, seed=8)).sum() + 0.1 * (g**2).sum() for g in first)
    second = torch.autograd.grad(loss, [grad, *inputs], allow_unused=True)
    zero = [torch.zeros_like(x) if g is None else g for g, x in zip(second, [grad, *inputs], strict=True)]
    return [value.detach()], [g.detach() for g in first], zero


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equal_to_the_specification(make, dtype):
    case, exact = make(dtype, False), make(torch.float64, False)
    for mine, spec in zip(derivatives(case.native, case.inputs), derivatives(exact.spec, exact.inputs), strict=True):
        for value, expected in zip(mine, spec, strict=True):
            assert relative_error(value, expected) <= TOLERANCE[dtype]


def test_derivatives_by_finite_differences(make):
    case = make(torch.float64, True)
    inputs = [x.detach().clone().requires_grad_() for x in case.inputs]
    assert torch.autograd.gradcheck(case.native, inputs)
    assert torch.autograd.gradgradcheck(case.native, inputs)


def test_without_gradients_the_same(make):
    """The path that writes in place gives the same bits."""
    case = make(torch.float32, False)
    with_grad = case.native(*(x.clone().requires_grad_() for x in case.inputs))
    with torch.no_grad():
        assert torch.equal(case.native(*(x.clone() for x in case.inputs)), with_grad)


def test_same_bits_every_run_and_with_any_threads(make):
    case = make(torch.float32, False)
    if make is CASES["linear"]:
        pytest.skip("the vendor's product decides")
    threads = torch.get_num_threads()
    first = derivatives(case.native, case.inputs)
    try:
        for number in (threads, 1, 3):
            torch.set_num_threads(number)
            for mine, theirs in zip(derivatives(case.native, case.inputs), first, strict=True):
                assert all(map(torch.equal, mine, theirs))
    finally:
        torch.set_num_threads(threads)


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes each ejmp op that runs, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ejmp":
            self.calls[func.name()] = (func, args)
        return func(*args, **(kwargs or {}))


def test_registration(make):
    """torch's own check of schema, tracing and autograd, for every op a forward and two backwards call."""
    case = make(torch.float64, True)
    with Recorder() as seen:
        derivatives(case.native, case.inputs)
    assert seen.calls
    torch.use_deterministic_algorithms(False)  # opcheck compares results that hold uninitialised memory
    for func, args in seen.calls.values():
        args = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(func, args)
        last = "double" in func.name() or ("radial" in func.name() and args[-1] == 2)  # no third derivatives
        args = tuple(a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
        checks = ("test_schema", "test_faketensor")
        if not last:
            checks += ("test_autograd_registration", "test_aot_dispatch_dynamic")
        torch.library.opcheck(func, args, test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_plain_torch_on_a_gpu(dtype):
    """What runs on a GPU for ops without a CUDA kernel equals the compiled op, its backward and second backward."""
    main = make_graph(dtype).main
    E, N, M, real = main.num_edges, len(main.ptr) - 1, 5, torch.float64 if dtype == torch.float64 else torch.float32
    x, y, z, u, v = (randn(E, M, dtype=dtype, seed=i) for i in range(5))
    wide, u_wide = (randn(E, 2 * M, dtype=dtype, seed=i) for i in (5, 6))
    atoms = [randn(N, M, dtype=real, seed=i) for i in (7, 8)]
    offset, temps = torch.linspace(0, 1, 9, dtype=real), torch.full((9,), 40.0, dtype=real)
    basis = [main.distance.to(real), offset, temps]
    cases = [("gather_add", a, *atoms, main.source, main.swap, main.ptr) for a in (x, None)]
    cases += [("swap_add", wide, main.swap, a, 0.7) for a in (x, None)]
    cases += [("swap_add_backward", x, wide, main.swap, 0.7), ("swap_add_double", u_wide, x, wide, main.swap, 0.7)]
    for factor in (y, None):
        cases += [("activate", x, factor, a, 0.7, 0.3) for a in (z, None)]
        cases += [("activate_backward", z, x, factor, 0.7), ("activate_double", u, v, z, x, factor, 0.7)]
    for order in range(3):
        cases += [("radial", *basis, randn(9, M, dtype=real, seed=9), 6.0, 5, order)]
        cases += [("radial_transposed", *basis, randn(E, M, dtype=real, seed=10), 6.0, 5, order)]
    assert {name for name, *_ in cases} == {op.__name__ for op in unfused.OPS} - {"activate_"}
    tolerance = {torch.bfloat16: 8e-3, torch.float32: 2e-6, torch.float64: 1e-13}[dtype]
    for name, *arguments in cases:
        results = getattr(unfused, name)(*arguments), getattr(OPS, name)(*arguments)
        got, want = ([r] if isinstance(r, torch.Tensor) else r for r in results)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert not b.numel() or relative_error(a, b) <= tolerance, name


def test_third_derivative_is_refused():
    case = CASES["edge_to_edge"](torch.float64, True)
    inputs = [x.detach().clone().requires_grad_() for x in case.inputs]
    first = torch.autograd.grad(case.native(*inputs).square().sum(), inputs[3], create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), inputs[3], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="first and second"):
        torch.autograd.grad(second.sum(), inputs[3])


@pytest.mark.parametrize("name", ["activate_all", "swap_add_to", "gather_add", "atom_sum"])
def test_bfloat16_is_rounded_once(name):
    """Stored in bfloat16, computed in float32: half a unit in the last place of the largest value."""
    case = CASES[name](torch.bfloat16, False)
    exact = case.spec(*(x.double() for x in case.inputs))
    with torch.no_grad():
        value = case.native(*(x.clone() for x in case.inputs))
    assert value.dtype == (torch.float32 if name == "atom_sum" else torch.bfloat16)
    error = (value.double() - exact).abs() / exact.abs().clamp_min(1e-2 * exact.abs().max())
    assert error.max() <= (1e-5 if name == "atom_sum" else 2**-8)


def test_activation_at_the_ends():
    x = torch.tensor([0.0, -0.0, 88.0, -88.0, 1e4, -1e4, 1e30, -1e30, 1e-30, float("nan"), float("inf")])
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            value = activate(x.to(dtype)).double()
            expected = torch.nn.functional.silu(x.to(dtype).double()) / 0.6
            assert torch.allclose(value, expected, rtol=1e-2, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {"x": torch.zeros(3, 4)}, "x must have shape"),
        (lambda g: {"w": torch.zeros(g.main.num_edges, 2, 3, dtype=torch.float64)}, "weight must be Float"),
        (lambda g: {"out": dataclasses.replace(g.main, source=g.main.source + 1000)}, "source must be in"),
        (lambda g: {"into": dataclasses.replace(g.main, ptr=g.main.ptr.flip(0))}, "ptr must rise"),
    ],
)
def test_bad_input(change, message):
    graph = make_graph(torch.float32)
    E = graph.main.num_edges
    given = {"x": torch.zeros(E, 4), "w": torch.zeros(E, 2, 3), "out": graph.main, "into": graph.main} | change(graph)
    with pytest.raises(ValueError, match=message):
        triplet(given["x"], given["w"], given["out"], given["into"])


@pytest.mark.parametrize("isa", ["avx2", "portable", "nonsense"])
def test_other_instruction_sets(isa):
    """The kernels for other processors run here too and pass the same comparison."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        __file__,
        "-k",
        "test_equal_to_the_specification or bfloat16",
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
