"""Sums of edges into atoms: out[n, c] = sum of x[e, c] factor[e, c] over the edges e into n, without atomics.

A program takes one atom and a block of channels, walks the atom's CSR rows, through `order` if there is one, and keeps
one sum per lane, so that the result is the same every run. x [E, M] and factor are read once, out [N, M] is written
once in the type of sums: 8 E M + 4 N M bytes in float32. A factor that is a product of a narrow basis [E, R] is made on
the way, 2 E M R FLOP, and not read. The gradients are elementwise, a row of grad for all edges of an atom. See
`ejmp_kernels.sums`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ejmp_kernels.triton_kernels import launch


@triton.jit
def _sum_kernel(
    x_ptr, factor, order, ptr, out, M, HAS_FACTOR: tl.constexpr, HAS_ORDER: tl.constexpr, ACC: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    first, last = tl.load(ptr + n), tl.load(ptr + n + 1)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_E, BLOCK_C), ACC)
    for start in range(first, last, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        exists = e < last
        ok = exists[:, None] & (c < M)[None, :]
        row = tl.load(order + e, exists, 0) if HAS_ORDER else e
        value = tl.load(x_ptr + row[:, None] * M + c[None, :], ok, 0.0).to(ACC)
        if HAS_FACTOR:
            value = value * tl.load(factor + row[:, None] * M + c[None, :], ok, 0.0).to(ACC)
        sums += value
    tl.store(out + n * M + c, tl.sum(sums, 0), c < M)


@triton.jit
def _filtered_kernel(
    x_ptr, basis, weight, ptr, out, M, R, ACC: tl.constexpr, DOT: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sum with factors that are made here, basis weight^T, whose columns of a block of channels stay in registers."""
    n = tl.program_id(0).to(tl.int64)
    first, last = tl.load(ptr + n), tl.load(ptr + n + 1)
    c, r = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    w = tl.load(weight + c[None, :] * R + r[:, None], (r < R)[:, None] & (c < M)[None, :], 0.0)
    sums = tl.zeros((BLOCK_E, BLOCK_C), ACC)
    for start in range(first, last, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        exists = e < last
        b = tl.load(basis + e[:, None] * R + r[None, :], exists[:, None] & (r < R)[None, :], 0.0)
        factor = tl.dot(b, w, input_precision=DOT, out_dtype=ACC)
        sums += factor * tl.load(x_ptr + e[:, None] * M + c[None, :], exists[:, None] & (c < M)[None, :], 0.0).to(ACC)
    tl.store(out + n * M + c, tl.sum(sums, 0), c < M)


@triton.jit
def _backward_kernel(
    grad, m_ptr, factor, ptr, to_m, to_factor, M, ACC: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    first, last = tl.load(ptr + n), tl.load(ptr + n + 1)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    g = tl.load(grad + n * M + c, c < M, 0.0)[None, :]
    for start in range(first, last, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        ok = (e < last)[:, None] & (c < M)[None, :]
        place = e[:, None] * M + c[None, :]
        tl.store(to_m + place, g * tl.load(factor + place, ok, 0.0).to(ACC), ok)
        tl.store(to_factor + place, g * tl.load(m_ptr + place, ok, 0.0).to(ACC), ok)


def _sum(x: Tensor, factor: Tensor | None, order: Tensor | None, ptr: Tensor) -> Tensor:
    x, ptr = x.contiguous(), ptr.contiguous()
    num_atoms, width = ptr.shape[0] - 1, x.shape[1]
    out = x.new_empty(num_atoms, width, dtype=launch.sums_dtype(x))
    settings = launch.config("edge_sum", x)
    options = {"HAS_FACTOR": factor is not None, "HAS_ORDER": order is not None, "ACC": launch.accumulator(x)}
    tensors = (x, x if factor is None else factor.contiguous(), ptr if order is None else order.contiguous(), ptr, out)
    if out.numel():
        with launch.on_device(x):
            grid = (num_atoms, triton.cdiv(width, settings["BLOCK_C"]))
            _sum_kernel[grid](*tensors, width, **options, **settings)
    return out


def _check_rows(op: str, name: str, x: Tensor, ptr: Tensor, order: Tensor | None = None) -> None:
    """Check rows of edges, CSR pointers, and an order of the rows."""
    num_edges, num_ptr = launch.check_rows(op, name, x, 2), launch.check_rows(op, "ptr", ptr, 1)
    integers = (torch.int64,)
    if num_ptr == 0:
        raise ValueError(f"{op}: ptr must be [N + 1], got an empty one")
    launch.check_arguments(op, x.device, **{name: (x, launch.REAL, tuple(x.shape))}, ptr=(ptr, integers, (num_ptr,)))
    launch.check_ptr(op, "ptr", ptr, num_edges)
    if order is None:
        return
    launch.check_arguments(op, x.device, order=(order, integers, (num_edges,)))
    launch.check_ids(op, "order", order, num_edges)
    if not order.is_cuda and len(order.unique()) != num_edges:
        raise ValueError(f"{op}: order must name every row once")


@launch.define("edge_sum(Tensor x, Tensor? order, Tensor ptr) -> Tensor")
def edge_sum(x: Tensor, order: Tensor | None, ptr: Tensor) -> Tensor:
    """Sum rows order[e] of x over the places e of each atom, [E, M] -> [N, M]."""
    _check_rows("edge_sum", "x", x, ptr, order)
    return _sum(x, None, order, ptr)


@launch.define("atom_sum(Tensor m, Tensor factor, Tensor ptr) -> Tensor")
def atom_sum(m: Tensor, factor: Tensor, ptr: Tensor) -> Tensor:
    """Sum edges times their factor into atoms, [E, M] -> [N, M]."""
    _check_rows("atom_sum", "m", m, ptr)
    launch.check_arguments("atom_sum", m.device, factor=(factor, (m.dtype,), tuple(m.shape)))
    return _sum(m, factor, None, ptr)


@launch.define("atom_sum_filtered(Tensor m, Tensor basis, Tensor filter, Tensor ptr) -> Tensor")
def atom_sum_filtered(m: Tensor, basis: Tensor, filter: Tensor, ptr: Tensor) -> Tensor:  # noqa: A002
    """Sum edges times basis filter^T into atoms, [E, M], [E, R], [M, R] -> [N, M]; it has no derivative."""
    op = "atom_sum_filtered"
    _check_rows(op, "m", m, ptr)
    launch.check_rows(op, "basis", basis, 2)
    width, like = basis.shape[1], (m.dtype,)
    if not 0 < width <= launch.MOST_BASIS:
        raise ValueError(f"{op}: basis must have 1..{launch.MOST_BASIS} columns, got {width}")
    launch.check_arguments(
        op, m.device, basis=(basis, like, (m.shape[0], width)), filter=(filter, like, (m.shape[1], width))
    )
    num_atoms, channels = ptr.shape[0] - 1, m.shape[1]
    out = m.new_empty(num_atoms, channels, dtype=launch.sums_dtype(m))
    settings = launch.config(op, m)
    options = {"ACC": launch.accumulator(m), "DOT": launch.dot_precision(m), "BLOCK_R": launch.power_of_2(width, 16)}
    if out.numel():
        with launch.on_device(m):
            grid = (num_atoms, triton.cdiv(channels, settings["BLOCK_C"]))
            arrays = launch.packed((m, basis, filter, ptr))
            _filtered_kernel[grid](*arrays, out, channels, width, **options, **settings)
    return out


@launch.define("atom_sum_backward(Tensor grad, Tensor m, Tensor factor, Tensor ptr) -> (Tensor, Tensor)")
def atom_sum_backward(grad: Tensor, m: Tensor, factor: Tensor, ptr: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of m and factor."""
    _check_rows("atom_sum_backward", "m", m, ptr)
    num_atoms, width = ptr.shape[0] - 1, m.shape[1]
    launch.check_arguments(
        "atom_sum_backward",
        m.device,
        factor=(factor, (m.dtype,), tuple(m.shape)),
        grad=(grad, (launch.sums_dtype(m),), (num_atoms, width)),
    )
    to_m, to_factor = m.new_empty(m.shape), m.new_empty(m.shape)
    settings = launch.config("edge_sum", m)
    tensors = (*(t.contiguous() for t in (grad, m, factor, ptr)), to_m, to_factor)
    if m.numel():
        with launch.on_device(m):
            grid = (num_atoms, triton.cdiv(width, settings["BLOCK_C"]))
            _backward_kernel[grid](*tensors, width, ACC=launch.accumulator(m), **settings)
    return to_m, to_factor
