"""The product whose warps have different tasks: its numbers and its barriers, in an emulation without a GPU."""

import importlib.util
import inspect

import pytest
import torch
from support import gluon_emulator
from support.tolerances import relative_error

pytest.importorskip("triton")

from support.gemm_cases import ALPHA, BETA, make, randn
from support.gluon_emulator import Descriptor, launch

from ejmp_kernels.triton_kernels import gemm_specialized

GAMMA = 0.41
OPTIONS = {"APPROXIMATE": False, "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2, "STAGES": 3}


def run(m, k, n, given, *, programs=2, seed=0, kernel=gemm_specialized.specialized, **options):
    """Return what the kernel writes, beside what it should."""
    x, weight, factor, add = make(m, k, n, torch.float16)
    wide = {"factor": factor, "add": add, "more": randn(m, n, dtype=torch.float16, seed=7)}
    chosen = {name: t if name in given else None for name, t in wide.items()}
    blocks = OPTIONS | options
    described = [Descriptor(x, (blocks["BLOCK_M"], blocks["BLOCK_K"])), Descriptor(weight, (blocks["BLOCK_N"], 16))]
    out = torch.full((m, n), torch.nan, dtype=torch.float16)
    launch(
        kernel, programs, *described, *chosen.values(), out, m, n, k, ALPHA, BETA, GAMMA,
        seed=seed, **blocks,
    )  # fmt: skip
    exact = {name: 0.0 if t is None else t.double() for name, t in chosen.items()}
    z = ALPHA * torch.nn.functional.silu(x.double() @ weight.double().mT)
    z = z * (exact["factor"] if factor is chosen["factor"] else 1.0)
    return out, z + BETA * exact["add"] + GAMMA * exact["more"]


@pytest.mark.parametrize("given", [(), ("factor",), ("factor", "add"), ("add", "more")])
@pytest.mark.parametrize("size", [(70, 80, 96), (16, 16, 32), (5, 7, 8), (33, 40, 136), (100, 20, 64)])
def test_values(size, given):
    out, exact = run(*size, given)
    assert relative_error(out, exact) < 4e-3  # of a product in float16, which is rounded before the activation


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_copies_and_warps(seed):
    out, exact = run(70, 80, 96, ("factor", "add"), seed=seed, programs=1 + seed % 3)
    assert relative_error(out, exact) < 4e-3


@pytest.mark.parametrize("stages", [2, 4])
def test_rings_of_other_lengths(stages):
    out, exact = run(70, 80, 96, ("add",), STAGES=stages)
    assert relative_error(out, exact) < 4e-3


def test_more_programs_than_tiles():
    out, exact = run(16, 32, 32, (), programs=3)
    assert relative_error(out, exact) < 4e-3


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("mbarrier.wait(product_empty, count & 1 ^ 1)", "pass"),  # overwrites what is still to be read
        ("mbarrier.arrive(product_empty)", "pass"),
        ("mbarrier.arrive(product_full)", "pass"),
        ("mbarrier.wait(product_full, count & 1)", "pass"),
        ("z = warpgroup_mma_wait(1, deps=[issued])", "z = warpgroup_mma_wait(2, deps=[issued])"),
        ("z = warpgroup_mma_wait(0, deps=[z])", "pass"),
        ("in gl.static_range(STAGES):\n        _request", "in gl.static_range(STAGES - 1):\n        _request"),
        ("mbarrier.wait(full.index(stage), step // STAGES & 1)", "pass"),
        ("mbarrier.wait(full.index(stage), step // STAGES & 1)", "mbarrier.wait(full.index(stage), 0)"),
        ("step + STAGES - 1, start > 0,", "step + STAGES, start > 0,"),
        ("(BLOCK_M + BLOCK_N) * BLOCK_K *", "BLOCK_M * BLOCK_K *"),
    ],
)
def test_the_emulation_finds_what_is_wrong(right, wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 0.3)
    source = inspect.getsource(gemm_specialized)
    assert source.count(right) == 1
    (tmp_path / "damaged.py").write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("damaged", tmp_path / "damaged.py")
    damaged = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(damaged)

    def is_wrong(seed):
        try:
            out, exact = run(70, 80, 96, (), seed=seed, kernel=damaged.specialized, programs=1)
        except AssertionError:
            return True
        return not relative_error(out, exact) < 4e-3

    assert any(is_wrong(seed) for seed in range(5))
