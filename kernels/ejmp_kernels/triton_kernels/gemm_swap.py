"""Messages up-projected to edges and counter-edges and added, without the product in memory.

out[e, c] = alpha (silu(z[e, c]) + silu(z[swap[e], M + c])) + add[e, c],  z[e, j] = sum_k x[e, k] weight[j, k]

x [E, k], weight [2 M, k], add [E, M] or absent, out [E, M], all of one type; sums and what follows are in float32,
rounded once. A program makes one tile of out by two products, one of the rows of its edges and one of those of their
counter-edges, which it gathers: k is small, so that x stays in the L2 cache. 4 E M k FLOP; 2 E M numbers are read and
written beside x and weight, where a product and `swap_add` after it move 6 E M.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ejmp_kernels.triton_kernels import gemm, launch
from ejmp_kernels.triton_kernels.gemm_kernels import silu


@triton.jit
def _rows_product(x, row, exists, weight, column, n, k, SUM: tl.constexpr, PRECISION: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Return the product of some rows of x with some rows of a weight, zero for rows that do not exist."""
    z = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    for start in tl.range(0, k, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + row[:, None] * k + inner[None, :], exists[:, None] & (inner < k)[None, :], 0.0)
        b = tl.load(weight + column[None, :] * k + inner[:, None], (column < n)[None, :] & (inner < k)[:, None], 0.0)
        z = tl.dot(a, b, z, input_precision=PRECISION, out_dtype=SUM)
    return z


@triton.jit(do_not_specialize=["m"])  # one kernel for every number of edges
def _kernel(
    x, weight, swap, add, out, m, n, k, alpha: tl.float64,
    SUM: tl.constexpr, PRECISION: tl.constexpr, APPROXIMATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(n, BLOCK_N)
    row = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < m
    z = _rows_product(x, row, exists, weight, column, n, k, SUM, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    value = silu(z, alpha, APPROXIMATE)
    counter = tl.load(swap + row, exists, 0)
    z = _rows_product(x, counter, exists, weight + n * k, column, n, k, SUM, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    value += silu(z, alpha, APPROXIMATE)
    at, inside = row[:, None] * n + column[None, :], exists[:, None] & (column < n)[None, :]
    if add is not None:
        value += tl.load(add + at, inside, 0.0).to(SUM)
    tl.store(out + at, value, inside)


@launch.define("linear_swap_add(Tensor x, Tensor weight, Tensor swap, Tensor? add, float alpha) -> Tensor")
def linear_swap_add(x: Tensor, weight: Tensor, swap: Tensor, add: Tensor | None, alpha: float) -> Tensor:
    """Return alpha (silu(z[e, 0]) + silu(z[swap[e], 1])) + add[e] of z = x weight^T; it has no derivative."""
    op = "linear_swap_add"
    launch.check_rows(op, "x", x, 2)
    launch.check_rows(op, "weight", weight, 2)
    (m, k), (both, _), like = x.shape, weight.shape, (x.dtype,)
    if both % 2:
        raise ValueError(f"{op}: weight must have an even number of rows, got shape {list(weight.shape)}")
    given = {} if add is None else {"add": (add, like, (m, both // 2))}
    launch.check_arguments(
        op,
        x.device,
        x=(x, launch.REAL, (m, k)),
        weight=(weight, like, (both, k)),
        swap=(swap, (torch.int64,), (m,)),
        **given,
    )
    launch.check_swap(op, swap)
    if not gemm.fuses(x):
        return torch.ops.ejmp_triton.swap_add(torch.nn.functional.linear(x, weight), swap, add, alpha)
    out = x.new_empty(m, both // 2)
    if out.numel():
        settings = launch.config(op, x)
        grid = (triton.cdiv(m, settings["BLOCK_M"]) * triton.cdiv(both // 2, settings["BLOCK_N"]),)
        arrays = [t if t is None else t.contiguous() for t in (x, weight, swap, add)]
        options = {"SUM": launch.accumulator(x), "PRECISION": gemm.precision(x)}
        with launch.on_device(x):
            _kernel[grid](*arrays, out, m, both // 2, k, float(alpha), **options, **settings)
    return out
