"""Every Triton kernel compiles for GPUs that are not here, fits into them and keeps its numbers in registers."""

import json
import os
import subprocess
import sys

import pytest
from support.inputs import TESTS

pytest.importorskip("triton")

SCRIPT = TESTS / "triton_compile_script.py"
TYPES = {80: ("float32", "bfloat16"), 90: ("bfloat16",)}
"""Types compiled here for each compute capability; `make slow` compiles all types for both."""
ALL = dict.fromkeys(TYPES, ("float32", "bfloat16", "float16", "float64"))
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
"""Shared memory that one block may take (CUDA C++ programming guide, compute capabilities)."""
STACK_BYTES = 256
"""Bytes of registers that a thread may spill, except in float64, which is for tests only."""


@pytest.fixture(scope="module", params=[TYPES, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def rows_by_architecture(request, tmp_path_factory):
    """All kernels, compiled anew and both architectures at once; the interpreter would leave nothing to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    runs = {}
    for architecture, types in request.param.items():
        folder = tmp_path_factory.mktemp(f"sm_{architecture}")
        command = [sys.executable, SCRIPT, "--architectures", str(architecture), "--json", folder / "rows.json"]
        settings = {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*command, "--types", *types],
            env=environment | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        runs[architecture] = process, folder / "rows.json"
    found = {}
    for architecture, (process, file) in runs.items():
        printed, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]
        sys.stdout.write("\n" + printed)
        found[architecture] = json.loads(file.read_text())["kernels"]
    return found


@pytest.fixture(params=TYPES)
def compiled(request, rows_by_architecture):
    rows = rows_by_architecture[request.param]
    assert {row["architecture"] for row in rows} == {f"sm_{request.param}"}
    assert {row["dtype"] for row in rows} >= set(TYPES[request.param])
    return request.param, rows


def named(row):
    return " ".join(str(row[key]) for key in ("dtype", "op", "kernel", "shared", "registers", "stack"))


def test_kernels_fit_into_shared_memory(compiled):
    architecture, rows = compiled
    assert not [named(row) for row in rows if row["shared"] > SHARED_BYTES[architecture]]


def test_kernels_keep_their_numbers_in_registers(compiled):
    _, rows = compiled
    assert not [named(row) for row in rows if row["stack"] > STACK_BYTES and row["dtype"] != "float64"]


def test_products_run_on_tensor_cores(compiled):
    architecture, rows = compiled
    products = [row for row in rows if row["op"] == "linear_fused" and row["dtype"] != "float64"]
    instructions = {row["tensor_cores"] for row in products}
    assert instructions == {"wgmma" if architecture == 90 else "mma.sync"}


def test_the_large_product_goes_through_the_memory_accelerator_of_sm_90(compiled):
    architecture, rows = compiled
    kernels = {row["kernel"] for row in rows if row["op"] == "linear_fused" and row["dtype"] == "bfloat16"}
    assert ("gemm_kernels.by_descriptors" in kernels) == (architecture == 90)


def products_of(rows):
    """The products in 16 bits, by kernel and what their settings are."""
    return [row for row in rows if row["op"] == "linear_fused" and row["dtype"] == "bfloat16"]


def test_an_epilogue_takes_few_instructions(compiled):
    """The tile of 128 x 256: 2915 instructions and 4559 with factor and residual, when each activation was fenced."""
    architecture, rows = compiled
    if architecture != 90:
        pytest.skip("the tile is that of sm_90")
    found = [row["instructions"] for row in products_of(rows) if row["settings"].get("BLOCK_N") == 256]
    assert found[0] < 2000
    assert found[1] < 3700


def test_two_programs_with_middle_tiles_fit_on_a_processor(compiled):
    """One can then multiply while the other is in its epilogue."""
    architecture, rows = compiled
    if architecture != 90:
        pytest.skip("the tile is that of sm_90")
    (middle,) = [row for row in products_of(rows) if row["settings"].get("BLOCK_N") == 128]
    reserved = 1 << 10  # of each program, by the system
    assert 2 * (middle["shared"] + reserved) <= 228 << 10
    assert 2 * middle["registers"] * 32 * middle["settings"]["num_warps"] <= 1 << 16


def test_groups_of_warps_share_the_registers(compiled):
    architecture, rows = compiled
    specialized = [row for row in rows if row["kernel"] == "gemm_specialized.specialized"]
    assert len(specialized) == (2 if architecture == 90 else 0)
    assert all(row["stack"] == 0 for row in specialized)
    assert all(row["registers"] * 32 * (8 + 4) <= 1 << 16 for row in specialized)


def test_quadruplets_make_each_angular_function_once(compiled):
    """2001 instructions on sm_90, 2079 on sm_80, when each thread made Y_l for all channels that it had."""
    _, rows = compiled
    first = next(row for row in rows if row["kernel"] == "quadruplet._sums_kernel" and row["dtype"] == "bfloat16")
    assert first["op"] == "quadruplet"
    assert first["instructions"] < 1900
