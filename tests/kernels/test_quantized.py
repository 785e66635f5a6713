"""Products of 8-bit integers, against the specification in float64, which rounds the same numbers."""

import pytest
import torch
from support.inputs import require_native
from torch.utils.flop_counter import FlopCounterMode

from ejmp_kernels import quantized, specification
from ejmp_kernels.registry import ops_of

LOW = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def native():
    require_native()


def draw(rows, columns, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * 10 ** (4 * torch.rand(rows, 1, generator=generator) - 2)
    return x.to(dtype)


def dequantized(rows):
    return (rows.values.double() - quantized.ZERO) * rows.scales.double()[:, None]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("columns", [1, 5, 16, 64, 1000])
def test_rows(columns, dtype):
    """Within half a step, to the last bit at the largest value; a row of zeros stays one."""
    x = draw(33, columns, dtype=dtype)
    x[7] = 0
    rows = quantized.quantize_rows(x)
    assert torch.equal(rows.scales, x.float().abs().amax(dim=1) / 127)
    found, steps = dequantized(rows), rows.scales.double()[:, None]
    assert ((found - x.double()).abs() <= 0.5001 * steps).all()
    other = (found - specification.quantized(x.double())).abs() > 0.01 * steps  # another side of a tie
    assert other.double().mean() <= 0.01
    assert (rows.values[7] == quantized.ZERO).all()
    assert rows.values.min() >= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(bad):
    x = draw(4, 40)
    x[2, 33] = bad
    out = quantized.linear(quantized.quantize_rows(x), quantized.packed(draw(8, 40, 1)), torch.float32)
    assert out[2].isnan().all()
    assert out[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_products(rows, dtype):
    """The integers are exact: what remains is the rounding of the result's type."""
    x, weight = draw(rows, 48, dtype=dtype), draw(37, 48, 1)
    factor, add = draw(rows, 37, 2, dtype), draw(rows, 37, 3, dtype)
    q, p = quantized.quantize_rows(x), quantized.packed(weight)
    values, scales = quantized.quantize_weight(weight)
    z = dequantized(q) @ (values.double() * scales.double()[:, None]).T
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(quantized.linear(q, p, dtype).double(), z, rtol=2 * eps, atol=2 * eps)
    out = quantized.linear_activate(q, p, factor, add, scale=0.5, add_scale=2.0, dtype=dtype)
    exact = specification.activate(z, factor.double(), add.double(), scale=0.5, add_scale=2.0)
    assert out.dtype == dtype
    atol = 4 * eps * (exact.abs().max().item() if rows else 1)
    torch.testing.assert_close(out.double(), exact, rtol=4 * eps, atol=atol)
    found = dequantized(quantized.linear_activate_rows(q, p, factor, dtype=dtype))
    exact = specification.activate(z, factor.double())
    assert ((found - exact).abs() <= (0.51 / 127 + 4 * eps) * exact.abs().amax(dim=1, keepdim=True)).all()


def test_a_product_is_near_that_of_the_numbers():
    """Errors of rounding to 1/127 of the largest value, averaged over 512 terms."""
    x, weight = draw(64, 512), draw(96, 512, 1)
    found = quantized.linear(quantized.quantize_rows(x), quantized.packed(weight), torch.float32)
    exact = x.double() @ weight.double().T
    assert (found - exact).norm() <= 0.015 * exact.norm()
    torch.testing.assert_close(
        specification.quantized(x.double()) @ specification.quantized(weight.double()).T,
        found.double(),
        rtol=1e-3,
        atol=1e-3 * exact.abs().max().item(),
    )


def test_a_changed_weight_is_packed_anew():
    x, weight = quantized.quantize_rows(draw(9, 32)), torch.nn.Parameter(draw(16, 48, 1))
    first = quantized.packed(weight, 16)
    assert quantized.packed(weight, 16) is first
    assert quantized.packed(weight) is not first
    before = quantized.linear(x, first, torch.float32)
    with torch.no_grad():
        weight *= 2
    torch.testing.assert_close(quantized.linear(x, quantized.packed(weight, 16), torch.float32), 2 * before)
    weight.data = weight.data.clone() / 2
    torch.testing.assert_close(quantized.linear(x, quantized.packed(weight, 16), torch.float32), before)


def test_operations_are_counted():
    x, weight = quantized.quantize_rows(draw(9, 32)), quantized.packed(draw(16, 32, 1))
    with FlopCounterMode(display=False) as counter:
        quantized.linear_activate(x, weight, dtype=torch.float32)
    assert counter.get_total_flops() == 2 * 9 * 32 * 16


def test_refused():
    ops, x = ops_of("native"), draw(4, 8)
    with pytest.raises(ValueError, match="quantize_rows: x must be float32 or bfloat16, got Double"):
        quantized.quantize_rows(x.double())
    with pytest.raises(ValueError, match="quantize_rows: x must have 2 axes"):
        quantized.quantize_rows(x[0])
    with pytest.raises(ValueError, match="scale_rows_: x must be contiguous"):
        ops.scale_rows_(x.T, torch.ones(8))
    with pytest.raises(ValueError, match="scale_rows_: scale must not share"):
        ops.scale_rows_(x, x[0, :4])
    with pytest.raises(ValueError, match="activate_rows: scale must have shape"):
        ops.activate_rows(x, torch.ones(3), None, None, 1.0, 1.0, True, False)
    with pytest.raises(ValueError, match="activate_rows: factor must be Float"):
        ops.activate_rows(x, torch.ones(4), x.double(), None, 1.0, 1.0, True, False)


def test_shapes_for_tracing():
    for keep, quantize in ((True, True), (True, False), (False, True)):
        arguments = (draw(4, 8), torch.ones(4), None, draw(4, 8, 1), 1.0, 0.5, keep, quantize)
        torch.library.opcheck(
            torch.ops.ejmp.activate_rows.default, arguments, test_utils=("test_schema", "test_faketensor")
        )
    torch.library.opcheck(
        torch.ops.ejmp.quantize_rows.default, (draw(4, 8),), test_utils=("test_schema", "test_faketensor")
    )
