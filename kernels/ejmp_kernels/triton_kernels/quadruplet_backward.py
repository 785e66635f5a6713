"""Gradients of quadruplets, and with DOUBLE the gradients' derivatives along given directions; see `quadruplet`.

With H = weight^T G [E, S^2, C] of a gradient G of out, R[(e, k), c] = sum_l Y_l(V_e . V_q) H[e, l, k, c] and R' the
same with Y'_l, of each pair (e, q), and Q = R value^T, Q' = R' value^T, [(e, k), d]:
to_value[q, d] = sum_(e, k) Y_k R,  gradient by the dihedral's cosine = sum_k Y'_k Q,  by V_e . V_q = sum_(k, d) Y_k Q'.
The gradient g of a normal p = a x b / |a x b| gives r = (g - p (p . g)) / |a x b|, and b x r to a, r x a to b.

One kernel goes over the output edges (gradient of V_e), one over the middle edges (to_value, gradients of the normals
n and of V_q); `quadruplet_values` goes on from there. No atomics. Kept: two or, with DOUBLE, four arrays [E, S^2, C].
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ejmp_kernels.triton_kernels import launch
from ejmp_kernels.triton_kernels.angles import (
    across,
    across_along,
    cross,
    edge_rows,
    legendre,
    next_degree,
    normal,
    normal_along,
    outer_dot,
    over_degrees,
    read3,
    read_rows,
    write3,
    write_rows,
)
from ejmp_kernels.triton_kernels.quadruplet import ARGUMENTS, Problem, prepare, quadruplet_valid
from ejmp_kernels.triton_kernels.quadruplet_values import gather_kernel, input_range, inputs_of, values_backward_kernel


@triton.jit
def _mixed(h_u, h, e, k, ok, cosine, cosine_u, S: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, ACC: tl.constexpr,
           DOUBLE: tl.constexpr):  # fmt: skip
    """Return R, R' [(e, k), CP] and their derivatives."""
    ORDER: tl.constexpr = 2 if DOUBLE else 1
    zero, zeros = cosine * 0, tl.zeros((e.shape[0], CP), ACC)
    before, p, before1, p1, before2, p2 = zero, zero + 1, zero, zero, zero, zero
    r, r1, r2, r_u, r1_u = zeros, zeros, zeros, zeros, zeros
    for l in tl.static_range(S):
        if l > 0:
            before, p, before1, p1, before2, p2 = next_degree(l, cosine, before, p, before1, p1, before2, p2, ORDER)
        row, exists = (e * S + l) * S + k, ok & (k < S)
        part = ((2 * l + 1) / 12.566370614359172) ** 0.5 * read_rows(h, row, exists, C, CP, ACC)
        r += p[:, None] * part
        r1 += p1[:, None] * part
        if DOUBLE:
            r2 += p2[:, None] * part
            part_u = ((2 * l + 1) / 12.566370614359172) ** 0.5 * read_rows(h_u, row, exists, C, CP, ACC)
            r_u += p[:, None] * part_u
            r1_u += p1[:, None] * part_u
    if DOUBLE:
        r_u += r1 * cosine_u[:, None]
        r1_u += r2 * cosine_u[:, None]
    return r, r1, r_u, r1_u


@triton.jit
def _tile(k, dihedral, dihedral_u, valid, smooth, r, r1, r_u, r1_u, v, v_u, S: tl.constexpr, ACC: tl.constexpr,
          DOT: tl.constexpr, DOUBLE: tl.constexpr):  # fmt: skip
    """Return scores, gradient by the dihedral's cosine [(e, k), d] and by that of (e, q) [(e, k)]; each with its _u."""
    y = tl.where(valid, legendre(dihedral, k[:, None], S, 0), 0.0)
    slope = tl.where(smooth, legendre(dihedral, k[:, None], S, 1), 0.0)
    q = tl.dot(r, tl.trans(v), input_precision=DOT, out_dtype=ACC)
    q1 = tl.dot(r1, tl.trans(v), input_precision=DOT, out_dtype=ACC)
    g, t = slope * q, tl.sum(y * q1, 1)
    y_u, g_u, t_u = y, g, t
    if DOUBLE:
        y_u = slope * dihedral_u
        q_u = tl.dot(r_u, tl.trans(v), input_precision=DOT, out_dtype=ACC)
        q_u = tl.dot(r, tl.trans(v_u), q_u, input_precision=DOT, out_dtype=ACC)
        q1_u = tl.dot(r1_u, tl.trans(v), input_precision=DOT, out_dtype=ACC)
        q1_u = tl.dot(r1, tl.trans(v_u), q1_u, input_precision=DOT, out_dtype=ACC)
        curvature = tl.where(smooth, legendre(dihedral, k[:, None], S, 2), 0.0)
        g_u = curvature * dihedral_u * q + slope * q_u
        t_u = tl.sum(y_u * q1 + y * q1_u, 1)
    return y, y_u, g, g_u, t, t_u


@triton.jit
def _by_output_kernel(
    v_u, vm_u, v_ptr, vm_ptr, ptr, source_ptr, image_ptr, m_ptr, m_source, m_image, h_u, h, value_u, value, to_v, K,
    C: tl.constexpr, CP: tl.constexpr, S: tl.constexpr, L: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    atom = tl.program_id(0).to(tl.int64)
    e_first, e_last = tl.load(ptr + atom), tl.load(ptr + atom + 1)
    for e0 in range(e_first + tl.program_id(1) * BLOCK_E, e_last, SPLIT * BLOCK_E):
        e, k, ok_e = edge_rows(e0, e_last, BLOCK_E, L)
        zero = tl.zeros((BLOCK_E * L,), ACC)
        ex, ey, ez = read3(v_ptr, e, ok_e)
        e_source, e_image = tl.load(source_ptr + e, ok_e, -1), tl.load(image_ptr + e, ok_e, 0)
        ex_u, ey_u, ez_u = zero, zero, zero
        if DOUBLE:
            ex_u, ey_u, ez_u = read3(v_u, e, ok_e)
        tx, ty, tz = zero, zero, zero
        for q in range(tl.load(m_ptr + atom), tl.load(m_ptr + atom + 1)):
            qx, qy, qz = read3(vm_ptr, q, True)
            qx_u, qy_u, qz_u = read3(vm_u, q, True)
            b, q_image = tl.load(m_source + q), tl.load(m_image + q)
            first, last = input_range(ptr, b, K)
            c_not_b = ok_e & ~((e_source == b) & (e_image == q_image))
            cosine_u = ex_u * qx + ey_u * qy + ez_u * qz + ex * qx_u + ey * qy_u + ez * qz_u
            r, r1, r_u, r1_u = _mixed(
                h_u, h, e, k, c_not_b, ex * qx + ey * qy + ez * qz, cosine_u, S, C, CP, ACC, DOUBLE
            )
            px, py, pz, p_scale, p_regular = normal(ex, ey, ez, qx, qy, qz, EPS)
            px_u, py_u, pz_u, p_stretch = px, py, pz, p_scale
            if DOUBLE:
                px_u, py_u, pz_u, p_stretch = normal_along(
                    ex, ey, ez, qx, qy, qz, ex_u, ey_u, ez_u, qx_u, qy_u, qz_u, EPS
                )
            t, gx, gy, gz = zero, zero, zero, zero
            t_u, gx_u, gy_u, gz_u = zero, zero, zero, zero
            for d0 in range(first, last, BLOCK_D):
                d, row, ok, valid, dx, dy, dz, _ = inputs_of(
                    q, atom, first, d0, last, v_ptr, source_ptr, image_ptr, qx, qy, qz, q_image, K, BLOCK_D
                )
                nx, ny, nz, _, n_regular = normal(dx, dy, dz, qx, qy, qz, EPS)
                valid = quadruplet_valid(d, valid, ok_e, source_ptr, image_ptr, q_image, e_source, e_image)
                dihedral = outer_dot(px, py, pz, nx, ny, nz)
                v = read_rows(value, row, ok, C, CP, ACC)
                dihedral_u, v_along = dihedral, v
                if DOUBLE:
                    dx_u, dy_u, dz_u = read3(v_u, d, ok)
                    nx_u, ny_u, nz_u, _ = normal_along(dx, dy, dz, qx, qy, qz, dx_u, dy_u, dz_u, qx_u, qy_u, qz_u, EPS)
                    dihedral_u = outer_dot(px_u, py_u, pz_u, nx, ny, nz) + outer_dot(px, py, pz, nx_u, ny_u, nz_u)
                    v_along = read_rows(value_u, row, ok, C, CP, ACC)
                smooth = valid & p_regular[:, None] & n_regular[None, :]
                _, _, g, g_u, one, one_u = _tile(
                    k, dihedral, dihedral_u, valid, smooth, r, r1, r_u, r1_u, v, v_along, S, ACC, DOT, DOUBLE
                )
                t += one
                gx += tl.sum(g * nx[None, :], 1)
                gy += tl.sum(g * ny[None, :], 1)
                gz += tl.sum(g * nz[None, :], 1)
                if DOUBLE:
                    t_u += one_u
                    gx_u += tl.sum(g_u * nx[None, :] + g * nx_u[None, :], 1)
                    gy_u += tl.sum(g_u * ny[None, :] + g * ny_u[None, :], 1)
                    gz_u += tl.sum(g_u * nz[None, :] + g * nz_u[None, :], 1)
            rx, ry, rz = across(px, py, pz, p_scale, gx, gy, gz)
            if DOUBLE:
                ax, ay, az = cross(qx_u, qy_u, qz_u, rx, ry, rz)
                tx += t * qx_u + ax
                ty += t * qy_u + ay
                tz += t * qz_u + az
                rx, ry, rz = across_along(
                    px, py, pz, p_scale, px_u, py_u, pz_u, p_stretch, gx, gy, gz, gx_u, gy_u, gz_u
                )
                t = t_u
            ax, ay, az = cross(qx, qy, qz, rx, ry, rz)
            tx += t * qx + ax
            ty += t * qy + ay
            tz += t * qz + az
        edge = e0 + tl.arange(0, BLOCK_E)
        tx, ty, tz = over_degrees(tx, BLOCK_E, L), over_degrees(ty, BLOCK_E, L), over_degrees(tz, BLOCK_E, L)
        write3(to_v, edge, edge < e_last, tx, ty, tz)


@triton.jit
def _by_middle_kernel(
    v_u, vm_u, v_ptr, vm_ptr, ptr, source_ptr, image_ptr, m_ptr, m_source, m_image, h_u, h, value_u, value,
    to_value_u, to_value, to_normal_u, to_normal, to_vm, K,
    C: tl.constexpr, CP: tl.constexpr, S: tl.constexpr, L: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    atom = tl.program_id(0).to(tl.int64)
    e_first, e_last = tl.load(ptr + atom), tl.load(ptr + atom + 1)
    for q in range(tl.load(m_ptr + atom) + tl.program_id(1), tl.load(m_ptr + atom + 1), SPLIT):
        qx, qy, qz = read3(vm_ptr, q, True)
        qx_u, qy_u, qz_u = read3(vm_u, q, True)
        b, q_image = tl.load(m_source + q), tl.load(m_image + q)
        first, last = input_range(ptr, b, K)
        zero = tl.zeros((BLOCK_E * L,), ACC)
        tx, ty, tz = zero, zero, zero
        for d0 in range(first, last, BLOCK_D):
            d, row, ok, d_valid, dx, dy, dz, _ = inputs_of(
                q, atom, first, d0, last, v_ptr, source_ptr, image_ptr, qx, qy, qz, q_image, K, BLOCK_D
            )
            nx, ny, nz, _, n_regular = normal(dx, dy, dz, qx, qy, qz, EPS)
            v = read_rows(value, row, ok, C, CP, ACC)
            nx_u, ny_u, nz_u, v_along = nx, ny, nz, v
            if DOUBLE:
                dx_u, dy_u, dz_u = read3(v_u, d, ok)
                nx_u, ny_u, nz_u, _ = normal_along(dx, dy, dz, qx, qy, qz, dx_u, dy_u, dz_u, qx_u, qy_u, qz_u, EPS)
                v_along = read_rows(value_u, row, ok, C, CP, ACC)
            of_value, of_value_u = tl.zeros((BLOCK_D, CP), ACC), tl.zeros((BLOCK_D, CP), ACC)
            none = tl.zeros((BLOCK_D,), ACC)
            hx, hy, hz, hx_u, hy_u, hz_u = none, none, none, none, none, none
            for e0 in range(e_first, e_last, BLOCK_E):
                e, k, ok_e = edge_rows(e0, e_last, BLOCK_E, L)
                ex, ey, ez = read3(v_ptr, e, ok_e)
                e_source, e_image = tl.load(source_ptr + e, ok_e, -1), tl.load(image_ptr + e, ok_e, 0)
                c_not_b = ok_e & ~((e_source == b) & (e_image == q_image))
                px, py, pz, p_scale, p_regular = normal(ex, ey, ez, qx, qy, qz, EPS)
                cosine = ex * qx + ey * qy + ez * qz
                dihedral = outer_dot(px, py, pz, nx, ny, nz)
                cosine_u, dihedral_u = cosine, dihedral
                if DOUBLE:
                    ex_u, ey_u, ez_u = read3(v_u, e, ok_e)
                    cosine_u = ex_u * qx + ey_u * qy + ez_u * qz + ex * qx_u + ey * qy_u + ez * qz_u
                    px_u, py_u, pz_u, p_stretch = normal_along(
                        ex, ey, ez, qx, qy, qz, ex_u, ey_u, ez_u, qx_u, qy_u, qz_u, EPS
                    )
                    dihedral_u = outer_dot(px_u, py_u, pz_u, nx, ny, nz) + outer_dot(px, py, pz, nx_u, ny_u, nz_u)
                r, r1, r_u, r1_u = _mixed(h_u, h, e, k, c_not_b, cosine, cosine_u, S, C, CP, ACC, DOUBLE)
                valid = quadruplet_valid(d, d_valid, ok_e, source_ptr, image_ptr, q_image, e_source, e_image)
                smooth = valid & p_regular[:, None] & n_regular[None, :]
                y, y_u, g, g_u, t, t_u = _tile(
                    k, dihedral, dihedral_u, valid, smooth, r, r1, r_u, r1_u, v, v_along, S, ACC, DOT, DOUBLE
                )
                of_value = tl.dot(tl.trans(y), r, of_value, input_precision=DOT, out_dtype=ACC)
                hx += tl.sum(g * px[:, None], 0)
                hy += tl.sum(g * py[:, None], 0)
                hz += tl.sum(g * pz[:, None], 0)
                gx, gy, gz = tl.sum(g * nx[None, :], 1), tl.sum(g * ny[None, :], 1), tl.sum(g * nz[None, :], 1)
                rx, ry, rz = across(px, py, pz, p_scale, gx, gy, gz)
                if DOUBLE:
                    of_value_u = tl.dot(tl.trans(y_u), r, of_value_u, input_precision=DOT, out_dtype=ACC)
                    of_value_u = tl.dot(tl.trans(y), r_u, of_value_u, input_precision=DOT, out_dtype=ACC)
                    hx_u += tl.sum(g_u * px[:, None] + g * px_u[:, None], 0)
                    hy_u += tl.sum(g_u * py[:, None] + g * py_u[:, None], 0)
                    hz_u += tl.sum(g_u * pz[:, None] + g * pz_u[:, None], 0)
                    ax, ay, az = cross(rx, ry, rz, ex_u, ey_u, ez_u)
                    tx += t * ex_u + ax
                    ty += t * ey_u + ay
                    tz += t * ez_u + az
                    gx_u = tl.sum(g_u * nx[None, :] + g * nx_u[None, :], 1)
                    gy_u = tl.sum(g_u * ny[None, :] + g * ny_u[None, :], 1)
                    gz_u = tl.sum(g_u * nz[None, :] + g * nz_u[None, :], 1)
                    rx, ry, rz = across_along(
                        px, py, pz, p_scale, px_u, py_u, pz_u, p_stretch, gx, gy, gz, gx_u, gy_u, gz_u
                    )
                    t = t_u
                ax, ay, az = cross(rx, ry, rz, ex, ey, ez)
                tx += t * ex + ax
                ty += t * ey + ay
                tz += t * ez + az
            write_rows(to_value, row, ok, of_value, C, CP)
            write3(to_normal, row, ok, hx, hy, hz)
            if DOUBLE:
                write_rows(to_value_u, row, ok, of_value_u, C, CP)
                write3(to_normal_u, row, ok, hx_u, hy_u, hz_u)
        write3(to_vm, q, True, tl.sum(tx, 0), tl.sum(ty, 0), tl.sum(tz, 0))


@launch.define(f"quadruplet_backward(Tensor grad, {ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
def quadruplet_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of x, filter, weight, v, v_middle."""
    problem = prepare(*arguments)
    sums, _ = problem.sums(values := problem.values(None), None)
    grad_rows, weight = _rows_of(grad, problem), problem.inputs[2]
    mixed = torch.bmm(weight.mT, grad_rows)
    to_x, to_f, to_v, to_vm = _gradients(problem, None, values, (mixed, mixed))
    return to_x, to_f, torch.bmm(grad_rows, sums.mT), to_v, to_vm


@launch.define(
    "quadruplet_double(Tensor u_x, Tensor u_filter, Tensor u_weight, Tensor u_v, Tensor u_v_middle, Tensor grad, "
    f"{ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def quadruplet_double(*arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of grad, x, filter, weight, v, v_middle of the sum of u to_(x, ..., v_middle)."""
    problem, grad = prepare(*arguments[6:]), arguments[5]
    launch.check_directions("quadruplet", ("x", "filter", "weight", "v", "v_middle"), arguments[:5], problem.inputs)
    along = [u.contiguous() for u in arguments[:5]]
    values = problem.values(along)
    sums, sums_u = problem.sums(values, along)
    grad_rows, weight, weight_u = _rows_of(grad, problem), problem.inputs[2], along[2]
    mixed = torch.bmm(weight.mT, grad_rows), torch.bmm(weight_u.mT, grad_rows)
    to_x, to_f, to_v, to_vm = _gradients(problem, along, values, mixed)
    to_grad = torch.baddbmm(torch.bmm(weight_u, sums), weight, sums_u).flatten(1).to(grad.dtype)
    return to_grad, to_x, to_f, torch.bmm(grad_rows, sums_u.mT), to_v, to_vm


def _rows_of(grad: Tensor, problem: Problem) -> Tensor:
    """Return grad as [E, A, C] in the type of sums."""
    x, _, weight, v, _ = problem.inputs
    shape = (weight.shape[0], weight.shape[1] * x.shape[1])
    launch.check_arguments("quadruplet", x.device, grad=(grad, (x.dtype,), shape))
    return grad.reshape(*weight.shape[:2], x.shape[1]).to(v.dtype)


def _gradients(
    problem: Problem, along: list[Tensor] | None, values: tuple[Tensor, Tensor], mixed: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, filter, v, v_middle from values and mixed = H, each with its derivative."""
    x, f, _, v, vm = problem.inputs
    x_u, f_u, _, v_u, vm_u = along or problem.inputs
    (value, value_u), (h, h_u), edges, K = values, mixed, problem.edges, problem.max_degree
    to_x, to_f, to_v, to_vm = (torch.empty_like(t) for t in (x, f, v, vm))
    to_value, to_normal = problem.rows(x.shape[1]), problem.rows(3)
    to_value_u, to_normal_u = (problem.rows(x.shape[1]), problem.rows(3)) if along else (to_value, to_normal)
    rows, double = [to_value_u, to_value, to_normal_u, to_normal], along is not None
    name = "quadruplet_double" if double else "quadruplet_backward"
    shared = [v_u, vm_u, v, vm, *edges, h_u, h, value_u, value]
    problem.run(_by_output_kernel, f"{name}_by_output", [*shared, to_v, K], DOUBLE=double)
    problem.run(_by_middle_kernel, f"{name}_by_middle", [*shared, *rows, to_vm, K], DOUBLE=double)
    rows_x, rows_v = value, problem.rows(3)  # the values are of no more use
    arguments = [x_u, f_u, v_u, vm_u, x, f, v, vm, *edges, *rows, rows_x, rows_v, to_f, to_vm, K]
    problem.run(values_backward_kernel, f"{name}_values", arguments, DOUBLE=double)
    by_source, order = launch.by_source(edges[4], problem.num_atoms)
    problem.run(gather_kernel, "quadruplet_gather", [edges[0], by_source, order, rows_x, rows_v, to_x, to_v, K])
    return to_x, to_f, to_v, to_vm
