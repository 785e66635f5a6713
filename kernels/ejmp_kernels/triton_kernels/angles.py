"""Device functions shared by the ops with angles: spherical functions, cosines, images.

A tile of scores has rows r = (e, l): edge e and degree l, so that seven sums over neighbours are one matrix product.
"""

import triton
import triton.language as tl


@triton.jit
def next_degree(l, x, before, p, before1, p1, before2, p2, ORDER: tl.constexpr):
    """Return P_{l-1}, P_l and their derivatives up to ORDER (0, 1, 2) from those of l - 2, l - 1.

    By l P_l = (2l-1) x P_{l-1} - (l-1) P_{l-2} and P'_l = P'_{l-2} + (2l-1) P_{l-1}.
    """
    if ORDER == 2:
        before2, p2 = p2, before2 + (2 * l - 1) * p1
    if ORDER >= 1:
        before1, p1 = p1, before1 + (2 * l - 1) * p
    before, p = p, ((2 * l - 1) * x * p - (l - 1) * before) / l
    return before, p, before1, p1, before2, p2


@triton.jit
def legendre(x, degree, S: tl.constexpr, ORDER: tl.constexpr):
    """Return the ORDER-th derivative (0, 1, 2) of Y_l0(x) = sqrt((2l+1)/4pi) P_l(x), for l = degree < S, or else zero.

    degree broadcasts against x.
    """
    zero = x * 0
    before, p, before1, p1, before2, p2 = zero, zero + 1, zero, zero, zero, zero
    out = tl.where(degree == 0, 0.28209479177387814 * (p if ORDER == 0 else zero), 0.0)
    for l in tl.static_range(1, S):
        before, p, before1, p1, before2, p2 = next_degree(l, x, before, p, before1, p1, before2, p2, ORDER)
        value = p if ORDER == 0 else (p1 if ORDER == 1 else p2)
        out = tl.where(degree == l, ((2 * l + 1) / 12.566370614359172) ** 0.5 * value, out)
    return out


@triton.jit
def read3(v_ptr, row, ok):
    """Read vectors [rows, 3] as three tensors, zero where not ok."""
    x = tl.load(v_ptr + row * 3, ok, 0.0)
    y = tl.load(v_ptr + row * 3 + 1, ok, 0.0)
    z = tl.load(v_ptr + row * 3 + 2, ok, 0.0)
    return x, y, z


@triton.jit
def write3(v_ptr, row, ok, x, y, z):
    """Write three tensors as vectors [rows, 3]."""
    tl.store(v_ptr + row * 3, x, ok)
    tl.store(v_ptr + row * 3 + 1, y, ok)
    tl.store(v_ptr + row * 3 + 2, z, ok)


@triton.jit
def outer_dot(ax, ay, az, bx, by, bz):
    """Return a_i . b_j of all rows i of a and j of b."""
    return ax[:, None] * bx[None, :] + ay[:, None] * by[None, :] + az[:, None] * bz[None, :]


@triton.jit
def read_rows(x_ptr, row, ok, C: tl.constexpr, CP: tl.constexpr, ACC: tl.constexpr):
    """Read rows of x [., C] as [rows, CP] in the type of sums, zero beyond C and where not ok."""
    c = tl.arange(0, CP)
    return tl.load(x_ptr + row[:, None] * C + c[None, :], ok[:, None] & (c < C)[None, :], 0.0).to(ACC)


@triton.jit
def write_rows(x_ptr, row, ok, x, C: tl.constexpr, CP: tl.constexpr):
    """Write [rows, CP] to rows of [., C]."""
    c = tl.arange(0, CP)
    tl.store(x_ptr + row[:, None] * C + c[None, :], x, ok[:, None] & (c < C)[None, :])


@triton.jit
def edge_rows(first, last, BLOCK_E: tl.constexpr, L: tl.constexpr):
    """Return edge, degree and whether the edge exists of rows (e, l)."""
    r = tl.arange(0, BLOCK_E * L)
    return first + r // L, r % L, first + r // L < last


@triton.jit
def over_degrees(x, BLOCK_E: tl.constexpr, L: tl.constexpr):
    """Sum rows (e, l) over l."""
    return tl.sum(tl.reshape(x, (BLOCK_E, L)), 1)


@triton.jit
def cross(ax, ay, az, bx, by, bz):
    """Return a x b."""
    return ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx


@triton.jit
def normal(ax, ay, az, bx, by, bz, EPS: tl.constexpr):
    """Return p = a x b / max(|a x b|, EPS), the factor, and whether |a x b| > EPS."""
    x, y, z = cross(ax, ay, az, bx, by, bz)
    squared = x * x + y * y + z * z
    regular = squared > EPS * EPS
    scale = 1.0 / tl.sqrt(tl.where(regular, squared, EPS * EPS))
    return x * scale, y * scale, z * scale, scale, regular


@triton.jit
def across(px, py, pz, scale, gx, gy, gz):
    """Return scale (g - p (p . g)): the derivative of p by a x b, along g or transposed, which is the same."""
    along = px * gx + py * gy + pz * gz
    return scale * (gx - px * along), scale * (gy - py * along), scale * (gz - pz * along)


@triton.jit
def normal_along(ax, ay, az, bx, by, bz, ax_u, ay_u, az_u, bx_u, by_u, bz_u, EPS: tl.constexpr):
    """Return the derivative of `normal` along directions of a and b, where it is regular, and that of log |a x b|."""
    px, py, pz, scale, _ = normal(ax, ay, az, bx, by, bz, EPS)
    rx, ry, rz = cross(ax_u, ay_u, az_u, bx, by, bz)
    sx, sy, sz = cross(ax, ay, az, bx_u, by_u, bz_u)
    rx, ry, rz = rx + sx, ry + sy, rz + sz
    px_u, py_u, pz_u = across(px, py, pz, scale, rx, ry, rz)
    return px_u, py_u, pz_u, scale * (px * rx + py * ry + pz * rz)


@triton.jit
def across_along(px, py, pz, scale, px_u, py_u, pz_u, stretch, gx, gy, gz, gx_u, gy_u, gz_u):
    """Return the derivative of `across` of g where p changes by p_u, log |a x b| by stretch, and g by g_u."""
    rx, ry, rz = across(px, py, pz, scale, gx, gy, gz)
    sx, sy, sz = across(px, py, pz, scale, gx_u, gy_u, gz_u)
    along, turned = px * gx + py * gy + pz * gz, px_u * gx + py_u * gy + pz_u * gz
    return (
        sx - stretch * rx - scale * (px_u * along + px * turned),
        sy - stretch * ry - scale * (py_u * along + py * turned),
        sz - stretch * rz - scale * (pz_u * along + pz * turned),
    )
