"""Products in 8-bit floating point, which torch emulates on the CPU: against the numbers that 8 bits say."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ejmp_kernels import float8


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exactly(rows):
    return rows.values.double() * rows.scales.double()[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows(dtype):
    """Each row is kept to 3 bits behind the leading one; a row of zeros stays one."""
    x = draw(6, 48).to(dtype) * torch.tensor([1e-20, 1e-3, 1.0, 1e3, 1e20, 0.0])[:, None].to(dtype)
    rows = float8.quantize_rows(x)
    assert rows.values.dtype == float8.TYPE
    error = (exactly(rows) - x.double()).abs()
    assert (error <= x.double().abs() / 16 + 2e-3 * x.double().abs().amax(dim=1, keepdim=True) / 16).all()
    assert not rows.values[5].float().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(bad):
    x, weight = draw(3, 16), torch.nn.Parameter(draw(16, 16, seed=1))
    x[1, 5] = bad
    out = float8.linear(float8.quantize_rows(x), float8.packed(weight), torch.float32)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("first", [0, 16])
def test_products(rows, first):
    weight = torch.nn.Parameter(draw(32, 64, seed=1))
    x = draw(rows, 64 - first)
    left, right = float8.quantize_rows(x), float8.packed(weight, first)
    with FlopCounterMode(display=False) as counter:
        out = float8.linear(left, right)
    assert counter.get_total_flops() == 2 * rows * (64 - first) * 32
    exact = exactly(left) @ exactly(right).mT
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.double(), exact, rtol=2**-8, atol=1e-4)
    assert (exact - x.double() @ weight[:, first:].double().mT).norm() <= 0.05 * exact.norm()


def test_a_changed_weight_is_packed_anew():
    weight = torch.nn.Parameter(draw(16, 16))
    before = float8.packed(weight)
    assert float8.packed(weight) is before
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(float8.packed(weight).scales, 2 * before.scales)


def test_refused():
    for shape, first in (((8, 16), 0), ((16, 24), 0), ((16, 32), 8)):
        weight = torch.nn.Parameter(draw(*shape))
        assert not float8.fits(weight, first)
        with pytest.raises(ValueError, match=r"packed: weight must be \[16 n, 16 m\]"):
            float8.packed(weight, first)
    assert float8.why_unavailable(torch.device("cpu")) == "the model is on cpu"
