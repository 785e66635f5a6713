"""Triplets: out[e, a, c] = sum_l weight[e, a, l] sum_k Y_l(v_out[e] . v_in[k]) x[k, c], see `ejmp_kernels.triplet`.

A program takes one atom. For BLOCK_E edges e into it and BLOCK_K edges k into it, the scores Y_l are one tile with rows
r = (e, l) and columns k; scores x is one matrix product, and the contraction with the weights another, with a
block-diagonal matrix W[g, r], g = (e, a). With to_atoms, g = a and W is full: the same product sums over edges.

With H = W^T G for a gradient G of out, and D = H x^T:
to_weight = blocks of G (scores x)^T, to_x = scores^T H, and the gradient by the cosine of e and k is sum_l Y'_l D.
The gradient of the gradient is its derivative along given directions (suffix _u): cos_u = v_u . v + v . v_u, Y_u = Y'
cos_u, and products by the product rule. Reads and writes each array about once: see `ejmp_kernels.triplet`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ejmp_kernels.triton_kernels import launch
from ejmp_kernels.triton_kernels.angles import (
    edge_rows,
    legendre,
    outer_dot,
    over_degrees,
    read3,
    read_rows,
    write3,
    write_rows,
)


@triton.jit
def _slots(n, first, last, BLOCK_E: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, TO_ATOMS: tl.constexpr):
    """Return the edge, the embedding and the output row of slots g, and whether they exist."""
    g = tl.arange(0, AP if TO_ATOMS else BLOCK_E * AP)
    edge, a = first + g // AP, g % AP
    row = n * A + a if TO_ATOMS else edge * A + a
    return edge, a, row, (a < A) & (edge < last)


@triton.jit
def _weights(w_ptr, edge, a, ok, e, l, ok_e, A: tl.constexpr, S: tl.constexpr, TO_ATOMS: tl.constexpr):
    """Return the addresses of W[g, r] and which of them exist."""
    exists = ok[:, None] & (ok_e & (l < S))[None, :]
    if not TO_ATOMS:
        exists = exists & (edge[:, None] == e[None, :])
    return w_ptr + (e[None, :] * A + a[:, None]) * S + l[None, :], exists


@triton.jit
def _valid(e, ok_e, k, ok_k, e_source, e_image, k_source, k_image):
    """Return which pairs are a triplet: both edges exist, and do not come from the same image of one atom."""
    source, image = tl.load(e_source + e, ok_e, 0), tl.load(e_image + e, ok_e, 0)
    other, other_image = tl.load(k_source + k, ok_k, 0), tl.load(k_image + k, ok_k, 0)
    same = (source[:, None] == other[None, :]) & (image[:, None] == other_image[None, :])
    return ok_e[:, None] & ok_k[None, :] & ~same


@triton.jit
def _triplet_kernel(
    x_ptr, w_ptr, v_out, v_in, out_ptr, out_source, out_image, in_ptr, in_source, in_image, result,
    C: tl.constexpr, CP: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
    TO_ATOMS: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    first, last = tl.load(out_ptr + n), tl.load(out_ptr + n + 1)
    k_first, k_last = tl.load(in_ptr + n), tl.load(in_ptr + n + 1)
    atoms = tl.zeros((AP if TO_ATOMS else 16, CP), ACC)
    for e0 in range(first + tl.program_id(1) * BLOCK_E, last, SPLIT * BLOCK_E):
        e, l, ok = edge_rows(e0, last, BLOCK_E, L)
        ex, ey, ez = read3(v_out, e, ok)
        summed = tl.zeros((BLOCK_E * L, CP), ACC)
        for k0 in range(k_first, k_last, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            ok_k = k < k_last
            kx, ky, kz = read3(v_in, k, ok_k)
            y = legendre(outer_dot(ex, ey, ez, kx, ky, kz), l[:, None], S, 0)
            y = tl.where(_valid(e, ok, k, ok_k, out_source, out_image, in_source, in_image), y, 0.0)
            summed = tl.dot(y, read_rows(x_ptr, k, ok_k, C, CP, ACC), summed, input_precision=DOT, out_dtype=ACC)
        edge, a, row, ok_g = _slots(n, e0, last, BLOCK_E, A, AP, TO_ATOMS)
        places, exists = _weights(w_ptr, edge, a, ok_g, e, l, ok, A, S, TO_ATOMS)
        w = tl.load(places, exists, 0.0).to(ACC)
        if TO_ATOMS:
            atoms = tl.dot(w, summed, atoms, input_precision=DOT, out_dtype=ACC)
        else:
            write_rows(result, row, ok_g, tl.dot(w, summed, input_precision=DOT, out_dtype=ACC), C, CP)
    if TO_ATOMS:
        a = tl.arange(0, AP)
        write_rows(result, n * A + a, a < A, atoms, C, CP)


@triton.jit
def _by_output_kernel(
    u_x, u_w, u_out, u_in, grad, x_ptr, w_ptr, v_out, v_in,
    out_ptr, out_source, out_image, in_ptr, in_source, in_image, to_grad, to_w, to_v,
    C: tl.constexpr, CP: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
    TO_ATOMS: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, DOUBLE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write the gradients of weights and output edges' vectors; with DOUBLE their derivatives, and to_grad."""
    n = tl.program_id(0).to(tl.int64)
    first, last = tl.load(out_ptr + n), tl.load(out_ptr + n + 1)
    k_first, k_last = tl.load(in_ptr + n), tl.load(in_ptr + n + 1)
    atoms = tl.zeros((AP if TO_ATOMS else 16, CP), ACC)
    for e0 in range(first + tl.program_id(1) * BLOCK_E, last, SPLIT * BLOCK_E):
        e, l, ok = edge_rows(e0, last, BLOCK_E, L)
        edge, a, row, ok_g = _slots(n, e0, last, BLOCK_E, A, AP, TO_ATOMS)
        places, exists = _weights(w_ptr, edge, a, ok_g, e, l, ok, A, S, TO_ATOMS)
        w = tl.load(places, exists, 0.0).to(ACC)
        g = read_rows(grad, row, ok_g, C, CP, ACC)
        h = tl.dot(tl.trans(w), g, input_precision=DOT, out_dtype=ACC)
        ex, ey, ez = read3(v_out, e, ok)
        summed = tl.zeros((BLOCK_E * L, CP), ACC)
        tx, ty, tz = tl.zeros((BLOCK_E * L,), ACC), tl.zeros((BLOCK_E * L,), ACC), tl.zeros((BLOCK_E * L,), ACC)
        if DOUBLE:
            w_u = tl.load(_weights(u_w, edge, a, ok_g, e, l, ok, A, S, TO_ATOMS)[0], exists, 0.0).to(ACC)
            h_u = tl.dot(tl.trans(w_u), g, input_precision=DOT, out_dtype=ACC)
            ex_u, ey_u, ez_u = read3(u_out, e, ok)
            summed_u = tl.zeros((BLOCK_E * L, CP), ACC)
        for k0 in range(k_first, k_last, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            ok_k = k < k_last
            valid = _valid(e, ok, k, ok_k, out_source, out_image, in_source, in_image)
            kx, ky, kz = read3(v_in, k, ok_k)
            x = read_rows(x_ptr, k, ok_k, C, CP, ACC)
            cosine = outer_dot(ex, ey, ez, kx, ky, kz)
            y = tl.where(valid, legendre(cosine, l[:, None], S, 0), 0.0)
            slope = tl.where(valid, legendre(cosine, l[:, None], S, 1), 0.0)
            summed = tl.dot(y, x, summed, input_precision=DOT, out_dtype=ACC)
            d = tl.dot(h, tl.trans(x), input_precision=DOT, out_dtype=ACC)
            t = slope * d
            if DOUBLE:
                kx_u, ky_u, kz_u = read3(u_in, k, ok_k)
                x_u = read_rows(u_x, k, ok_k, C, CP, ACC)
                cosine_u = outer_dot(ex_u, ey_u, ez_u, kx, ky, kz) + outer_dot(ex, ey, ez, kx_u, ky_u, kz_u)
                summed_u = tl.dot(slope * cosine_u, x, summed_u, input_precision=DOT, out_dtype=ACC)
                summed_u = tl.dot(y, x_u, summed_u, input_precision=DOT, out_dtype=ACC)
                d_u = tl.dot(h_u, tl.trans(x), input_precision=DOT, out_dtype=ACC)
                d_u = tl.dot(h, tl.trans(x_u), d_u, input_precision=DOT, out_dtype=ACC)
                curvature = tl.where(valid, legendre(cosine, l[:, None], S, 2), 0.0)
                tx += tl.sum(t * kx_u[None, :], 1)
                ty += tl.sum(t * ky_u[None, :], 1)
                tz += tl.sum(t * kz_u[None, :], 1)
                t = curvature * cosine_u * d + slope * d_u
            tx += tl.sum(t * kx[None, :], 1)
            ty += tl.sum(t * ky[None, :], 1)
            tz += tl.sum(t * kz[None, :], 1)
        of_w = tl.dot(g, tl.trans(summed_u if DOUBLE else summed), input_precision=DOT, out_dtype=ACC)
        tl.store(_weights(to_w, edge, a, ok_g, e, l, ok, A, S, TO_ATOMS)[0], of_w, exists)
        tx = over_degrees(tx, BLOCK_E, L)
        ty = over_degrees(ty, BLOCK_E, L)
        tz = over_degrees(tz, BLOCK_E, L)
        one = e0 + tl.arange(0, BLOCK_E)
        write3(to_v, one, one < last, tx, ty, tz)
        if DOUBLE:
            if TO_ATOMS:
                atoms = tl.dot(w_u, summed, atoms, input_precision=DOT, out_dtype=ACC)
                atoms = tl.dot(w, summed_u, atoms, input_precision=DOT, out_dtype=ACC)
            else:
                of_grad = tl.dot(w_u, summed, input_precision=DOT, out_dtype=ACC)
                of_grad = tl.dot(w, summed_u, of_grad, input_precision=DOT, out_dtype=ACC)
                write_rows(to_grad, row, ok_g, of_grad, C, CP)
    if DOUBLE and TO_ATOMS:
        a = tl.arange(0, AP)
        write_rows(to_grad, n * A + a, a < A, atoms, C, CP)


@triton.jit
def _by_input_kernel(
    u_x, u_w, u_out, u_in, grad, x_ptr, w_ptr, v_out, v_in,
    out_ptr, out_source, out_image, in_ptr, in_source, in_image, to_x, to_v,
    C: tl.constexpr, CP: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
    TO_ATOMS: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, DOUBLE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write the gradients of x and of the input edges' vectors; with DOUBLE their derivatives."""
    n = tl.program_id(0).to(tl.int64)
    first, last = tl.load(out_ptr + n), tl.load(out_ptr + n + 1)
    k_first, k_last = tl.load(in_ptr + n), tl.load(in_ptr + n + 1)
    for k0 in range(k_first + tl.program_id(1) * BLOCK_K, k_last, SPLIT * BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        ok_k = k < k_last
        kx, ky, kz = read3(v_in, k, ok_k)
        x = read_rows(x_ptr, k, ok_k, C, CP, ACC)
        of_x = tl.zeros((BLOCK_K, CP), ACC)
        tx, ty, tz = tl.zeros((BLOCK_K,), ACC), tl.zeros((BLOCK_K,), ACC), tl.zeros((BLOCK_K,), ACC)
        if DOUBLE:
            kx_u, ky_u, kz_u = read3(u_in, k, ok_k)
            x_u = read_rows(u_x, k, ok_k, C, CP, ACC)
        for e0 in range(first, last, BLOCK_E):
            e, l, ok = edge_rows(e0, last, BLOCK_E, L)
            edge, a, row, ok_g = _slots(n, e0, last, BLOCK_E, A, AP, TO_ATOMS)
            places, exists = _weights(w_ptr, edge, a, ok_g, e, l, ok, A, S, TO_ATOMS)
            g = read_rows(grad, row, ok_g, C, CP, ACC)
            h = tl.dot(tl.trans(tl.load(places, exists, 0.0).to(ACC)), g, input_precision=DOT, out_dtype=ACC)
            ex, ey, ez = read3(v_out, e, ok)
            valid = _valid(e, ok, k, ok_k, out_source, out_image, in_source, in_image)
            cosine = outer_dot(ex, ey, ez, kx, ky, kz)
            y = tl.where(valid, legendre(cosine, l[:, None], S, 0), 0.0)
            slope = tl.where(valid, legendre(cosine, l[:, None], S, 1), 0.0)
            d = tl.dot(h, tl.trans(x), input_precision=DOT, out_dtype=ACC)
            t = slope * d
            if DOUBLE:
                w_u = tl.load(_weights(u_w, edge, a, ok_g, e, l, ok, A, S, TO_ATOMS)[0], exists, 0.0).to(ACC)
                h_u = tl.dot(tl.trans(w_u), g, input_precision=DOT, out_dtype=ACC)
                ex_u, ey_u, ez_u = read3(u_out, e, ok)
                cosine_u = outer_dot(ex_u, ey_u, ez_u, kx, ky, kz) + outer_dot(ex, ey, ez, kx_u, ky_u, kz_u)
                of_x = tl.dot(tl.trans(slope * cosine_u), h, of_x, input_precision=DOT, out_dtype=ACC)
                of_x = tl.dot(tl.trans(y), h_u, of_x, input_precision=DOT, out_dtype=ACC)
                d_u = tl.dot(h_u, tl.trans(x), input_precision=DOT, out_dtype=ACC)
                d_u = tl.dot(h, tl.trans(x_u), d_u, input_precision=DOT, out_dtype=ACC)
                curvature = tl.where(valid, legendre(cosine, l[:, None], S, 2), 0.0)
                tx += tl.sum(t * ex_u[:, None], 0)
                ty += tl.sum(t * ey_u[:, None], 0)
                tz += tl.sum(t * ez_u[:, None], 0)
                t = curvature * cosine_u * d + slope * d_u
            else:
                of_x = tl.dot(tl.trans(y), h, of_x, input_precision=DOT, out_dtype=ACC)
            tx += tl.sum(t * ex[:, None], 0)
            ty += tl.sum(t * ey[:, None], 0)
            tz += tl.sum(t * ez[:, None], 0)
        write_rows(to_x, k, ok_k, of_x, C, CP)
        write3(to_v, k, ok_k, tx, ty, tz)


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor v_out, Tensor v_in, Tensor out_ptr, Tensor out_source, Tensor out_image, "
    "Tensor in_ptr, Tensor in_source, Tensor in_image, bool to_atoms"
)


@launch.define(f"triplet({_ARGUMENTS}) -> Tensor")
def triplet(*arguments: Any) -> Tensor:
    """Sum input edges over triplets, see `ejmp_kernels.triplet.triplet`."""
    tensors, options, num_atoms = _prepare(*arguments)
    x, weight = tensors[:2]
    out = x.new_empty(num_atoms if options["TO_ATOMS"] else weight.shape[0], weight.shape[1] * x.shape[1])
    _run(_triplet_kernel, "triplet", [*tensors, out], options, num_atoms)
    return out


@launch.define(f"triplet_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
def triplet_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of x, weight, v_out, v_in."""
    return _gradients(None, grad, arguments)[1:]


@launch.define(
    "triplet_double(Tensor u_x, Tensor u_weight, Tensor u_v_out, Tensor u_v_in, Tensor grad, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def triplet_double(
    u_x: Tensor, u_weight: Tensor, u_v_out: Tensor, u_v_in: Tensor, grad: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Return the gradients of grad, x, weight, v_out, v_in of the sum of u to_(x, weight, v_out, v_in)."""
    return _gradients((u_x, u_weight, u_v_out, u_v_in), grad, arguments)


def _gradients(along: tuple[Tensor, ...] | None, grad: Tensor, arguments: tuple) -> tuple[Tensor, ...]:
    tensors, options, num_atoms = _prepare(*arguments)
    inputs, edges = tensors[:4], tensors[4:]
    rows = num_atoms if options["TO_ATOMS"] else inputs[1].shape[0]
    x, shape = inputs[0], (rows, options["A"] * options["C"])
    launch.check_arguments("triplet", x.device, grad=(grad, (x.dtype,), shape))
    if along is not None:
        launch.check_directions("triplet", ("x", "weight", "v_out", "v_in"), along, inputs)
    grad, options["DOUBLE"] = grad.contiguous(), along is not None
    directions = [u.contiguous() for u in along] if along is not None else inputs
    read = [*directions, grad, *inputs, *edges]
    to_x, to_w, to_out, to_in = (torch.empty_like(x) for x in inputs)
    to_grad = torch.empty_like(grad) if options["DOUBLE"] else grad
    name = "triplet_double" if options["DOUBLE"] else "triplet_backward"
    _run(_by_output_kernel, f"{name}_by_output", [*read, to_grad, to_w, to_out], options, num_atoms)
    _run(_by_input_kernel, f"{name}_by_input", [*read, to_x, to_in], options, num_atoms)
    return to_grad, to_x, to_w, to_out, to_in


def _prepare(*arguments: Any) -> tuple[list[Tensor], dict, int]:
    """Check the arguments; return them contiguous, the options of all kernels, and the number of atoms."""
    *tensors, to_atoms = arguments
    x, weight, v_out, v_in, out_ptr, out_source, out_image, in_ptr, in_source, in_image = tensors
    axes = {"x": (x, 2), "weight": (weight, 3), "out_ptr": (out_ptr, 1)}
    axes |= {"out_source": (out_source, 1), "in_source": (in_source, 1)}
    rows = {name: launch.check_rows("triplet", name, *pair) for name, pair in axes.items()}
    num_out, num_in, num_atoms = rows["out_source"], rows["in_source"], max(rows["out_ptr"] - 1, 0)
    real, ids = (launch.sums_dtype(x),), (torch.int64,)
    launch.check_arguments(
        "triplet",
        x.device,
        x=(x, launch.REAL, (num_in, x.shape[1])),
        weight=(weight, real, (num_out, *weight.shape[1:])),
        v_out=(v_out, real, (num_out, 3)),
        v_in=(v_in, real, (num_in, 3)),
        out_ptr=(out_ptr, ids, (num_atoms + 1,)),
        in_ptr=(in_ptr, ids, (num_atoms + 1,)),
        out_source=(out_source, ids, (num_out,)),
        out_image=(out_image, ids, (num_out,)),
        in_source=(in_source, ids, (num_in,)),
        in_image=(in_image, ids, (num_in,)),
    )
    sides = (("out", out_ptr, out_source, out_image), ("in", in_ptr, in_source, in_image))
    for side, ptr, source, image in sides:
        launch.check_image("triplet", f"{side}_image", image)
        launch.check_ptr("triplet", f"{side}_ptr", ptr, source.shape[0])
        launch.check_ids("triplet", f"{side}_source", source, num_atoms)
    if not 0 < weight.shape[2] <= launch.MOST_SPHERICAL:
        raise ValueError(
            f"triplet: weight must have 1..{launch.MOST_SPHERICAL} spherical functions, got {weight.shape[2]}"
        )
    channels, (embedding, spherical) = x.shape[1], weight.shape[1:]
    options = {
        "C": channels, "CP": launch.power_of_2(channels, 16),
        "A": embedding, "S": spherical, "TO_ATOMS": to_atoms,
        "ACC": launch.accumulator(x), "DOT": launch.dot_precision(x),
    }  # fmt: skip
    return [t.contiguous() for t in tensors], options, num_atoms


def _run(kernel: triton.JITFunction, name: str, arguments: list[Tensor], options: dict, num_atoms: int) -> None:
    """Launch on every atom; what one program sums over all edges of an atom is not split."""
    options = options | launch.config(name, arguments[0])
    to_atoms, least = options["TO_ATOMS"], 16 // options["BLOCK_E"]  # a side of a product has at least 16 rows
    options["AP"] = launch.power_of_2(options["A"], 16 if to_atoms else least)
    options["L"] = launch.power_of_2(options["S"], least)
    if to_atoms and kernel is not _by_input_kernel:
        options["SPLIT"] = 1
    if num_atoms:
        with launch.on_device(arguments[0]):
            kernel[(num_atoms, options["SPLIT"])](*arguments, **options)
