"""Exact differences: what changed is listed, with the ratio where numbers are counts."""

import json

import pytest
from support.inputs import ROOT

from ejmp.track import exact


def test_differences():
    base = {"a parameters": 100, "b dispatches": 7, "c peak_bytes": 64}
    head = {"a parameters": 110, "b dispatches": 7, "d flops": 5}
    found = exact.differences(base, head)
    assert found == [("a parameters", 100, 110), ("d flops", None, 5), ("c peak_bytes", 64, None)]
    assert exact.shown(found[0]) == "a parameters: 100 -> 110, x 1.1"
    assert exact.shown(found[1]) == "d flops: new (5)"
    assert exact.shown(found[2]) == "c peak_bytes: gone (64)"
    assert exact.shown(("x peak_bytes", 64, 32)) == "x peak_bytes: 64 -> 32 bytes, x 0.5"
    assert exact.shown(("launch default/linear TMA", False, True)) == "launch default/linear TMA: False -> True"
    assert not exact.differences(head, dict(head))


def test_launch_settings_are_the_committed_ones(tmp_path):
    found = exact.launch_settings(ROOT)
    table = json.loads((ROOT / "kernels/ejmp_kernels/triton_kernels/configs.json").read_text())
    assert found["launch default/triplet num_warps"] == table["default"]["triplet"]["num_warps"]
    assert exact.launch_settings(tmp_path) == {}


def test_kernels_of_one_name_are_told_apart():
    row = {"architecture": "sm_90", "dtype": "bfloat16", "op": "activate", "kernel": "activation._k"}
    usage = {"registers": 30, "stack": 0, "shared": 1024}
    found = exact.kernel_facts([row | usage, row | usage | {"registers": 40}])
    assert found["kernel sm_90/bfloat16/activate/activation._k#1 registers"] == 30
    assert found["kernel sm_90/bfloat16/activate/activation._k#2 registers"] == 40
    committed = json.loads((ROOT / "benchmarks/results/triton_compile.json").read_text())["kernels"]
    assert len(exact.kernel_facts(committed)) == 3 * len(committed)


KERNEL = """
__global__ void scaled(float* x) { __shared__ float held[256]; held[threadIdx.x] = x[threadIdx.x]; __syncthreads();
  x[threadIdx.x] = 2 * held[255 - threadIdx.x]; }
namespace ejmp::cuda { namespace { template <typename T> __global__ void plain(T* x) { x[threadIdx.x] = 1; } }
void launch(float* x) { plain<float><<<1, 1>>>(x); } }
"""


def test_cuda_kernels_are_compiled_and_named(tmp_path):
    nvcc = exact.cuda_compiler()
    if nvcc is None:
        pytest.skip("there is no nvcc")
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    (folder / "ops.cu").write_text(KERNEL)
    found = exact.cuda_kernels(tmp_path, nvcc, tmp_path)
    assert found["kernel sm_90/cuda/scaled shared"] == 1024
    assert found["kernel sm_90/cuda/plain<float> shared"] == 0
    assert found["kernel sm_90/cuda/plain<float> spilled"] == 0
    assert found["kernel sm_90/cuda/plain<float> registers"] > 0
    (folder / "ops.cu").write_text("no source")
    with pytest.raises(RuntimeError, match=r"ops\.cu: it does not compile: .*no"):
        exact.cuda_kernels(tmp_path, nvcc, tmp_path)
