"""Gather-add: out[e] = x[e] + source_rows[source[e]] + target_rows[target of e], see `ejmp_kernels.edge_embedding`.

A program takes one atom and a block of channels, reads the row of the target once and walks the edges into it: x is
read and out [E, M] written once, 8 E M bytes in float32; rows of sources come from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ejmp_kernels.triton_kernels import launch


@triton.jit
def _gather_add_kernel(
    x_ptr, source_rows, target_rows, source, ptr, out, M, HAS_X: tl.constexpr, ACC: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    first, last = tl.load(ptr + n), tl.load(ptr + n + 1)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    to_all = tl.load(target_rows + n * M + c, c < M, 0.0)[None, :]
    for start in range(first, last, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        ok = (e < last)[:, None] & (c < M)[None, :]
        atom = tl.load(source + e, e < last, 0)
        value = to_all + tl.load(source_rows + atom[:, None] * M + c[None, :], ok, 0.0)
        place = e[:, None] * M + c[None, :]
        if HAS_X:
            value = value + tl.load(x_ptr + place, ok, 0.0).to(ACC)
        tl.store(out + place, value, ok)


@launch.define(
    "gather_add(Tensor? x, Tensor source_rows, Tensor target_rows, Tensor source, Tensor swap, Tensor ptr) -> Tensor"
)
def gather_add(
    x: Tensor | None, source_rows: Tensor, target_rows: Tensor, source: Tensor, swap: Tensor, ptr: Tensor
) -> Tensor:
    """Add to each edge a row of its source and one of its target, [E, M]; rows are in the type of sums."""
    op, rows = "gather_add", source_rows.shape
    launch.check_rows(op, "source_rows", source_rows, 2)
    num_edges = launch.check_rows(op, "source", source, 1)
    real = (torch.float32, torch.float64) if x is None else (launch.sums_dtype(x),)
    integers = (torch.int64,)
    launch.check_arguments(
        op,
        source_rows.device,
        **({} if x is None else {"x": (x, launch.REAL, (num_edges, rows[1]))}),
        source_rows=(source_rows, real, tuple(rows)),
        target_rows=(target_rows, (source_rows.dtype,), tuple(rows)),
        source=(source, integers, (num_edges,)),
        swap=(swap, integers, (num_edges,)),
        ptr=(ptr, integers, (rows[0] + 1,)),
    )
    launch.check_ids(op, "source", source, rows[0])
    launch.check_swap(op, swap)
    launch.check_ptr(op, "ptr", ptr, num_edges)
    out = source_rows.new_empty(num_edges, rows[1], dtype=source_rows.dtype if x is None else x.dtype)
    packed = [t.contiguous() for t in (out if x is None else x, source_rows, target_rows, source, ptr)]
    settings = launch.config("gather_add", out)
    if out.numel():
        with launch.on_device(out):
            grid = (rows[0], triton.cdiv(rows[1], settings["BLOCK_C"]))
            options = {"HAS_X": x is not None, "ACC": launch.accumulator(out)}
            _gather_add_kernel[grid](*packed, out, rows[1], **options, **settings)
    return out
