"""The values of quadruplets from the features and back, a row per middle edge q = b->a and input edge d->b.

value[q, d, c] = x[d, c] sum_k filter[q, k, c] Y_k(V_q . V_d), zero where d is a; see `quadruplet`. The rows stand at q
K + (place of d among the edges into b), K = max_degree, so that nobody has to wait for their number. Y [d, k] times
filter [k, c] is a matrix product. Writes 4 C bytes a row; its backward reads the gradients of a row and of its normal
n = V_d x V_q / |.|, and writes rows of the gradients of x and V_d, which `gather_kernel` sums by atom b. No atomics.
"""

import triton
import triton.language as tl

from ejmp_kernels.triton_kernels.angles import (
    across,
    across_along,
    cross,
    legendre,
    normal,
    normal_along,
    read3,
    read_rows,
    write3,
    write_rows,
)


@triton.jit
def inputs_of(q, atom, first, d0, d_last, v_ptr, source_ptr, image_ptr, qx, qy, qz, q_image, K, BLOCK_D: tl.constexpr):
    """Return edges d->b, their rows (q, d), whether they exist and d is not a, their vectors and V_q . V_d."""
    d = d0 + tl.arange(0, BLOCK_D)
    ok = d < d_last
    dx, dy, dz = read3(v_ptr, d, ok)
    source, image = tl.load(source_ptr + d, ok, 0), tl.load(image_ptr + d, ok, 0)
    valid = ok & ~((source == atom) & (image == -q_image))
    return d, q * K + d - first, ok, valid, dx, dy, dz, dx * qx + dy * qy + dz * qz


@triton.jit
def input_range(ptr, b, K):
    """Return the first and the end of the edges into b, at most K."""
    first = tl.load(ptr + b)
    return first, tl.minimum(tl.load(ptr + b + 1), first + K)


@triton.jit
def values_kernel(
    x_u, f_u, v_u, vm_u, x_ptr, f_ptr, v_ptr, vm_ptr, ptr, source_ptr, image_ptr, m_ptr, m_source, m_image,
    value_u, value, K,
    C: tl.constexpr, CP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    DOUBLE: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write the values; with DOUBLE their derivatives along directions of x, filter and the vectors too."""
    atom = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, SP)
    for q in range(tl.load(m_ptr + atom) + tl.program_id(1), tl.load(m_ptr + atom + 1), SPLIT):
        qx, qy, qz = read3(vm_ptr, q, True)
        first, last = input_range(ptr, tl.load(m_source + q), K)
        f = read_rows(f_ptr, q * S + k, k < S, C, CP, ACC)
        if DOUBLE:
            qx_u, qy_u, qz_u = read3(vm_u, q, True)
            f_along = read_rows(f_u, q * S + k, k < S, C, CP, ACC)
        for d0 in range(first, last, BLOCK_D):
            d, row, ok, valid, dx, dy, dz, cosine = inputs_of(
                q, atom, first, d0, last, v_ptr, source_ptr, image_ptr, qx, qy, qz, tl.load(m_image + q), K, BLOCK_D
            )
            y = tl.where(valid[:, None], legendre(cosine[:, None], k[None, :], S, 0), 0.0)
            x = read_rows(x_ptr, d, ok, C, CP, ACC)
            phi = tl.dot(y, f, input_precision=DOT, out_dtype=ACC)
            write_rows(value, row, ok, x * phi, C, CP)
            if DOUBLE:
                dx_u, dy_u, dz_u = read3(v_u, d, ok)
                cosine_u = dx_u * qx + dy_u * qy + dz_u * qz + dx * qx_u + dy * qy_u + dz * qz_u
                y_u = tl.where(valid[:, None], legendre(cosine[:, None], k[None, :], S, 1) * cosine_u[:, None], 0.0)
                phi_u = tl.dot(y_u, f, input_precision=DOT, out_dtype=ACC)
                phi_u = tl.dot(y, f_along, phi_u, input_precision=DOT, out_dtype=ACC)
                write_rows(value_u, row, ok, read_rows(x_u, d, ok, C, CP, ACC) * phi + x * phi_u, C, CP)


@triton.jit
def values_backward_kernel(
    x_u, f_u, v_u, vm_u, x_ptr, f_ptr, v_ptr, vm_ptr, ptr, source_ptr, image_ptr, m_ptr, m_source, m_image,
    to_value_u, to_value, to_normal_u, to_normal, rows_x, rows_v, to_f, to_vm, K,
    C: tl.constexpr, CP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write the gradient of filter, add to that of V_q, and write rows of the gradients of x and V_d."""
    atom = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, SP)
    for q in range(tl.load(m_ptr + atom) + tl.program_id(1), tl.load(m_ptr + atom + 1), SPLIT):
        qx, qy, qz = read3(vm_ptr, q, True)
        qx_u, qy_u, qz_u = read3(vm_u, q, True)
        first, last = input_range(ptr, tl.load(m_source + q), K)
        f = read_rows(f_ptr, q * S + k, k < S, C, CP, ACC)
        if DOUBLE:
            f_along = read_rows(f_u, q * S + k, k < S, C, CP, ACC)
        of_f = tl.zeros((SP, CP), ACC)
        none = tl.zeros((BLOCK_D,), ACC)
        tx, ty, tz = none, none, none
        for d0 in range(first, last, BLOCK_D):
            d, row, ok, valid, dx, dy, dz, cosine = inputs_of(
                q, atom, first, d0, last, v_ptr, source_ptr, image_ptr, qx, qy, qz, tl.load(m_image + q), K, BLOCK_D
            )
            y = tl.where(valid[:, None], legendre(cosine[:, None], k[None, :], S, 0), 0.0)
            slope = tl.where(valid[:, None], legendre(cosine[:, None], k[None, :], S, 1), 0.0)
            x, grad = read_rows(x_ptr, d, ok, C, CP, ACC), read_rows(to_value, row, ok, C, CP, ACC)
            phi = tl.dot(y, f, input_precision=DOT, out_dtype=ACC)
            m = tl.dot(x * grad, tl.trans(f), input_precision=DOT, out_dtype=ACC)
            t = tl.sum(slope * m, 1)
            nx, ny, nz, scale, _ = normal(dx, dy, dz, qx, qy, qz, EPS)
            gx, gy, gz = read3(to_normal, row, ok)
            rx, ry, rz = across(nx, ny, nz, scale, gx, gy, gz)
            ax, ay, az = cross(qx, qy, qz, rx, ry, rz)
            bx, by, bz = cross(rx, ry, rz, dx, dy, dz)
            if DOUBLE:
                dx_u, dy_u, dz_u = read3(v_u, d, ok)
                x_along, grad_u = read_rows(x_u, d, ok, C, CP, ACC), read_rows(to_value_u, row, ok, C, CP, ACC)
                cosine_u = dx_u * qx + dy_u * qy + dz_u * qz + dx * qx_u + dy * qy_u + dz * qz_u
                y_u = slope * cosine_u[:, None]
                product_u = x_along * grad + x * grad_u
                of_f = tl.dot(tl.trans(y_u), x * grad, of_f, input_precision=DOT, out_dtype=ACC)
                of_f = tl.dot(tl.trans(y), product_u, of_f, input_precision=DOT, out_dtype=ACC)
                phi_u = tl.dot(y_u, f, input_precision=DOT, out_dtype=ACC)
                phi_u = tl.dot(y, f_along, phi_u, input_precision=DOT, out_dtype=ACC)
                m_u = tl.dot(product_u, tl.trans(f), input_precision=DOT, out_dtype=ACC)
                m_u = tl.dot(x * grad, tl.trans(f_along), m_u, input_precision=DOT, out_dtype=ACC)
                curvature = tl.where(valid[:, None], legendre(cosine[:, None], k[None, :], S, 2), 0.0)
                t_u = tl.sum(curvature * cosine_u[:, None] * m + slope * m_u, 1)
                nx_u, ny_u, nz_u, stretch = normal_along(
                    dx, dy, dz, qx, qy, qz, dx_u, dy_u, dz_u, qx_u, qy_u, qz_u, EPS
                )
                gx_u, gy_u, gz_u = read3(to_normal_u, row, ok)
                sx, sy, sz = across_along(nx, ny, nz, scale, nx_u, ny_u, nz_u, stretch, gx, gy, gz, gx_u, gy_u, gz_u)
                ax, ay, az = cross(qx_u, qy_u, qz_u, rx, ry, rz)
                bx, by, bz = cross(rx, ry, rz, dx_u, dy_u, dz_u)
                cx, cy, cz = cross(qx, qy, qz, sx, sy, sz)
                ex, ey, ez = cross(sx, sy, sz, dx, dy, dz)
                ax, ay, az = ax + cx + t * qx_u, ay + cy + t * qy_u, az + cz + t * qz_u
                bx, by, bz = bx + ex + t * dx_u, by + ey + t * dy_u, bz + ez + t * dz_u
                t = t_u
                write_rows(rows_x, row, ok, grad_u * phi + grad * phi_u, C, CP)
            else:
                of_f = tl.dot(tl.trans(y), x * grad, of_f, input_precision=DOT, out_dtype=ACC)
                write_rows(rows_x, row, ok, grad * phi, C, CP)
            write3(rows_v, row, ok, ax + t * qx, ay + t * qy, az + t * qz)
            tx += bx + t * dx
            ty += by + t * dy
            tz += bz + t * dz
        write_rows(to_f, q * S + k, k < S, of_f, C, CP)
        sx, sy, sz = read3(to_vm, q, True)
        write3(to_vm, q, True, sx + tl.sum(tx, 0), sy + tl.sum(ty, 0), sz + tl.sum(tz, 0))


@triton.jit
def gather_kernel(
    ptr, by_source, order, rows_x, rows_v, to_x, to_v, K,
    C: tl.constexpr, CP: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Sum rows (q, d) over the middle edges q from atom b: write the gradient of x, add to that of v."""
    b = tl.program_id(0).to(tl.int64)
    first, last = input_range(ptr, b, K)
    for d0 in range(first + tl.program_id(1) * BLOCK_D, last, SPLIT * BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        ok = d < last
        of_x = tl.zeros((BLOCK_D, CP), ACC)
        tx, ty, tz = read3(to_v, d, ok)
        for i in range(tl.load(by_source + b), tl.load(by_source + b + 1)):
            row = tl.load(order + i) * K + d - first
            of_x += read_rows(rows_x, row, ok, C, CP, ACC)
            ax, ay, az = read3(rows_v, row, ok)
            tx, ty, tz = tx + ax, ty + ay, tz + az
        write_rows(to_x, d, ok, of_x, C, CP)
        write3(to_v, d, ok, tx, ty, tz)
