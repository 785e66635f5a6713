"""What the tests of Triton's products share: arrays, small tiles, launches counted."""

import pytest
import torch

from ejmp_kernels import registry
from ejmp_kernels.availability import interpreted
from support.tolerances import tolerance

registry.load_backend("triton")
from ejmp_kernels.triton_kernels import gemm, launch  # noqa: E402 - defines ops, which the line above registers

DEVICE = "cpu" if interpreted() else "cuda"
ALPHA, BETA = 1.37, -0.73
BFLOAT16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(interpreted(), reason="the interpreter's bfloat16 products are garbage")
)
DTYPES = (torch.float64, torch.float32, torch.float16, BFLOAT16)
SIZES = ((150, 48, 80), (64, 32, 64), (5, 7, 3), (1, 1, 1), (33, 40, 136))
SMALL_TILES = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2, "num_warps": 4}


@pytest.fixture(params=["pointers", "descriptors"])
def kernel(request, monkeypatch):
    """Small tiles by one of the kernels; the other one is taken away."""
    by_descriptors = request.param == "descriptors"
    if by_descriptors and not interpreted() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("descriptors need sm_90")
    options = SMALL_TILES | {"TMA": by_descriptors}
    sizes = ("linear_activate", "linear_activate_middle", "linear_activate_small")
    monkeypatch.setattr(launch, "OVERRIDES", dict.fromkeys(sizes, options))
    monkeypatch.setattr(gemm, "fuses", lambda x: True)
    return request.param


def allowed(dtype):
    return tolerance("product with an epilogue", dtype)


def randn(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(DEVICE, dtype)


def make(m, k, n, dtype=torch.float64):
    return [
        randn(m, k, dtype=dtype),
        randn(n, k, dtype=dtype),
        randn(m, n, dtype=dtype, seed=1),
        randn(m, n, dtype=dtype),
    ]


def op(x, weight, factor=None, add=None, **more):
    """The op, with what few calls give by name."""
    names = ("basis", "filter", "add", "more", "source_rows", "source", "target_rows", "target")
    given = {"add": add} | more
    rest = (ALPHA, BETA, given.get("gamma", 1.0), given.get("filter_sum", False))
    return torch.ops.ejmp_triton.linear_fused(x, weight, factor, *(given.get(name) for name in names), *rest)


def take_other_away(kernel, size, dtype, monkeypatch):
    """Take the kernel away that a test is not about, so that using it is an error."""
    if kernel == "pointers":
        monkeypatch.setattr(gemm, "by_descriptors", None)
    elif all((n * dtype.itemsize) % 16 == 0 for n in size[1:]):
        monkeypatch.setattr(gemm, "by_pointers", None)


@pytest.fixture
def launches(monkeypatch):
    """The arguments of every launch of a fused product."""
    seen, run = [], gemm.run
    monkeypatch.setattr(gemm, "run", lambda *given, **options: (seen.append(given), run(*given, **options)))
    return seen
