"""Quadruplets d->b->a<-c in factorised form, see `ejmp_kernels.quadruplet`; this file has the forward.

For output edges e = c->a, middle edges q = b->a and input edges d->b, with p = V_e x V_q / |.| and n = V_d x V_q / |.|:
value[q, d, c] = x[d, c] sum_k filter[q, k, c] Y_k(V_q . V_d)            kept, see `quadruplet_values`
sums[e, l, k, c] = sum_q Y_l(V_e . V_q) sum_d Y_k(p . n) value[q, d, c]  one kernel, with the next line
out[e, a, c] = sum_lk weight[e, a, S l + k] sums[e, l, k, c]

A program takes one atom a and BLOCK_E edges e. For each q the scores Y_k are a tile with rows (e, k) and columns d;
scores value is a matrix product U[(e, k), c], which enters the sums once per l. Written and read again: 4 Q K C bytes
of values, K = max_degree; the other arrays once. Mixing out to fewer channels stays a product of its own: here it
would read all its weights for every BLOCK_E edges.

With DOUBLE a kernel also gives the derivative along directions of its inputs (suffix _u), by the product rule.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ejmp_kernels.triton_kernels import launch
from ejmp_kernels.triton_kernels.angles import (
    edge_rows,
    legendre,
    normal,
    normal_along,
    outer_dot,
    read3,
    read_rows,
    write_rows,
)
from ejmp_kernels.triton_kernels.quadruplet_values import input_range, inputs_of, values_kernel


@triton.jit
def _spread(e0, e, l, BLOCK_E: tl.constexpr, L: tl.constexpr, FLAT: tl.constexpr):
    """Return edges and degrees of Y_l, as a tile [l, (e, k)] or its numbers in a row.

    In the layout of the sums, which have channels too, threads make several of them, which is more work.
    """
    if FLAT:
        i = tl.arange(0, L * BLOCK_E * L)
        edge, degree = e0 + i // L % BLOCK_E, i // (BLOCK_E * L)
    else:
        edge, degree = e[None, :], l[:, None]
    return edge, degree


@triton.jit
def _sums_kernel(
    v_u, vm_u, w_ptr, v_ptr, vm_ptr, ptr, source_ptr, image_ptr, m_ptr, m_source, m_image,
    value_u, value, out_u, out, K,
    C: tl.constexpr, CP: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
    EPS: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, DOUBLE: tl.constexpr, CONTRACT: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Write the op's result with CONTRACT, or else the sums [E, S, S, C]; with DOUBLE their derivatives too."""
    atom = tl.program_id(0).to(tl.int64)
    e_first, e_last = tl.load(ptr + atom), tl.load(ptr + atom + 1)
    l = tl.arange(0, L)
    for e0 in range(e_first + tl.program_id(1) * BLOCK_E, e_last, SPLIT * BLOCK_E):
        e, k, ok_e = edge_rows(e0, e_last, BLOCK_E, L)
        ex, ey, ez = read3(v_ptr, e, ok_e)
        e_source, e_image = tl.load(source_ptr + e, ok_e, -1), tl.load(image_ptr + e, ok_e, 0)
        edge, degree = _spread(e0, e, l, BLOCK_E, L, FLAT)
        exists = edge < e_last
        fx, fy, fz = read3(v_ptr, edge, exists)
        edge_source, edge_image = tl.load(source_ptr + edge, exists, -1), tl.load(image_ptr + edge, exists, 0)
        sums = tl.zeros((L, BLOCK_E * L, CP), ACC)
        if DOUBLE:
            ex_u, ey_u, ez_u = read3(v_u, e, ok_e)
            fx_u, fy_u, fz_u = read3(v_u, edge, exists)
            sums_u = tl.zeros((L, BLOCK_E * L, CP), ACC)
        for q in range(tl.load(m_ptr + atom), tl.load(m_ptr + atom + 1)):
            qx, qy, qz = read3(vm_ptr, q, True)
            b, q_image = tl.load(m_source + q), tl.load(m_image + q)
            first, last = input_range(ptr, b, K)
            c_not_b = exists & ~((edge_source == b) & (edge_image == q_image))
            cosine = fx * qx + fy * qy + fz * qz
            y_l = tl.reshape(tl.where(c_not_b, legendre(cosine, degree, S, 0), 0.0), (L, BLOCK_E * L))
            px, py, pz, _p_scale, p_regular = normal(ex, ey, ez, qx, qy, qz, EPS)
            u = tl.zeros((BLOCK_E * L, CP), ACC)
            if DOUBLE:
                qx_u, qy_u, qz_u = read3(vm_u, q, True)
                cosine_u = fx_u * qx + fy_u * qy + fz_u * qz + fx * qx_u + fy * qy_u + fz * qz_u
                y_l_u = tl.where(c_not_b, legendre(cosine, degree, S, 1) * cosine_u, 0.0)
                y_l_u = tl.reshape(y_l_u, (L, BLOCK_E * L))
                px_u, py_u, pz_u, _p_slope = normal_along(
                    ex, ey, ez, qx, qy, qz, ex_u, ey_u, ez_u, qx_u, qy_u, qz_u, EPS
                )
                u_u = tl.zeros((BLOCK_E * L, CP), ACC)
            for d0 in range(first, last, BLOCK_D):
                d, row, ok, valid, dx, dy, dz, _ = inputs_of(
                    q, atom, first, d0, last, v_ptr, source_ptr, image_ptr, qx, qy, qz, q_image, K, BLOCK_D
                )
                nx, ny, nz, _, n_regular = normal(dx, dy, dz, qx, qy, qz, EPS)
                valid = quadruplet_valid(d, valid, ok_e, source_ptr, image_ptr, q_image, e_source, e_image)
                dihedral = outer_dot(px, py, pz, nx, ny, nz)
                y = tl.where(valid, legendre(dihedral, k[:, None], S, 0), 0.0)
                v = read_rows(value, row, ok, C, CP, ACC)
                u = tl.dot(y, v, u, input_precision=DOT, out_dtype=ACC)
                if DOUBLE:
                    dx_u, dy_u, dz_u = read3(v_u, d, ok)
                    nx_u, ny_u, nz_u, _ = normal_along(dx, dy, dz, qx, qy, qz, dx_u, dy_u, dz_u, qx_u, qy_u, qz_u, EPS)
                    dihedral_u = outer_dot(px_u, py_u, pz_u, nx, ny, nz) + outer_dot(px, py, pz, nx_u, ny_u, nz_u)
                    valid = valid & p_regular[:, None] & n_regular[None, :]
                    y_u = tl.where(valid, legendre(dihedral, k[:, None], S, 1) * dihedral_u, 0.0)
                    u_u = tl.dot(y_u, v, u_u, input_precision=DOT, out_dtype=ACC)
                    v_along = read_rows(value_u, row, ok, C, CP, ACC)
                    u_u = tl.dot(y, v_along, u_u, input_precision=DOT, out_dtype=ACC)
            sums += y_l[:, :, None] * u[None, :, :]
            if DOUBLE:
                sums_u += y_l_u[:, :, None] * u[None, :, :] + y_l[:, :, None] * u_u[None, :, :]
        if CONTRACT:
            by_edge = tl.permute(tl.reshape(sums, (L, BLOCK_E, L, CP)), (1, 0, 2, 3))
            by_edge = tl.reshape(by_edge, (BLOCK_E, L * L, CP))
            row, a = e0 + tl.arange(0, BLOCK_E), tl.arange(0, AP)
            lk = tl.arange(0, L * L)
            exists = ((row < e_last)[:, None] & (a < A)[None, :])[:, :, None]
            exists = exists & ((lk // L < S) & (lk % L < S))[None, None, :]
            place = (row[:, None] * A + a[None, :])[:, :, None] * (S * S) + (lk // L * S + lk % L)[None, None, :]
            w = tl.load(w_ptr + place, exists, 0.0).to(ACC)
            mixed = tl.reshape(tl.dot(w, by_edge, input_precision=DOT, out_dtype=ACC), (BLOCK_E * AP, CP))
            g = tl.arange(0, BLOCK_E * AP)
            write_rows(out, (e0 + g // AP) * A + g % AP, (g % AP < A) & (e0 + g // AP < e_last), mixed, C, CP)
        else:
            write_sums(out, e, k, l, ok_e, sums, C, CP, S)
            if DOUBLE:
                write_sums(out_u, e, k, l, ok_e, sums_u, C, CP, S)


@triton.jit
def write_sums(out, e, k, l, ok_e, sums, C: tl.constexpr, CP: tl.constexpr, S: tl.constexpr):
    """Write a tile [l, (e, k), c] into an array [E, S, S, C]."""
    c = tl.arange(0, CP)
    row = (e[None, :] * S + l[:, None]) * S + k[None, :]
    exists = (ok_e & (k < S))[None, :] & (l < S)[:, None]
    tl.store(out + row[:, :, None] * C + c[None, None, :], sums, exists[:, :, None] & (c < C)[None, None, :])


@triton.jit
def quadruplet_valid(d, valid, ok_e, source_ptr, image_ptr, q_image, e_source, e_image):
    """Return where e and d exist and d is not the same image as c, [(e, k), d]."""
    source, image = tl.load(source_ptr + d, valid, -2), tl.load(image_ptr + d, valid, 0)
    same = (e_source[:, None] == source[None, :]) & (e_image[:, None] == (image + q_image)[None, :])
    return ok_e[:, None] & valid[None, :] & ~same


@dataclass(frozen=True)
class Problem:
    """The checked, contiguous arguments of a quadruplet op, and the options that every kernel gets."""

    inputs: list[Tensor]
    """The inputs with gradients: x, filter, weight, v, v_middle."""
    edges: list[Tensor]
    """Pointers, sources and images of the main edges, then those of the middle edges."""
    options: dict[str, Any]
    max_degree: int

    @property
    def num_atoms(self) -> int:
        """Number of atoms, N."""
        return self.edges[0].numel() - 1

    def run(self, kernel: triton.JITFunction, name: str, arguments: list[Tensor | int], **more: Any) -> None:
        """Launch a kernel on every atom, in the settings of `name`."""
        options = self.options | more | launch.config(name, self.inputs[0])
        if "BLOCK_E" in options:
            options["L"] = launch.power_of_2(options["S"], 16 // options["BLOCK_E"])
        wanted = {key: value for key, value in options.items() if key in kernel.arg_names or key.startswith("num_")}
        if self.num_atoms > 0:
            with launch.on_device(self.inputs[0]):
                kernel[(self.num_atoms, options["SPLIT"])](*arguments, **wanted)

    def rows(self, width: int) -> Tensor:
        """Return uninitialised memory for the rows (q, d)."""
        x, v = self.inputs[0], self.inputs[3]
        return x.new_empty(self.edges[4].shape[0] * self.max_degree, width, dtype=v.dtype)

    def values(self, along: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return the values and their derivative (the values again without directions)."""
        x, f, _, v, v_middle = self.inputs
        x_u, f_u, _, v_u, vm_u = along or self.inputs
        value = self.rows(x.shape[1])
        value_u = self.rows(x.shape[1]) if along else value
        arguments = [x_u, f_u, v_u, vm_u, x, f, v, v_middle, *self.edges, value_u, value, self.max_degree]
        self.run(values_kernel, "quadruplet_values", arguments, DOUBLE=along is not None)
        return value, value_u

    def sums(self, values: tuple[Tensor, Tensor], along: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return the sums [E, S^2, C] and their derivative (the sums again without directions)."""
        x, _, weight, v, v_middle = self.inputs
        _, _, _, v_u, vm_u = along or self.inputs
        out = x.new_empty(weight.shape[0], weight.shape[2], x.shape[1], dtype=v.dtype)
        out_u = torch.empty_like(out) if along else out
        value, value_u = values
        arguments = [v_u, vm_u, weight, v, v_middle, *self.edges, value_u, value, out_u, out, self.max_degree]
        name = "quadruplet_sums_double" if along else "quadruplet_sums"
        self.run(_sums_kernel, name, arguments, DOUBLE=along is not None, CONTRACT=False)
        return out, out_u


ARGUMENTS = (
    "Tensor x, Tensor filter, Tensor weight, Tensor v, Tensor v_middle, Tensor ptr, Tensor source, Tensor image, "
    "Tensor middle_ptr, Tensor middle_source, Tensor middle_image, float eps, int max_degree"
)


@launch.define(f"quadruplet({ARGUMENTS}) -> Tensor")
def quadruplet(*arguments: Any) -> Tensor:
    """Sum input edges over quadruplets, see `ejmp_kernels.quadruplet.quadruplet`."""
    problem = prepare(*arguments, low_weight=True)
    x, _, weight, v, v_middle = problem.inputs
    value, _ = problem.values(None)
    out = x.new_empty(weight.shape[0], weight.shape[1] * x.shape[1])
    read = [v, v_middle, weight, v, v_middle, *problem.edges, value, value, out, out, problem.max_degree]
    problem.run(_sums_kernel, "quadruplet", read, DOUBLE=False, CONTRACT=True)
    return out


def prepare(*arguments: Any, low_weight: bool = False) -> Problem:
    """Check the arguments of the op.

    Args:
        arguments: of the op.
        low_weight: whether the weight may be in the type of the features, and not only in that of sums.

    Raises:
        ValueError: if shapes, types or devices do not fit together.
    """
    *tensors, eps, max_degree = arguments
    x, f, weight, v, v_middle, ptr, source, image, m_ptr, m_source, m_image = tensors
    axes = {"x": (x, 2), "filter": (f, 3), "weight": (weight, 3), "ptr": (ptr, 1)}
    axes |= {"source": (source, 1), "middle_source": (m_source, 1)}
    rows = {name: launch.check_rows("quadruplet", name, *pair) for name, pair in axes.items()}
    num_edges, num_middle, num_atoms = rows["source"], rows["middle_source"], max(rows["ptr"] - 1, 0)
    channels, embedding, spherical = x.shape[1], weight.shape[1], f.shape[1]
    real, ids = (launch.sums_dtype(x),), (torch.int64,)
    launch.check_arguments(
        "quadruplet",
        x.device,
        x=(x, launch.REAL, (num_edges, channels)),
        filter=(f, real, (num_middle, spherical, channels)),
        weight=(weight, (*real, x.dtype) if low_weight else real, (num_edges, embedding, spherical**2)),
        v=(v, real, (num_edges, 3)),
        v_middle=(v_middle, real, (num_middle, 3)),
        ptr=(ptr, ids, (num_atoms + 1,)),
        source=(source, ids, (num_edges,)),
        image=(image, ids, (num_edges,)),
        middle_ptr=(m_ptr, ids, (num_atoms + 1,)),
        middle_source=(m_source, ids, (num_middle,)),
        middle_image=(m_image, ids, (num_middle,)),
    )
    for side, p, ends, images in (("", ptr, source, image), ("middle_", m_ptr, m_source, m_image)):
        launch.check_image("quadruplet", f"{side}image", images)
        launch.check_ptr("quadruplet", f"{side}ptr", p, ends.shape[0])
        launch.check_ids("quadruplet", f"{side}source", ends, num_atoms)
    if not 0 < spherical <= launch.MOST_SPHERICAL:
        raise ValueError(
            f"quadruplet: filter must have 1..{launch.MOST_SPHERICAL} spherical functions, got {spherical}"
        )
    if not 0 < eps < math.inf:
        raise ValueError(f"quadruplet: eps must be positive, got {eps}")
    longest = 0 if ptr.is_cuda or not num_atoms else int(ptr.diff().max())
    if max_degree < longest:
        raise ValueError(f"quadruplet: max_degree must be {longest}, the most edges into one atom, got {max_degree}")
    options = {
        "C": channels, "CP": launch.power_of_2(channels, 16),
        "A": embedding, "AP": launch.power_of_2(embedding, 16),
        "S": spherical, "SP": launch.power_of_2(spherical, 16),
        "EPS": eps, "ACC": launch.accumulator(x), "DOT": launch.dot_precision(x),
    }  # fmt: skip
    tensors = [t.contiguous() for t in tensors]
    return Problem(tensors[:5], tensors[5:], options, min(max_degree, num_edges))
