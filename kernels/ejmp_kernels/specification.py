"""Every operation in plain torch: the specification that the native and Triton kernels are tested against.

Letters: N atoms, E edges, K most edges into one atom, C channels, S spherical functions, A embedding of a basis.

Neighbour sums run over tables: for each output edge, the ids of the input edges that end at the same atom, padded to
the largest in-degree with an id one past the last edge, which stands for a row of zeros. Kernels walk CSR pointers
instead and never form a table.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ejmp_kernels.edges import Edges


def legendre(cosine: Tensor, num_spherical: int) -> Tensor:
    """Return Y_l0(cosine) = sqrt((2l+1)/4pi) P_l(cosine) for l < num_spherical, stacked last: [..., S].

    By Bonnet's recursion, l P_l = (2l-1) x P_{l-1} - (l-1) P_{l-2}. Polynomials need no clamp at |x| = 1.
    """
    values = [torch.ones_like(cosine), cosine]
    for degree in range(2, num_spherical):
        values.append(((2 * degree - 1) * cosine * values[-1] - (degree - 1) * values[-2]) / degree)
    norm = [math.sqrt((2 * degree + 1) / (4 * math.pi)) for degree in range(num_spherical)]
    return torch.stack([y * c for y, c in zip(values, norm, strict=False)], dim=-1)


def unit_or_small(vector: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return v / max(|v|, eps), [..., 3], and whether |v| > eps, [...]; no gradient flows where it is not."""
    squared = (vector * vector).sum(-1)
    regular = squared > eps * eps
    scale = torch.where(regular, squared, eps * eps).rsqrt()
    return torch.where(regular[..., None], vector, vector.detach()) * scale[..., None], regular


def gaussian_basis(distance: Tensor, offset: Tensor, temps: Tensor, cutoff: float, exponent: int) -> Tensor:
    """Return u(d') exp(-t_k (d' - o_k)^2) with d' = distance / cutoff, [E] -> [E, R].

    u is the polynomial envelope of order p = exponent (DimeNet, arXiv 2003.03123): u(1) = u'(1) = u''(1) = 0.
    """
    p = float(exponent)
    x = distance / cutoff
    a, b, c = -(p + 1) * (p + 2) / 2, p * (p + 2), -p * (p + 1) / 2
    envelope = torch.where(x < 1, 1 + x**p * (a + x * (b + x * c)), 0.0)
    return envelope[:, None] * torch.exp(-temps * (x[:, None] - offset) ** 2)


def neighbor_table(atom: Tensor, ptr: Tensor, max_degree: int) -> Tensor:
    """Return for each row the ids of the edges into its atom, padded with the number of edges.

    Args:
        atom: [E_out], an atom per row.
        ptr: [N + 1], CSR pointers of the input edges.
        max_degree: K.

    Returns:
        [E_out, K] int64.
    """
    first, last = ptr[atom], ptr[atom + 1]
    table = first[:, None] + torch.arange(max_degree, device=ptr.device)
    return torch.where(table < last[:, None], table, ptr[-1])


def pad(x: Tensor) -> Tensor:
    """Append the row of zeros that padded ids point to."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


def gather(x: Tensor, table: Tensor) -> Tensor:
    """Look up rows by a padded table: [E_in, ...], [E_out, K] -> [E_out, K, ...]."""
    return pad(x).index_select(0, table.flatten()).unflatten(0, table.shape)


def segment_sum(x: Tensor, target: Tensor, num_atoms: int) -> Tensor:
    """Sum rows by target: [E, ...] -> [N, ...]."""
    return x.new_zeros(num_atoms, *x.shape[1:]).index_add(0, target, x)


def triplet_sum(x: Tensor, weight: Tensor, table: Tensor, angular: Tensor) -> Tensor:
    """Sum input edges over triplets and contract with the output edge's basis.

    out[e, a, c] = sum_l weight[e, a, l] sum_k angular[e, l, k] x[table[e, k], c]. The quadruplet sum has the same form
    with its 49 spherical functions.

    Args:
        x: [E_in, C].
        weight: [E_out, A, S].
        table: [E_out, K] ids into x, padded.
        angular: [E_out, S, K], zero for pairs that are not a triplet.

    Returns:
        [E_out, A * C], basis-major.
    """
    summed = angular @ gather(x, table)
    return (weight @ summed).flatten(1)


def quadruplet_sum(x: Tensor, weight: Tensor, table: Tensor, angular: Tensor) -> Tensor:
    """Sum the triplet values d->b->a of all middle edges b->a over quadruplets; see `triplet_sum`.

    Args:
        x: [E_mid, K, C], values of the edges d->b for each middle edge b->a.
        weight: [E_out, A, S^2].
        table: [E_out, K_mid] ids of middle edges, padded.
        angular: [E_out, S^2, K_mid * K].

    Returns:
        [E_out, A * C], basis-major.
    """
    summed = angular @ gather(x, table).flatten(1, 2)
    return (weight @ summed).flatten(1)


def pair_sum(h: Tensor, radial: Tensor, source: Tensor, table: Tensor) -> Tensor:
    """Sum neighbours of each atom times their radial basis: out[n, r, c] = sum_e radial[e, r] h[source[e], c].

    Args:
        h: [N, C].
        radial: [E, R].
        source: [E].
        table: [N, K] edges into each atom, padded.

    Returns:
        [N, R * C], radial-major.
    """
    neighbors = gather(h.index_select(0, source), table)
    return (gather(radial, table).mT @ neighbors).flatten(1)


def atom_sum(m: Tensor, radial: Tensor, target: Tensor, num_atoms: int) -> Tensor:
    """Sum edge values times their radial filter into atoms: [E, M], [E, M] -> [N, M]."""
    return segment_sum(m * radial, target, num_atoms)


def activate(
    x: Tensor, factor: Tensor | None = None, add: Tensor | None = None, *, scale: float = 1.0, add_scale: float = 1.0
) -> Tensor:
    """Return scale * ScaledSiLU(x) * factor + add_scale * add, all of one shape; ScaledSiLU(x) = silu(x) / 0.6."""
    out = torch.nn.functional.silu(x) * (scale / 0.6)
    out = out if factor is None else out * factor
    return out if add is None else out + add_scale * add


def quantized(x: Tensor) -> Tensor:
    """Return a matrix [rows, columns] with each row rounded to multiples of its largest value / 127."""
    largest = x.abs().amax(dim=1, keepdim=True)
    steps = torch.where(largest > 0, largest, 1.0) / 127
    return (x / steps).round() * steps


def swap_add(x: Tensor, swap: Tensor, add: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
    """Return scale * (ScaledSiLU(x[e, 0]) + ScaledSiLU(x[counter-edge of e, 1])) + add[e], [E, 2 M] -> [E, M]."""
    to_edge, to_counter = activate(x, scale=scale).chunk(2, dim=1)
    out = to_edge + to_counter.index_select(0, swap)
    return out if add is None else out + add


def gather_add(x: Tensor | None, source_rows: Tensor, target_rows: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Return x[e] + source_rows[source[e]] + target_rows[target[e]], [E, M]."""
    out = source_rows.index_select(0, source) + target_rows.index_select(0, target)
    return out if x is None else out + x


@dataclass(frozen=True, kw_only=True)
class Triplets:
    """The input edges of each output edge, as tables for `triplet_sum`."""

    table: Tensor
    """Ids of the input edges at the atom of each output edge, masked ones too, [E_out, K] padded."""
    valid: Tensor
    """Which pairs of the table form a triplet, [E_out, K] bool."""
    angular: Tensor
    """Spherical functions of the angles, zero where there is no triplet, [E_out, S, K]."""

    def counts(self, num_inputs: int) -> Tensor:
        """Return how many triplets each of the input edges takes part in, [E_in] float."""
        weights = self.valid.flatten().to(self.angular.dtype)
        return torch.bincount(self.table.flatten(), weights=weights, minlength=num_inputs + 1)[:num_inputs]


@dataclass(frozen=True, kw_only=True)
class Quadruplets:
    """Tables of quadruplets d->b->a<-c: middle edges b->a by output edge c->a, and input edges d->b by middle edge."""

    inputs: Tensor
    """Ids of the input edges d->b of each middle edge, [E_mid, K] padded."""
    inputs_valid: Tensor
    """Whether d is another image than a, [E_mid, K] bool."""
    circular: Tensor
    """Spherical functions of the angle a-b-d, [E_mid, S, K]."""
    middles: Tensor
    """Ids of the middle edges b->a of each output edge, [E_out, K_mid] padded."""
    middles_valid: Tensor
    """Whether b is another image than c, [E_out, K_mid] bool."""
    valid: Tensor
    """Which paths form a quadruplet, [E_out, K_mid, K] bool."""
    angular: Tensor
    """Products of spherical functions of both angles, zero where there is no quadruplet, [E_out, S^2, K_mid * K]."""


def collinear_eps(dtype: torch.dtype) -> float:
    """Return |sin(angle)| under which a dihedral angle is undefined: 1e-6 in float64, 1e-4 below."""
    return 1e-6 if dtype == torch.float64 else 1e-4


def triplets(out: Edges, into: Edges, num_spherical: int, *, same_set: bool = False) -> Triplets:
    """Pair each edge c->a of `out` with every edge b->a of `into`, except the same edge or the same image of c."""
    table = neighbor_table(out.target, into.ptr, into.max_degree)
    valid = table < into.num_edges
    if same_set:
        valid &= table != torch.arange(out.num_edges, device=table.device)[:, None]
    else:
        valid &= ~_comes_from(into, table, out.source, out.image)
    cosine = (gather(into.vector, table) @ out.vector[:, :, None]).squeeze(-1)
    angular = legendre(cosine, num_spherical) * valid[..., None]
    return Triplets(table=table, valid=valid, angular=angular.mT.contiguous())


def _comes_from(edges: Edges, table: Tensor, source: Tensor, image: Tensor) -> Tensor:
    """Return where the edges of a table [E, K] start at the given image [E] of the given atom [E]."""
    same_atom = gather(edges.source, table) == source[:, None]
    return same_atom & (gather(edges.image, table) == image[:, None])


def quadruplets(main: Edges, quad: Edges, num_spherical: int) -> Quadruplets:
    """Form d->b->a<-c with d != a, b != c, d != c, image-wise.

    With p = V_ca x V_ba and q = V_db x V_ba, the cosine of the dihedral angle is p.q / |p||q|. Where p or q vanishes
    (three atoms on a line) it goes to zero and passes no gradient.
    """
    eps = collinear_eps(main.vector.dtype)
    inputs = neighbor_table(quad.source, main.ptr, main.max_degree)
    # d is a if the source of d->b is a and its image undoes that of b->a.
    inputs_valid = (inputs < main.num_edges) & ~_comes_from(main, inputs, quad.target, -quad.image)
    v_db = gather(main.vector, inputs)
    circular = legendre((v_db @ quad.vector[:, :, None]).squeeze(-1), num_spherical)
    q, q_regular = unit_or_small(torch.linalg.cross(v_db, quad.vector[:, None].expand_as(v_db)), eps)

    middles = neighbor_table(main.target, quad.ptr, quad.max_degree)
    middles_valid = (middles < quad.num_edges) & ~_comes_from(quad, middles, main.source, main.image)
    v_ba = gather(quad.vector, middles)
    y_cab = legendre((v_ba @ main.vector[:, :, None]).squeeze(-1), num_spherical)
    p, p_regular = unit_or_small(torch.linalg.cross(main.vector[:, None].expand_as(v_ba), v_ba), eps)

    d_atom = gather(gather(main.source, inputs), middles)
    d_image = gather(gather(main.image, inputs) + quad.image[:, None], middles)
    d_is_c = (d_atom == main.source[:, None, None]) & (d_image == main.image[:, None, None])
    valid = gather(inputs_valid, middles) & middles_valid[..., None] & ~d_is_c
    dihedral = (gather(q, middles) @ p[..., None]).squeeze(-1)
    regular = gather(q_regular, middles) & p_regular[..., None]
    y_dihedral = legendre(torch.where(regular, dihedral, dihedral.detach()), num_spherical)
    y_dihedral = y_dihedral * valid[..., None]
    angular = y_cab.mT[:, :, None, :, None] * y_dihedral.permute(0, 3, 1, 2)[:, None]
    return Quadruplets(
        inputs=inputs,
        inputs_valid=inputs_valid,
        circular=circular.mT,
        middles=middles,
        middles_valid=middles_valid,
        valid=valid,
        angular=angular.reshape(main.num_edges, num_spherical**2, quad.max_degree * main.max_degree),
    )


def triplet(x: Tensor, weight: Tensor, out: Edges, into: Edges, *, to_atoms: bool = False) -> Tensor:
    """Sum over triplets as `ejmp_kernels.triplet.triplet` does."""
    found = triplets(out, into, weight.shape[2])
    summed = triplet_sum(x, weight, found.table, found.angular)
    return segment_sum(summed, out.target, len(out.ptr) - 1) if to_atoms else summed


def quadruplet(x: Tensor, filters: Tensor, weight: Tensor, main: Edges, middle: Edges) -> Tensor:
    """Sum over quadruplets as `ejmp_kernels.quadruplet.quadruplet` does."""
    found = quadruplets(main, middle, filters.shape[1])
    values = gather(x, found.inputs) * (found.circular.mT @ filters) * found.inputs_valid[..., None]
    return quadruplet_sum(values, weight, found.middles, found.angular)
