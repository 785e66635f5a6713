"""The product whose warps have different tasks: its numbers and its barriers, in an emulation without a GPU."""

import importlib.util
import inspect

import gpu_ops
import pytest
import torch
from support import gluon_emulator
from support.tolerances import relative_error

pytest.importorskip("triton")

from support.gemm_cases import ALPHA, BETA, allowed, launches, make, op, randn
from support.gluon_emulator import Descriptor, launch

from ejmp_kernels.availability import interpreted
from ejmp_kernels.triton_kernels import gemm, gemm_specialized
from ejmp_kernels.triton_kernels import launch as launch_settings

__all__ = ["launches"]  # a fixture

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


@pytest.mark.skipif(interpreted() or torch.cuda.get_device_capability() < (9, 0), reason="it is for sm_90")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(5000, 1024, 1024), (300, 72, 520), (130, 64, 64)])
@pytest.mark.parametrize("given", [(), ("factor", "add")])
def test_values_on_a_gpu(size, given, dtype, launches, monkeypatch):
    monkeypatch.setattr(launch_settings, "OVERRIDES", {"linear_activate": {"SPECIALIZED": True, "RATE": 1e9}})
    x, weight, *optional = (t.cuda() for t in make(*size, dtype))
    weight = weight / size[1] ** 0.5
    factor, add = optional if given else (None, None)
    out = op(x, weight, factor, add)
    z = ALPHA * torch.nn.functional.silu(x.double() @ weight.double().mT)
    exact = z * factor.double() + BETA * add.double() if given else z
    assert len(launches) == 1
    assert relative_error(out, exact) < 4 * allowed(dtype)


def test_it_is_chosen_by_its_setting_and_where_it_can(monkeypatch):
    monkeypatch.setattr(launch_settings, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(launch_settings, "processors", lambda _: 132)
    monkeypatch.setattr(launch_settings, "OVERRIDES", {"linear_activate": {"SPECIALIZED": True}})
    plain = {"r": 0, "rows": False, "wide": False, "filter_sum": False, "aligned": True, "tf32": False}

    def kernel_of(m, **options):
        kind = gemm.Kind(
            device=torch.device("cpu"), dtype=torch.bfloat16, m=m, n=1024, k=1024, **plain | options
        )  # fmt: skip
        return gemm.prepare(kind).kernel

    assert kernel_of(32_768) is gemm_specialized.specialized
    for other in ({"r": 32}, {"rows": True}, {"aligned": False}, {"wide": True}):
        assert kernel_of(32_768, **other) is not gemm_specialized.specialized
    monkeypatch.setattr(launch_settings, "OVERRIDES", {})
    assert kernel_of(32_768) is not gemm_specialized.specialized


def test_the_campaign_measures_it_where_it_can_run(monkeypatch):
    x = torch.zeros(1, dtype=torch.bfloat16)
    calls = {"triton": lambda: dict(launch_settings.OVERRIDES)}
    assert gpu_ops.second_products(calls, x) == {}
    monkeypatch.setattr(launch_settings, "architecture", lambda _: "sm_90")
    assert gpu_ops.second_products({}, x) == gpu_ops.second_products(calls, x.float()) == {}
    (again,) = gpu_ops.second_products(calls, x).values()
    assert again() == {"linear_activate": {"SPECIALIZED": True}}
    assert not launch_settings.OVERRIDES


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
