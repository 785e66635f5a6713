"""A matrix product with an activation, a filter, a residual and scalings in its epilogue, by persistent programs.

out[i, j] = alpha silu(z[i, j]) factor[i, j] + beta add[i, j],  z[i, j] = sum_k x[i, k] weight[j, k]

x [m, k], weight [n, k], factor and add [m, n] or absent, out [m, n], all of one type and row-major; sums and epilogue
are in float32 (float64 for float64), rounded once. 2 m n k FLOP; reads x, weight, factor and add once and writes out,
(m k + n k + 3 m n) numbers, where a product and a pass after it move 2 m n more.

As many programs run as fit on the GPU at once, and each takes every so many-th tile of out; tiles follow each other in
groups of GROUP_M rows, so that their rows of x and weight are still in the L2 cache. There are two kernels: one loads
by pointers (asynchronous copies from sm_80 on), one by the tensor memory accelerator of sm_90, which wants rows of a
multiple of 16 bytes.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ejmp_kernels.triton_kernels import launch


@triton.jit
def _origin(tile, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return the first row and column of a tile: down the rows of a group, then to its next column."""
    rows, columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    group = tile // (GROUP_M * columns)
    within = tile % (GROUP_M * columns)
    height = tl.minimum(rows - group * GROUP_M, GROUP_M)
    return (group * GROUP_M + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def _halves(z):
    """Cut a tile into its left and right half: an epilogue on halves needs half the registers and half the memory."""
    M: tl.constexpr = z.shape[0]
    N: tl.constexpr = z.shape[1]
    return tl.split(tl.permute(tl.reshape(z, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _silu(z, alpha):
    """Return alpha z sigmoid(z); alpha comes in float64 and is rounded to the type of z."""
    return tl.full((1, 1), alpha, z.dtype) * z * tl.sigmoid(z)


@triton.jit
def _finish(z, factor, add, out, at, inside, alpha, beta):
    """Take half a tile through the epilogue and store it."""
    z = _silu(z, alpha)
    if factor is not None:
        z *= tl.load(factor + at, mask=inside).to(z.dtype)
    if add is not None:
        z += tl.full((1, 1), beta, z.dtype) * tl.load(add + at, mask=inside).to(z.dtype)
    tl.store(out + at, z.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["m"])  # one kernel for every number of edges
def _by_pointers(
    x, weight, factor, add, out, m, n, k,
    alpha: tl.float64, beta: tl.float64,
    SUM: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        first_row, first_column = _origin(tile, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        inner = tl.arange(0, BLOCK_K)
        # rows past the end are read as the last one, and what becomes of them is not stored
        x_row = tl.minimum(tl.arange(0, BLOCK_M), m - 1 - first_row)
        weight_row = tl.minimum(tl.arange(0, BLOCK_N), n - 1 - first_column)
        x_at = x + first_row.to(tl.int64) * k + (x_row[:, None] * k + inner[None, :])
        weight_at = weight + first_column.to(tl.int64) * k + (weight_row[None, :] * k + inner[:, None])
        z = tl.zeros((BLOCK_M, BLOCK_N), SUM)
        for start in tl.range(0, k, BLOCK_K):
            if EVEN_K:
                a, b = tl.load(x_at), tl.load(weight_at)
            else:
                a = tl.load(x_at, mask=start + inner[None, :] < k, other=0.0)
                b = tl.load(weight_at, mask=start + inner[:, None] < k, other=0.0)
            z = tl.dot(a, b, z, input_precision=PRECISION, out_dtype=SUM)
            x_at += BLOCK_K
            weight_at += BLOCK_K

        left, right = _halves(z)
        row = tl.arange(0, BLOCK_M)[:, None]
        for half in tl.static_range(2):
            column = half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[None, :]
            at = first_row.to(tl.int64) * n + first_column + (row * n + column)
            inside = (row < m - first_row) & (column < n - first_column)
            _finish(left if half == 0 else right, factor, add, out, at, inside, alpha, beta)


@triton.jit
def _finish_by_descriptors(z, factor, add, out, row, column, alpha, beta):
    """Take half a tile through the epilogue and store it."""
    z = _silu(z, alpha)
    if factor is not None:
        z *= factor.load([row, column]).to(z.dtype)
    if add is not None:
        z += tl.full((1, 1), beta, z.dtype) * add.load([row, column]).to(z.dtype)
    out.store([row, column], z.to(out.dtype))


@triton.jit(do_not_specialize=["m"])  # one kernel for every number of edges
def _by_descriptors(
    x, weight, factor, add, out, m, n, k,
    alpha: tl.float64, beta: tl.float64,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = _origin(tile, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        z = tl.zeros((BLOCK_M, BLOCK_N), SUM)
        for start in tl.range(0, k, BLOCK_K):
            # what lies past an end comes as zeros
            a, b = x.load([row, start]), weight.load([column, start])
            z = tl.dot(a, b.T, z, input_precision=PRECISION, out_dtype=SUM)
        left, right = _halves(z)
        _finish_by_descriptors(left, factor, add, out, row, column, alpha, beta)
        _finish_by_descriptors(right, factor, add, out, row, column + BLOCK_N // 2, alpha, beta)


NO_OPTIONS = ("fused", "TMA", "FLATTEN", "PROGRAMS", "RATE")
"""Names of settings that are not handed to both kernels as they are."""


def precision(x: Tensor) -> str:
    """Return how products run; those of float32 in TF32 only where torch's own would."""
    if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return launch.dot_precision(x)


def fuses(x: Tensor) -> bool:
    """Return whether a type takes these kernels, and not the vendor's product and a pass after it.

    They are for products that tensor cores make in one go. Three TF32 products for one of float32 are no faster than
    the vendor's on the ordinary cores and round otherwise, and in float64 the pass after the product costs little.
    """
    return launch.config("linear_activate", x)["fused"] and precision(x) != "tf32x3"


def settings(x: Tensor, n: int, *, aligned: bool = True) -> dict[str, Any]:
    """Return the launch settings of a product: of large, middle and small tiles those that take the least time.

    That is the number of tiles that the busiest processor makes, times their area, over the rate of such tiles relative
    to large ones (RATE). Large tiles would leave processors idle where there are few rows, and compute what nobody
    needs where there are few columns. Rows that are not aligned are read number by number, which wants many registers,
    so they take small tiles.

    Args:
        x: [m, k].
        n: number of rows of the weight.
        aligned: whether all arrays are aligned.
    """
    if launch.OVERRIDES:
        return _choose(x, n, aligned=aligned)
    return _chosen(launch.architecture(x.device), x.device, x.dtype, x.shape[0], n, aligned)


@functools.lru_cache(maxsize=4096)
def _chosen(
    _architecture: str, device: torch.device, dtype: torch.dtype, m: int, n: int, aligned: bool
) -> dict[str, Any]:
    return _choose(torch.empty(1, dtype=dtype, device=device).expand(m, 1), n, aligned=aligned)


def _choose(x: Tensor, n: int, *, aligned: bool) -> dict[str, Any]:
    large = launch.config("linear_activate", x)
    middle, small = (large | launch.config(f"linear_activate_{size}", x) for size in ("middle", "small"))
    if not aligned:
        return small | {"TMA": False}

    def seconds(chosen: dict[str, Any]) -> float:
        tiles = triton.cdiv(x.shape[0], chosen["BLOCK_M"]) * triton.cdiv(n, chosen["BLOCK_N"])
        rounds = triton.cdiv(tiles, launch.processors(x.device))
        return rounds * chosen["BLOCK_M"] * chosen["BLOCK_N"] / chosen["RATE"]

    return min((large, middle, small), key=seconds)


@launch.define(
    "linear_activate(Tensor x, Tensor weight, Tensor? factor, Tensor? add, float alpha, float beta) -> Tensor"
)
def linear_activate(
    x: Tensor, weight: Tensor, factor: Tensor | None, add: Tensor | None, alpha: float, beta: float
) -> Tensor:
    """Return alpha silu(x weight^T) factor + beta add."""
    launch.check_rows("linear_activate", "x", x, 2)
    launch.check_rows("linear_activate", "weight", weight, 2)
    (m, k), n, like = x.shape, weight.shape[0], (x.dtype,)
    given = {name: (t, like, (m, n)) for name, t in (("factor", factor), ("add", add)) if t is not None}
    launch.check_arguments(
        "linear_activate", x.device, x=(x, launch.REAL, (m, k)), weight=(weight, like, (n, k)), **given
    )
    if not fuses(x):
        z = torch.nn.functional.linear(x, weight)
        return torch.ops.ejmp_triton.activate_(z, factor, add, alpha, beta)
    out = x.new_empty(m, n)
    if out.numel():
        arrays = [t if t is None else t.contiguous() for t in (x, weight, factor, add, out)]
        _run(arrays, alpha, beta, settings(x, n, aligned=all(map(_aligned, arrays))))
    return out


def _aligned(x: Tensor | None) -> bool:
    """Return whether an array, if there is one, is not empty and its rows begin at multiples of 16 bytes."""
    return x is None or (x.numel() > 0 and x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0)


def _run(arrays: list[Any], alpha: float, beta: float, chosen: dict[str, Any]) -> None:
    """Launch one of the kernels.

    Args:
        arrays: x, weight, factor or None, add or None, out; contiguous.
        alpha: scale of the activation.
        beta: scale of what is added.
        chosen: block sizes and options of the launch; also PROGRAMS for each processor, and TMA where there is one.
    """
    x, *_, out = arrays
    (m, n), k = out.shape, x.shape[1]
    options = {name: value for name, value in chosen.items() if name not in NO_OPTIONS}
    options |= {"SUM": launch.accumulator(x), "PRECISION": precision(x)}
    block_m, block_n, block_k = (options[f"BLOCK_{letter}"] for letter in "MNK")
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    programs = min(tiles, launch.processors(x.device) * chosen["PROGRAMS"])
    with launch.on_device(x):
        if chosen["TMA"]:
            blocks = ([block_m, block_k], [block_n, block_k], *[[block_m, block_n // 2]] * 3)
            described = [
                t if t is None else TensorDescriptor.from_tensor(t, block)
                for t, block in zip(arrays, blocks, strict=True)
            ]
            _by_descriptors[(programs,)](*described, m, n, k, alpha, beta, FLATTEN=chosen["FLATTEN"], **options)
        else:
            _by_pointers[(programs,)](*arrays, m, n, k, alpha, beta, EVEN_K=k % block_k == 0, **options)
