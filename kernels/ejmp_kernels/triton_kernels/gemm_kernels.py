"""The kernels of `gemm`: a product, and everything that follows it before anything is written, by persistent programs.

As many programs run as fit on the GPU at once, and each takes every so many-th tile of out; tiles follow each other in
groups of GROUP_M rows, so that their rows of x and weight are still in the L2 cache. There are two kernels: one loads
by pointers (asynchronous copies from sm_80 on), one by the tensor memory accelerator of sm_90, which wants rows of a
multiple of 16 bytes. What is None in a launch is not in its code.
"""

import triton
import triton.language as tl


@triton.jit
def origin(tile, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return the first row and column of a tile: down the rows of a group, then to its next column."""
    rows, columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    group = tile // (GROUP_M * columns)
    within = tile % (GROUP_M * columns)
    height = tl.minimum(rows - group * GROUP_M, GROUP_M)
    return (group * GROUP_M + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def _halves(z):
    M: tl.constexpr = z.shape[0]
    N: tl.constexpr = z.shape[1]
    return tl.split(tl.permute(tl.reshape(z, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _part(z, part: tl.constexpr, PARTS: tl.constexpr):
    """Return the columns of one of 2 or 4 parts of a tile: an epilogue on parts needs less memory and registers."""
    left, right = _halves(z)
    if PARTS == 2:
        found = left if part == 0 else right
    else:
        first, second = _halves(left if part < 2 else right)
        found = first if part % 2 == 0 else second
    return found


@triton.jit
def sigmoid(z, APPROXIMATE: tl.constexpr):
    """Return 1 / (1 + e^-z).

    Approximately, 1 / (1 + 2^(-z / ln 2)) is two instructions of the special-function unit as they are, 2^-22 and one
    unit in the last place off (PTX ISA, ex2.approx.ftz and rcp.approx.ftz); otherwise each is fenced by scalings for
    denormal numbers, which a sum with 1 does not contain.
    """
    if APPROXIMATE:
        power: tl.constexpr = "ex2.approx.ftz.f32 $0, $1;"
        reciprocal: tl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
        below = tl.inline_asm_elementwise(power, "=f,f", [z * -1.4426950408889634], tl.float32, is_pure=True, pack=1)
        found = tl.inline_asm_elementwise(reciprocal, "=f,f", [1.0 + below], tl.float32, is_pure=True, pack=1)
    else:
        found = tl.sigmoid(z)
    return found


@triton.jit
def silu(z, alpha, APPROXIMATE: tl.constexpr):
    """Return alpha z sigmoid(z); alpha comes in float64 and is rounded to the type of z."""
    return tl.full((1, 1), alpha, z.dtype) * z * sigmoid(z, APPROXIMATE)


@triton.jit
def _read(array, row, column, at, inside, BY_DESCRIPTORS: tl.constexpr):
    if BY_DESCRIPTORS:
        tile = array.load([row, column])
    else:
        tile = tl.load(array + at, mask=inside)
    return tile


@triton.jit
def _rows_of_atoms(rows, atom, row, column, m, n, M: tl.constexpr, N: tl.constexpr):
    """Read, for the edges of a part of a tile, the rows of atoms [N, n] that they name."""
    i, j = tl.arange(0, M), column + tl.arange(0, N)[None, :]
    number = tl.load(atom + row + i, mask=i < m - row, other=0)
    return tl.load(rows + number[:, None] * n + j, mask=j < n)


@triton.jit
def _filter(basis, weight, row, column, m, n, r, SUM: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
            BLOCK_R: tl.constexpr, PRECISION: tl.constexpr, BY_DESCRIPTORS: tl.constexpr):  # fmt: skip
    """Return a part of a tile of basis weight^T, [m, r] x [n, r], where r is so small that it is one step."""
    if BY_DESCRIPTORS:
        a, b = basis.load([row, 0]), weight.load([column, 0]).T
    else:
        i, j, inner = row + tl.arange(0, M), column + tl.arange(0, N), tl.arange(0, BLOCK_R)
        at = i.to(tl.int64)[:, None] * r + inner[None, :]
        a = tl.load(basis + at, mask=(i < m)[:, None] & (inner < r)[None, :], other=0.0)
        b = tl.load(weight + j[None, :] * r + inner[:, None], mask=(j < n)[None, :] & (inner < r)[:, None], other=0.0)
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=SUM)


@triton.jit
def _finish(
    z, source_rows, source, target_rows, target, factor, basis, filter_weight, add, more, out,
    row, column, m, n, r, alpha, beta, gamma,
    BLOCK_R: tl.constexpr, FILTER_SUM: tl.constexpr, PRECISION: tl.constexpr, APPROXIMATE: tl.constexpr,
    BY_DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Take a part of a tile through the epilogue and store it."""
    M: tl.constexpr = z.shape[0]
    N: tl.constexpr = z.shape[1]
    i, j = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    inside = (i < m - row) & (j < n - column)
    at = row.to(tl.int64) * n + column + (i * n + j)
    if source is not None:
        z += _rows_of_atoms(source_rows, source, row, column, m, n, M, N)
        z += _rows_of_atoms(target_rows, target, row, column, m, n, M, N)
    z = silu(z, alpha, APPROXIMATE)
    if factor is not None:
        z *= _read(factor, row, column, at, inside, BY_DESCRIPTORS).to(z.dtype)
    if basis is not None and not FILTER_SUM:
        z *= _filter(basis, filter_weight, row, column, m, n, r, z.dtype, M, N, BLOCK_R, PRECISION, BY_DESCRIPTORS)
    if add is not None:
        z += tl.full((1, 1), beta, z.dtype) * _read(add, row, column, at, inside, BY_DESCRIPTORS).to(z.dtype)
    if more is not None:
        z += tl.full((1, 1), gamma, z.dtype) * _read(more, row, column, at, inside, BY_DESCRIPTORS).to(z.dtype)
    if basis is not None and FILTER_SUM:
        z *= _filter(basis, filter_weight, row, column, m, n, r, z.dtype, M, N, BLOCK_R, PRECISION, BY_DESCRIPTORS)
    if BY_DESCRIPTORS:
        out.store([row, column], z.to(out.dtype))
    else:
        tl.store(out + at, z.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["m"])  # one kernel for every number of edges
def by_pointers(
    x, weight, factor, basis, filter_weight, add, more, out, source_rows, source, target_rows, target,
    m, n, k, r, alpha: tl.float64, beta: tl.float64, gamma: tl.float64,
    SUM: tl.constexpr, PRECISION: tl.constexpr, APPROXIMATE: tl.constexpr, FILTER_SUM: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Write alpha silu(x weight^T + rows) factor filter + beta add + gamma more; see `gemm`."""
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        first_row, first_column = origin(tile, m, n, BLOCK_M, BLOCK_N, GROUP_M)
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
        for part in tl.static_range(PARTS):
            _finish(
                _part(z, part, PARTS), source_rows, source, target_rows, target, factor, basis, filter_weight, add,
                more, out, first_row, first_column + part * (BLOCK_N // PARTS), m, n, r, alpha, beta, gamma,
                BLOCK_R, FILTER_SUM, PRECISION, APPROXIMATE, False,
            )  # fmt: skip


@triton.jit(do_not_specialize=["m"])  # one kernel for every number of edges
def by_descriptors(
    x, weight, factor, basis, filter_weight, add, more, out, source_rows, source, target_rows, target,
    m, n, k, r, alpha: tl.float64, beta: tl.float64, gamma: tl.float64,
    SUM: tl.constexpr, PRECISION: tl.constexpr, APPROXIMATE: tl.constexpr, FILTER_SUM: tl.constexpr,
    BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Write what `by_pointers` does; all but the rows of atoms are descriptors of arrays."""
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = origin(tile, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        z = tl.zeros((BLOCK_M, BLOCK_N), SUM)
        for start in tl.range(0, k, BLOCK_K):
            # what lies past an end comes as zeros
            a, b = x.load([row, start]), weight.load([column, start])
            z = tl.dot(a, b.T, z, input_precision=PRECISION, out_dtype=SUM)
        for part in tl.static_range(PARTS):
            _finish(
                _part(z, part, PARTS), source_rows, source, target_rows, target, factor, basis, filter_weight, add,
                more, out, row, column + part * (BLOCK_N // PARTS), m, n, r, alpha, beta, gamma,
                BLOCK_R, FILTER_SUM, PRECISION, APPROXIMATE, True,
            )  # fmt: skip
