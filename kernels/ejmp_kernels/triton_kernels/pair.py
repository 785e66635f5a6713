"""Sum over the neighbours of an atom: out[n, r, c] = sum of radial[e, r] h[source[e], c] over edges e into n.

A program takes one atom and a block of r and c: products of radial^T [R, BLOCK_E] and gathered rows of h [BLOCK_E, C].
With G[n] the gradient of out[n], to_radial[e, r] = sum_c h[source[e], c] G[n, r, c] is such a product too, and so are
the rows P[e, c] = sum_r radial[e, r] G[n, r, c], which `edge_sum` adds up by source: to_h without atomics, for E C more
numbers written and read. See `ejmp_kernels.pair`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ejmp_kernels.triton_kernels import launch
from ejmp_kernels.triton_kernels.sums import edge_sum


@triton.jit
def _matrix(ptr, row, width, column, ok_row, ACC: tl.constexpr):
    """Read rows (first axis) and columns (second axis) of a matrix; what is outside is zero."""
    ok = ok_row[:, None] & (column < width)[None, :]
    return tl.load(ptr + row[:, None] * width + column[None, :], ok, 0.0).to(ACC)


@triton.jit
def _pair_kernel(
    h, radial, ptr, source, out, C, R, ACC: tl.constexpr, DOT: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    first, last = tl.load(ptr + n), tl.load(ptr + n + 1)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for start in range(first, last, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        ok = e < last
        values = _matrix(h, tl.load(source + e, ok, 0), C, c, ok, ACC)
        basis = _matrix(radial, e, R, r, ok, ACC)
        sums = tl.dot(tl.trans(basis), values, sums, input_precision=DOT, out_dtype=ACC)
    tl.store(out + (n * R + r[:, None]) * C + c[None, :], sums, (r < R)[:, None] & (c < C)[None, :])


@triton.jit
def _backward_kernel(
    grad, h, radial, ptr, source, by_edge, to_radial, C, R, ACC: tl.constexpr, DOT: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    first, last = tl.load(ptr + n), tl.load(ptr + n + 1)
    g_ptr = grad + n * R * C
    for start in range(first + tl.program_id(1) * BLOCK_E, last, SPLIT * BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        ok = e < last
        atom = tl.load(source + e, ok, 0)
        for r_start in range(0, R, BLOCK_R):
            r = r_start + tl.arange(0, BLOCK_R)
            sums = tl.zeros((BLOCK_E, BLOCK_R), ACC)
            for c_start in range(0, C, BLOCK_C):
                c = c_start + tl.arange(0, BLOCK_C)
                g = _matrix(g_ptr, r, C, c, r < R, ACC)
                sums = tl.dot(_matrix(h, atom, C, c, ok, ACC), tl.trans(g), sums, input_precision=DOT, out_dtype=ACC)
            tl.store(to_radial + e[:, None] * R + r[None, :], sums, ok[:, None] & (r < R)[None, :])
        for c_start in range(0, C, BLOCK_C):
            c = c_start + tl.arange(0, BLOCK_C)
            rows = tl.zeros((BLOCK_E, BLOCK_C), ACC)
            for r_start in range(0, R, BLOCK_R):
                r = r_start + tl.arange(0, BLOCK_R)
                g = _matrix(g_ptr, r, C, c, r < R, ACC)
                rows = tl.dot(_matrix(radial, e, R, r, ok, ACC), g, rows, input_precision=DOT, out_dtype=ACC)
            tl.store(by_edge + e[:, None] * C + c[None, :], rows, ok[:, None] & (c < C)[None, :])


def _prepare(op: str, *tensors: Tensor) -> tuple[list[Tensor], dict]:
    """Check the arguments; return them contiguous, and the options and settings of a launch."""
    h, radial, ptr, source = tensors
    num_atoms, num_edges = launch.check_rows(op, "h", h, 2), launch.check_rows(op, "radial", radial, 2)
    integers = (torch.int64,)
    launch.check_arguments(
        op,
        h.device,
        h=(h, launch.REAL, tuple(h.shape)),
        radial=(radial, (launch.sums_dtype(h),), tuple(radial.shape)),
        ptr=(ptr, integers, (num_atoms + 1,)),
        source=(source, integers, (num_edges,)),
    )
    launch.check_ptr(op, "ptr", ptr, num_edges)
    launch.check_ids(op, "source", source, num_atoms)
    options = launch.config(op, h) | {"ACC": launch.accumulator(h), "DOT": launch.dot_precision(h)}
    options["BLOCK_R"] = min(options["BLOCK_R"], launch.power_of_2(radial.shape[1], 16))
    options["BLOCK_C"] = min(options["BLOCK_C"], launch.power_of_2(h.shape[1], 16))
    return [t.contiguous() for t in tensors], options


@launch.define("pair(Tensor h, Tensor radial, Tensor ptr, Tensor source) -> Tensor")
def pair(h: Tensor, radial: Tensor, ptr: Tensor, source: Tensor) -> Tensor:
    """Sum neighbours of each atom times their radial basis, [N, R * C]."""
    tensors, options = _prepare("pair", h, radial, ptr, source)
    (num_atoms, channels), num_radial = h.shape, radial.shape[1]
    out = h.new_empty(num_atoms, num_radial * channels)
    if out.numel():
        with launch.on_device(h):
            blocks = triton.cdiv(num_radial, options["BLOCK_R"]), triton.cdiv(channels, options["BLOCK_C"])
            _pair_kernel[(num_atoms, *blocks)](*tensors, out, channels, num_radial, **options)
    return out


@launch.define("pair_backward(Tensor grad, Tensor h, Tensor radial, Tensor ptr, Tensor source) -> (Tensor, Tensor)")
def pair_backward(grad: Tensor, h: Tensor, radial: Tensor, ptr: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of h and radial."""
    tensors, options = _prepare("pair_backward", h, radial, ptr, source)
    (num_atoms, channels), (num_edges, num_radial) = h.shape, radial.shape
    launch.check_arguments("pair_backward", h.device, grad=(grad, (h.dtype,), (num_atoms, num_radial * channels)))
    to_radial = radial.new_empty(num_edges, num_radial)
    by_edge = radial.new_empty(num_edges, channels)
    if num_atoms and num_edges:
        with launch.on_device(h):
            grid = (num_atoms, options["SPLIT"])
            _backward_kernel[grid](grad.contiguous(), *tensors, by_edge, to_radial, channels, num_radial, **options)
    source_ptr, order = launch.by_source(source, num_atoms)
    return edge_sum(by_edge, order, source_ptr).to(h.dtype), to_radial
