"""What Triton's products take along: filters, second residuals, rows of atoms, sums with counter-edges.

Compared with the same formula in float64; without a GPU the kernels run in Triton's interpreter.
"""

import inspect

import numpy as np
import pytest
import torch
from support.tolerances import relative_error

pytest.importorskip("triton")

from support.gemm_cases import (
    ALPHA,
    BETA,
    BFLOAT16,
    DEVICE,
    SIZES,
    allowed,
    kernel,
    launches,
    make,
    op,
    randn,
    take_other_away,
)

from ejmp_kernels import specification
from ejmp_kernels.dense import After, AtomRows, Filter, dense, linear_swap_add
from ejmp_kernels.sums import atom_sum
from ejmp_kernels.triton_kernels import gemm, gemm_kernels, gemm_swap, launch, sums

__all__ = ["kernel", "launches"]  # fixtures
GAMMA = 0.41
LOW = (torch.float16, BFLOAT16)
PARTS = ("factor", "basis", "add", "more", "rows")
COMBINATIONS = (
    ("basis",),
    ("factor", "basis"),
    ("more",),
    ("add", "more"),
    ("rows",),
    ("rows", "factor", "basis", "add", "more"),
)


def extras(m, n, dtype, given, *, r=9, atoms=3):
    """Arguments of `op` beside x and weight."""
    ids = torch.arange(m, device=DEVICE)
    rows = {"source_rows": randn(atoms, n, seed=5).to(launch.sums_dtype(torch.empty(0, dtype=dtype)))}
    rows |= {"target_rows": rows["source_rows"].flip(1), "source": ids % atoms, "target": (ids * 7 + 1) % atoms}
    return {
        **({"factor": randn(m, n, dtype=dtype, seed=1)} if "factor" in given else {}),
        **({"basis": randn(m, r, dtype=dtype), "filter": randn(n, r, dtype=dtype, seed=2)} if "basis" in given else {}),
        **({"add": randn(m, n, dtype=dtype, seed=3)} if "add" in given else {}),
        **({"more": randn(m, n, dtype=dtype, seed=4), "gamma": GAMMA} if "more" in given else {}),
        **(rows if "rows" in given else {}),
    }


def spec(x, weight, given, *, filter_sum=False):
    """The formula in float64."""
    wide = {name: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for name, t in given.items()}
    z = x.double() @ weight.double().mT
    if "source" in wide:
        z = z + wide["source_rows"][wide["source"]] + wide["target_rows"][wide["target"]]
    filters = wide["basis"] @ wide["filter"].mT if "basis" in wide else 1.0
    out = ALPHA * torch.nn.functional.silu(z) * wide.get("factor", 1.0) * (1.0 if filter_sum else filters)
    out = out + BETA * wide.get("add", 0.0) + GAMMA * wide.get("more", 0.0)
    return out * filters if filter_sum else out


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("given", COMBINATIONS, ids="+".join)
def test_values(kernel, dtype, size, given, monkeypatch):
    (x, weight, *_), more = make(*size, dtype), extras(size[0], size[2], dtype, given, r=8)
    take_other_away(kernel, size, dtype, monkeypatch)
    assert relative_error(op(x, weight, **more), spec(x, weight, more)) < allowed(dtype)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("given", [("basis", "add"), ("basis", "add", "more")])
@pytest.mark.parametrize("r", [1, 7, 128])
def test_a_filter_of_the_sum(given, r):
    (x, weight, *_), more = make(33, 40, 136), extras(33, 136, torch.float64, given, r=r)
    assert relative_error(op(x, weight, **more, filter_sum=True), spec(x, weight, more, filter_sum=True)) < 1e-12


@pytest.mark.parametrize("given", COMBINATIONS, ids="+".join)
def test_passes_after_the_vendors_product(given, launches):
    """Where the table says that the vendor's product is faster, as in float64."""
    (x, weight, *_), more = make(33, 40, 48), extras(33, 48, torch.float64, given)
    assert relative_error(op(x, weight, **more), spec(x, weight, more)) < 1e-12
    if "basis" in given:
        assert relative_error(op(x, weight, **more, filter_sum=True), spec(x, weight, more, filter_sum=True)) < 1e-12
    assert not launches


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("filter", lambda t: None, "filter must be given where basis is"),
        ("basis", lambda t: t[:, :0], r"basis must have 1..128 columns, got 0"),
        ("filter", lambda t: t[:, 1:], r"filter must have shape \[3, 9\], got \[3, 8\]"),
        ("more", lambda t: t[:1], r"more must have shape \[4, 3\], got \[1, 3\]"),
        ("source", lambda t: None, "source_rows, source, target_rows and target must be given together"),
        ("source", lambda t: t.int(), "source must be int64, got int32"),
        ("target", lambda t: t + 3, "target must be in 0..2, got"),
        ("target_rows", lambda t: t[1:], r"target_rows must have shape \[3, 3\], got \[2, 3\]"),
        ("source_rows", lambda t: t.half(), "source_rows must be float64, got float16"),
    ],
)
def test_misfits_are_refused(name, wrong, message):
    (x, weight, *_), more = make(4, 5, 3), extras(4, 3, torch.float64, PARTS)
    more[name] = wrong(more[name])
    with pytest.raises(ValueError, match=message):
        op(x, weight, **more)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_function_gives_the_same_on_each_way(dtype, launches):
    """In one op, and by product and passes as recorded and other backends have it."""
    more = extras(6, 16, dtype, PARTS)
    x, weight = randn(6, 8, dtype=dtype), randn(16, 8, dtype=dtype)
    swap, ptr = torch.tensor([1, 0, 3, 2, 5, 4], device=DEVICE), torch.tensor([0, 2, 4, 6], device=DEVICE)
    target = torch.tensor([0, 0, 1, 1, 2, 2], device=DEVICE)
    rows = AtomRows(more["source_rows"], more["target_rows"], more["source"], target, swap, ptr)
    filters = Filter(more["basis"], more["filter"])

    def call(*, outer):
        after = After(
            factor=filters, add=more["add"], more=more["more"], outer=filters if outer else None, rows=rows,
            scale=0.6 * ALPHA, add_scale=BETA, more_scale=GAMMA,
        )  # fmt: skip
        return dense(x, weight, after, backend="triton")

    exact = spec(x, weight, more | {"target": target, "factor": 1.0})
    filter_again = filters.basis.double() @ filters.weight.double().mT
    assert relative_error(call(outer=False), exact) < allowed(dtype)
    assert relative_error(call(outer=True), exact * filter_again) < 2 * allowed(dtype)
    assert len(launches) == (2 if dtype == torch.float16 else 0)
    x.requires_grad_()
    out = call(outer=True)
    assert relative_error(out.detach(), exact * filter_again) < 4 * allowed(dtype)
    out.sum().backward()
    assert len(launches) == (2 if dtype == torch.float16 else 0)


def emulated_silu(z, power_error, reciprocal_error):
    """Float32 z sigmoid(z) as the kernel orders it, its two instructions off by given relative errors."""
    one = np.float32(1)
    with np.errstate(over="ignore", under="ignore"):
        power = np.exp2((z * np.float32(-1.4426950408889634)).astype(np.float64)) * (1 + power_error)
        power = power.astype(np.float32)
    power[np.abs(power) < np.finfo(np.float32).tiny] = 0
    reciprocal = (1 / (one + power).astype(np.float64) * (1 + reciprocal_error)).astype(np.float32)
    reciprocal[np.abs(reciprocal) < np.finfo(np.float32).tiny] = 0
    return z * reciprocal


def test_the_approximate_activation_is_far_below_what_16_bits_tell():
    """By the error bounds of PTX ISA for ex2.approx.ftz (2^-22) and rcp.approx.ftz (one unit in the last place)."""
    z = np.linspace(-80, 80, 400_001, dtype=np.float32)
    exact = z.astype(np.float64) / (1 + np.exp(-z.astype(np.float64)))
    assert "ex2.approx.ftz.f32" in inspect.getsource(gemm_kernels.sigmoid.fn)
    worst = 0.0
    for power_error in (-(2.0**-22), 2.0**-22):
        for reciprocal_error in (-(2.0**-23), 2.0**-23):
            found = emulated_silu(z, power_error, reciprocal_error)
            worst = max(worst, np.max(np.abs(found - exact) / np.abs(exact).clip(1e-30)))
    assert worst < torch.finfo(torch.float16).eps / 100  # of its ten bits
    assert emulated_silu(np.array([-1000, 1000], dtype=np.float32), 0, 0).tolist() == [0, 1000]


def messages(edges, k, width, dtype):
    x, weight, add = randn(edges, k, dtype=dtype), randn(2 * width, k, dtype=dtype), randn(edges, width, dtype=dtype)
    swap = torch.arange(edges, device=DEVICE).view(-1, 2).flip(1).flatten().roll(0)
    half = edges // 4 * 2  # counter-edges far from their edges, and some beside them
    order = torch.cat([torch.arange(half // 2, half), torch.arange(half // 2)]).to(DEVICE)
    swap[:half] = order if half % 4 == 0 else swap[:half]
    assert torch.equal(swap[swap], torch.arange(edges, device=DEVICE))
    return x, weight, swap, add


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("fuses", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
@pytest.mark.parametrize(("edges", "k", "width"), [(150, 40, 70), (64, 16, 32), (6, 5, 3), (2, 1, 1), (0, 4, 4)])
@pytest.mark.parametrize("has_add", [True, False])
def test_messages_to_edges_and_counter_edges(edges, k, width, dtype, has_add, fuses, monkeypatch):
    monkeypatch.setattr(gemm, "fuses", lambda x: fuses)
    x, weight, swap, add = messages(edges, k, width, dtype)
    out = linear_swap_add(x, weight, swap, add if has_add else None, scale=0.7, backend="triton")
    wide = x.double() @ weight.double().mT
    exact = specification.swap_add(wide, swap, add.double() if has_add else None, scale=0.7)
    assert out.dtype == dtype
    assert relative_error(out, exact) < (1 if fuses else 4) * allowed(dtype) if edges else out.shape == (0, width)


def test_messages_are_one_launch_and_recorded_ones_are_not(monkeypatch):
    x, weight, swap, add = messages(8, 6, 4, torch.float16)
    called = []
    monkeypatch.setattr(gemm_swap, "_kernel", {(1,): lambda *_, **__: called.append(1)})
    linear_swap_add(x, weight, swap, add, backend="triton")
    assert called == [1]
    x, weight, add = (t.double().requires_grad_() for t in (x, weight, add))
    call = lambda x, weight, add: linear_swap_add(x, weight, swap, add, backend="triton")  # noqa: E731
    assert torch.autograd.gradgradcheck(call, (x, weight, add))
    assert called == [1]


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (1, lambda t: t[1:], r"weight must have an even number of rows, got shape \[7, 6\]"),
        (2, lambda t: t.flip(0).roll(1), "swap must undo itself"),
        (3, lambda t: t[:, 1:], r"add must have shape \[8, 4\], got \[8, 3\]"),
    ],
)
def test_wrong_messages_are_refused(index, wrong, message):
    given = [*messages(8, 6, 4, torch.float16)]
    given[index] = wrong(given[index])
    with pytest.raises(ValueError, match=message):
        linear_swap_add(*given, backend="triton")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
@pytest.mark.parametrize(("degrees", "width", "r"), [((0, 40, 3, 17), 150, 32), ((1,), 1, 1), ((0, 0), 5, 9)])
def test_sums_make_their_filters(degrees, width, r, dtype):
    ptr = torch.tensor([0, *degrees], device=DEVICE).cumsum(0)
    m, basis, filters = (randn(*shape, dtype=dtype) for shape in ((sum(degrees), width), (sum(degrees), r), (width, r)))
    out = torch.ops.ejmp_triton.atom_sum_filtered(m, basis, filters, ptr)
    exact = torch.zeros(len(degrees), width, dtype=torch.float64, device=DEVICE)
    atoms = torch.repeat_interleave(torch.arange(len(degrees), device=DEVICE), torch.tensor(degrees, device=DEVICE))
    exact.index_add_(0, atoms, m.double() * (basis.double() @ filters.double().mT))
    assert out.dtype == launch.sums_dtype(m)
    assert relative_error(out, exact) < 10 * allowed(torch.float32 if dtype != torch.float64 else dtype)


def test_sums_make_their_filters_where_nothing_is_recorded(monkeypatch):
    m, basis, filters, ptr = randn(6, 8), randn(6, 3), randn(8, 3), torch.tensor([0, 2, 6], device=DEVICE)
    made = []
    monkeypatch.setattr(sums, "_filtered_kernel", {(2, 1): lambda *_, **__: made.append(1)})
    low = [t.half() for t in (m, basis, filters)]
    atom_sum(low[0], Filter(*low[1:]), ptr, backend="triton")
    assert made == [1]
    exact = atom_sum(m, basis @ filters.mT, ptr, backend="triton")
    assert relative_error(atom_sum(m, Filter(basis, filters), ptr, backend="triton"), exact) < 1e-13
    low[2].requires_grad_()
    out = atom_sum(low[0], Filter(*low[1:]), ptr, backend="triton")
    wide = [t.detach().double() for t in low]
    exact = atom_sum(wide[0], Filter(*wide[1:]), ptr, backend="triton")
    assert relative_error(out.detach(), exact) < allowed(torch.float16)
    out.sum().backward()
    assert made == [1]
