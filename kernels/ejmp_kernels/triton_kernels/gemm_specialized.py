"""A second kernel for the products of `gemm`, for sm_90, in which warps have different tasks: written in Gluon.

In the first kernel the tensor cores wait while a tile goes through its epilogue. Here eight warps load tiles of x and
weight into a ring of STAGES buffers, multiply them and put the product of a tile into shared memory, and four others
take it from there through the epilogue, while the next tile is multiplied. Both groups go through the same tiles. They
wait for each other at barriers in shared memory, which have two phases: `full` says that a buffer has been written,
`empty` that it has been read. A wait for the phase before the first passes at once.

What it costs: the product is rounded to the type of x between the two, as it is where product and epilogue are two
kernels. It has no filters that are products, and no rows of atoms.
"""

from collections.abc import Callable

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ejmp_kernels.triton_kernels.gemm_kernels import origin, sigmoid

PART: gl.constexpr = gl.constexpr(32)
"""Columns that go through the epilogue at a time."""


def described(block: list[int]) -> Callable[[Tensor], TensorDescriptor]:
    """Return what describes an array of 16-bit numbers that is loaded in blocks."""
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return lambda x: TensorDescriptor.from_tensor(x, block, layout)


@gluon.jit
def _request(
    step, wanted, x, weight, a, b, full, m, n, k,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Have a step's tiles of x and weight loaded, if it is wanted and exists; what lies past an end comes as zeros."""
    steps = gl.cdiv(k, BLOCK_K)
    tile = gl.program_id(0) + step // steps * gl.num_programs(0)
    wanted = wanted & (tile < gl.cdiv(m, BLOCK_M) * gl.cdiv(n, BLOCK_N))
    row, column = origin(tile, m, n, BLOCK_M, BLOCK_N, GROUP_M)
    stage, start = step % STAGES, step % steps * BLOCK_K
    mbarrier.expect(full.index(stage), (BLOCK_M + BLOCK_N) * BLOCK_K * x.dtype.primitive_bitwidth // 8, pred=wanted)
    tma.async_copy_global_to_shared(x, [row, start], full.index(stage), a.index(stage), pred=wanted)
    tma.async_copy_global_to_shared(weight, [column, start], full.index(stage), b.index(stage), pred=wanted)


@gluon.jit
def _multiply(
    x, weight, a, b, full, product, product_full, product_empty, m, n, k,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load and multiply, and put the product of each tile where the epilogue finds it.

    One product of the tensor cores is always under way. When it is issued, the one before it is done, and its buffers
    are free for the step that comes STAGES after it.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_N, 16])
    tiles = gl.cdiv(m, BLOCK_M) * gl.cdiv(n, BLOCK_N)
    for step in gl.static_range(STAGES):
        _request(step, True, x, weight, a, b, full, m, n, k, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES)
    step, count = 0, 0
    z = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout)
    for _tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for start in range(0, k, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            issued = warpgroup_mma(a.index(stage), b.index(stage).permute((1, 0)), z, use_acc=start > 0, is_async=True)
            z = warpgroup_mma_wait(1, deps=[issued])
            _request(
                step + STAGES - 1, start > 0, x, weight, a, b, full, m, n, k, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES
            )
            step += 1
        z = warpgroup_mma_wait(0, deps=[z])
        _request(step + STAGES - 1, True, x, weight, a, b, full, m, n, k, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES)
        mbarrier.wait(product_empty, count & 1 ^ 1)
        product.store(z.to(product.dtype))
        mbarrier.arrive(product_full)
        count += 1  # noqa: SIM113 - Triton has no enumerate


@gluon.jit
def _finish(
    factor, add, more, out, product, product_full, product_empty, m, n, alpha, beta, gamma,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, APPROXIMATE: gl.constexpr,
):  # fmt: skip
    """Take products through the epilogue, PART columns at a time."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PART, PART // 8], [4, 1], [1, 0])
    tiles = gl.cdiv(m, BLOCK_M) * gl.cdiv(n, BLOCK_N)
    count = 0
    i = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))[:, None]
    j = gl.arange(0, PART, layout=gl.SliceLayout(0, layout))[None, :]
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = origin(tile, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        mbarrier.wait(product_full, count & 1)
        for first in gl.static_range(0, BLOCK_N, PART):
            inside = (i < m - row) & (j < n - column - first)
            at = row.to(gl.int64) * n + column + first + (i * n + j)
            z = product.slice(first, PART, dim=1).load(layout).to(gl.float32)
            z = alpha * z * sigmoid(z, APPROXIMATE)
            if first + PART == BLOCK_N:
                mbarrier.arrive(product_empty)
            if factor is not None:
                z *= gl.load(factor + at, mask=inside, other=0.0).to(gl.float32)
            if add is not None:
                z += beta * gl.load(add + at, mask=inside, other=0.0).to(gl.float32)
            if more is not None:
                z += gamma * gl.load(more + at, mask=inside, other=0.0).to(gl.float32)
            gl.store(out + at, z.to(out.dtype.element_ty), mask=inside)
        count += 1  # noqa: SIM113 - Triton has no enumerate


@gluon.jit(do_not_specialize=["m"])  # one kernel for every number of edges
def specialized(
    x, weight, factor, add, more, out, m, n, k, alpha, beta, gamma,
    APPROXIMATE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Write alpha silu(x weight^T) factor + beta add + gamma more; x and weight are descriptors. It has 8 warps."""
    a = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    b = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_N, BLOCK_K], weight.layout)
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    product = gl.allocate_shared_memory(x.dtype, [BLOCK_M, BLOCK_N], shared)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    product_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    product_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    mbarrier.init(product_full, count=1)
    mbarrier.init(product_empty, count=1)
    gl.warp_specialize(
        [
            (_multiply, (x, weight, a, b, full, product, product_full, product_empty, m, n, k,
                         BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES)),
            (_finish, (factor, add, more, out, product, product_full, product_empty, m, n, alpha, beta, gamma,
                       BLOCK_M, BLOCK_N, GROUP_M, APPROXIMATE)),
        ],
        [4],
        [136],
    )  # fmt: skip
