"""Triton's product with an epilogue against torch in float64: values, bounds, derivatives, registration, choices.

Without a GPU the kernels run in Triton's interpreter, where a product of bfloat16 numbers is garbage.
"""

import itertools
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from support.inputs import environment
from support.tolerances import relative_error

pytest.importorskip("triton")

from support.gemm_cases import (
    ALPHA,
    BETA,
    DTYPES,
    SIZES,
    SMALL_TILES,
    allowed,
    kernel,
    launches,
    make,
    op,
    take_other_away,
)

from ejmp.model.precision import tf32_products
from ejmp_kernels import specification
from ejmp_kernels.availability import interpreted
from ejmp_kernels.dense import linear_activate
from ejmp_kernels.triton_kernels import gemm, launch

__all__ = ["kernel", "launches"]  # fixtures

MARGIN = 64
NO_ROWS = (None,) * 4


def spec(x, weight, factor, add, alpha=ALPHA, beta=BETA):
    x, weight, factor, add = (t if t is None else t.double() for t in (x, weight, factor, add))
    return specification.activate(x @ weight.mT, factor, add, scale=0.6 * alpha, add_scale=beta)


def bordered(x):
    """A copy between borders of NaN, and its whole memory."""
    memory = x.new_full((x.numel() + 2 * MARGIN,), torch.nan)
    inside = memory[MARGIN : MARGIN + x.numel()].view(x.shape)
    return inside.copy_(x), memory


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True), (False, False)])
def test_values(kernel, dtype, size, given, monkeypatch):
    x, weight, *optional = make(*size, dtype)
    inputs = [x, weight, *(t if there else None for t, there in zip(optional, given, strict=True))]
    take_other_away(kernel, size, dtype, monkeypatch)
    out = op(*inputs)
    assert out.dtype == dtype
    assert relative_error(out, spec(*inputs)) < allowed(dtype)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_beyond_the_borders_is_read_or_written(dtype, size):
    inputs = [bordered(t)[0] for t in make(*size, dtype)]
    out, memory = bordered(torch.zeros_like(inputs[2]))
    x, weight, factor, add = inputs
    gemm.run([x, weight, factor, None, None, add, None, out], NO_ROWS, (ALPHA, BETA, 1.0), filter_sum=False)
    assert relative_error(out, spec(*inputs)) < allowed(dtype)
    assert memory[:MARGIN].isnan().all()
    assert memory[-MARGIN:].isnan().all()


def stay_inside():
    """Run both kernels on arrays beside memory that may not be touched."""
    from support.guard_pages import guarded

    for side, size, dtype in itertools.product(("start", "end"), SIZES, (torch.float64, torch.float16)):
        arrays = [guarded(t, side) for t in [*make(*size, dtype), torch.zeros(size[0], size[2], dtype=dtype)]]
        x, weight, factor, add, out = arrays
        for by_descriptors in (False, True):
            launch.OVERRIDES["linear_activate"] = SMALL_TILES | {"TMA": by_descriptors}
            gemm.run([x, weight, factor, None, None, add, None, out], NO_ROWS, (ALPHA, BETA, 1.0), filter_sum=False)


@pytest.mark.skipif(not interpreted(), reason="guard pages are for the interpreter; on a GPU compute-sanitizer looks")
def test_nothing_beyond_the_ends_is_touched():
    result = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False, env=environment())
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("size", [(0, 16, 16), (16, 16, 0), (0, 0, 0)])
def test_an_empty_result(size):
    x, weight, factor, add = make(*size)
    assert op(x, weight, factor, add).shape == (size[0], size[2])


@pytest.mark.usefixtures("kernel")
def test_a_product_of_nothing_is_zero():
    inputs = make(16, 0, 32)
    assert relative_error(op(*inputs), BETA * inputs[3]) < 1e-13


@pytest.mark.usefixtures("kernel")
def test_gaps_between_rows_and_columns():
    x, weight, factor, add = make(20, 24, 16)
    views = [torch.cat([x, x], 1)[:, :24], weight.mT.contiguous().mT, factor.repeat_interleave(2, 1)[:, ::2], add]
    assert not any(t.is_contiguous() for t in views[:3])
    assert torch.equal(op(*views), op(x, weight, factor, add))


@pytest.mark.usefixtures("kernel")
def test_the_same_bits_twice():
    inputs = make(70, 33, 50, torch.float32)
    assert torch.equal(op(*inputs), op(*inputs))


@pytest.mark.usefixtures("kernel")
def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    inputs = make(9, 5, 7)
    with FlopCounterMode(display=False) as counter:
        op(*inputs)
    assert counter.get_total_flops() == 2 * 9 * 5 * 7


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, lambda t: t[0], r"x must have 2 axes, got shape \[5\]"),
        (0, lambda t: t.long(), "x must be float32 or float64 or float16 or bfloat16, got int64"),
        (1, lambda t: t[:, 1:], r"weight must have shape \[3, 5\], got \[3, 4\]"),
        (1, lambda t: t.float(), "weight must be float64, got float32"),
        (2, lambda t: t[:1], r"factor must have shape \[4, 3\], got \[1, 3\]"),
        (3, lambda t: t.mT, r"add must have shape \[4, 3\], got \[3, 4\]"),
        (3, lambda t: t.to("meta"), "add must be on"),
        (3, lambda t: t.half(), "add must be float64, got float16"),
    ],
)
def test_misfits_are_refused(index, wrong, message):
    arguments = make(4, 5, 3)
    arguments[index] = wrong(arguments[index])
    with pytest.raises((ValueError, NotImplementedError), match=message):
        op(*arguments)


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float16, 1), (torch.float32, 0), (torch.float64, 0)])
def test_low_types_are_fused_and_others_are_the_vendors(launches, dtype, fused):
    inputs = make(6, 8, 16, dtype)
    out = linear_activate(*inputs, scale=0.6 * ALPHA, add_scale=BETA, backend="triton")
    assert relative_error(out, spec(*inputs)) < allowed(dtype)
    assert len(launches) == fused


def test_float32_is_fused_where_torch_would_use_tf32(launches):
    inputs = make(6, 8, 16, torch.float32)
    with tf32_products():
        linear_activate(*inputs, backend="triton")
        assert gemm.precision(inputs[0]) == "tf32"
        assert gemm.precision(inputs[0].double()) == "ieee"
    assert len(launches) == 1


def test_without_tf32_products_keep_float32s_digits():
    assert gemm.precision(torch.zeros(1)) == "tf32x3"


def test_recorded_products_are_not_fused(launches):
    x, weight, factor, add = make(6, 8, 16, torch.float16)
    out = linear_activate(x, weight.requires_grad_(), factor, add, backend="triton")
    with torch.no_grad():
        again = linear_activate(x, weight, factor, add, backend="triton")
    assert len(launches) == 1
    assert relative_error(out, again.double()) < 3 * allowed(torch.float16)
    out.sum().backward()
    assert weight.grad is not None


def test_a_residual_in_float32_stays_in_float32(launches):
    x, weight, _, add = make(6, 8, 16, torch.float16)
    out = linear_activate(x, weight, add=add.float(), scale=0.6, backend="triton")
    assert out.dtype == torch.float32
    assert len(launches) == 1
    assert relative_error(out, spec(x, weight, None, add, 1.0, 1.0)) < allowed(torch.float32) * 100


def kind(m, n, dtype, *, aligned=True):
    sizes = {"m": m, "n": n, "k": 1024, "r": 0}
    options = {"rows": False, "wide": False, "filter_sum": False, "aligned": aligned, "tf32": False}
    return gemm.Kind(device=torch.device("cpu"), dtype=dtype, **sizes, **options)


@pytest.mark.parametrize(
    ("m", "n", "tile"),
    [
        (32_768, 1024, (128, 256)),
        (3_102, 1024, (128, 256)),  # 100 of 132 processors have one
        (1_500, 1024, (128, 128)),
        (300, 1024, (64, 64)),
        (3_102, 64, (64, 64)),
        (200_000, 64, (64, 64)),  # three quarters of a tile of 256 columns would be for nothing
        (200_000, 128, (128, 128)),
    ],
)
def test_tiles_are_chosen_by_what_the_busiest_processor_computes(monkeypatch, m, n, tile):
    """On a card with 132 multiprocessors."""
    monkeypatch.setattr(launch, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(launch, "processors", lambda _: 132)
    chosen = gemm.settings(kind(m, n, torch.bfloat16))
    assert (chosen["BLOCK_M"], chosen["BLOCK_N"]) == tile


def test_rows_that_are_not_aligned_take_small_tiles_and_pointers():
    chosen = gemm.settings(kind(10**7, 64, torch.float16, aligned=False))
    assert chosen["BLOCK_M"] == 64
    assert not chosen["TMA"]


def test_a_launch_is_prepared_once_for_each_kind(monkeypatch):
    prepared, prepare = [], gemm.prepare
    monkeypatch.setattr(gemm, "prepare", lambda kind: prepared.append(kind) or prepare(kind))
    monkeypatch.setattr(launch, "OVERRIDES", {})
    gemm._prepared.cache_clear()
    for size in ((64, 16, 32), (64, 16, 32), (66, 16, 32), (64, 16, 32)):
        x, weight, factor, add = make(*size, torch.float16)
        op(x, weight, factor, add)
    op(x, weight)
    assert [found.m for found in prepared] == [64, 66]


def test_one_graph_without_breaks_for_every_number_of_rows():
    graphs = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=graphs, fullgraph=True, dynamic=True)
    def call(x, weight):
        return linear_activate(x, weight, backend="triton")

    for rows in (6, 9, 14):
        x, weight, *_ = make(rows, 8, 16, torch.float16)
        assert relative_error(call(x, weight), spec(x, weight, None, None, 1 / 0.6)) < allowed(torch.float16)
    assert graphs.frame_count == 1


if __name__ == "__main__":
    stay_inside()
