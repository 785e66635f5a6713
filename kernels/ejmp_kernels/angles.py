"""Triplets and quadruplets in plain torch: padded tables of neighbours and the spherical functions of their angles.

The specification of what native and Triton kernels evaluate on the fly. Model code computes them once per forward and
shares them among the blocks. Letters as in `reference`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ejmp_kernels import reference
from ejmp_kernels.edges import Edges


@dataclass(frozen=True, kw_only=True)
class Triplets:
    """Input edges of each output edge; see `ejmp_kernels.reference.triplet_sum`."""

    table: Tensor
    """[E_out, K] ids of input edges, padded; every pair at one atom, also those that are masked."""
    valid: Tensor
    """[E_out, K] bool, which of them form a triplet."""
    angular: Tensor
    """[E_out, S, K]."""

    def counts(self, num_inputs: int) -> Tensor:
        """Return how many triplets each of the input edges takes part in, [E_in] float."""
        weights = self.valid.flatten().to(self.angular.dtype)
        return torch.bincount(self.table.flatten(), weights=weights, minlength=num_inputs + 1)[:num_inputs]


@dataclass(frozen=True, kw_only=True)
class Quadruplets:
    """Quadruplets d->b->a<-c: middle edges b->a of each output edge c->a, input edges d->b of each middle edge."""

    inputs: Tensor
    """[E_mid, K] ids of input edges d->b, padded."""
    inputs_valid: Tensor
    """[E_mid, K] bool, d is not a."""
    circular: Tensor
    """[E_mid, S, K], spherical functions of the angle a-b-d."""
    middles: Tensor
    """[E_out, K_mid] ids of middle edges b->a, padded."""
    middles_valid: Tensor
    """[E_out, K_mid] bool, b is not c."""
    valid: Tensor
    """[E_out, K_mid, K] bool, the quadruplets."""
    angular: Tensor
    """[E_out, S^2, K_mid * K], zero where not valid."""


def collinear_eps(dtype: torch.dtype) -> float:
    """Return |sin(angle)| under which a dihedral angle is undefined: 1e-6 in float64, 1e-4 below."""
    return 1e-6 if dtype == torch.float64 else 1e-4


def triplets(out: Edges, into: Edges, num_spherical: int, *, same_set: bool = False) -> Triplets:
    """Pair each edge c->a of `out` with every edge b->a of `into`, except the same edge or the same image of c."""
    table = reference.neighbor_table(out.target, into.ptr, into.max_degree)
    valid = table < into.num_edges
    if same_set:
        valid &= table != torch.arange(out.num_edges, device=table.device)[:, None]
    else:
        valid &= ~_comes_from(into, table, out.source, out.image)
    cosine = (reference.gather(into.vector, table) @ out.vector[:, :, None]).squeeze(-1)
    angular = reference.legendre(cosine, num_spherical) * valid[..., None]
    return Triplets(table=table, valid=valid, angular=angular.mT.contiguous())


def _comes_from(edges: Edges, table: Tensor, source: Tensor, image: Tensor) -> Tensor:
    """Return where the edges of a table [E, K] start at the given image [E] of the given atom [E]."""
    same_atom = reference.gather(edges.source, table) == source[:, None]
    return same_atom & (reference.gather(edges.image, table) == image[:, None])


def quadruplets(main: Edges, quad: Edges, num_spherical: int) -> Quadruplets:
    """Form d->b->a<-c with d != a, b != c, d != c, image-wise.

    With p = V_ca x V_ba and q = V_db x V_ba, the cosine of the dihedral angle is p.q / |p||q|. Where p or q vanishes
    (three atoms on a line) it goes to zero and passes no gradient.
    """
    eps = collinear_eps(main.vector.dtype)
    inputs = reference.neighbor_table(quad.source, main.ptr, main.max_degree)
    # d is a if the source of d->b is a and its image undoes that of b->a.
    inputs_valid = (inputs < main.num_edges) & ~_comes_from(main, inputs, quad.target, -quad.image)
    v_db = reference.gather(main.vector, inputs)
    circular = reference.legendre((v_db @ quad.vector[:, :, None]).squeeze(-1), num_spherical)
    q, q_regular = reference.unit_or_small(torch.linalg.cross(v_db, quad.vector[:, None].expand_as(v_db)), eps)

    middles = reference.neighbor_table(main.target, quad.ptr, quad.max_degree)
    middles_valid = (middles < quad.num_edges) & ~_comes_from(quad, middles, main.source, main.image)
    v_ba = reference.gather(quad.vector, middles)
    y_cab = reference.legendre((v_ba @ main.vector[:, :, None]).squeeze(-1), num_spherical)
    p, p_regular = reference.unit_or_small(torch.linalg.cross(main.vector[:, None].expand_as(v_ba), v_ba), eps)

    d_atom = reference.gather(reference.gather(main.source, inputs), middles)
    d_image = reference.gather(reference.gather(main.image, inputs) + quad.image[:, None], middles)
    d_is_c = (d_atom == main.source[:, None, None]) & (d_image == main.image[:, None, None])
    valid = reference.gather(inputs_valid, middles) & middles_valid[..., None] & ~d_is_c
    dihedral = (reference.gather(q, middles) @ p[..., None]).squeeze(-1)
    regular = reference.gather(q_regular, middles) & p_regular[..., None]
    y_dihedral = reference.legendre(torch.where(regular, dihedral, dihedral.detach()), num_spherical)
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
    summed = reference.triplet_sum(x, weight, found.table, found.angular)
    return reference.segment_sum(summed, out.target, len(out.ptr) - 1) if to_atoms else summed


def quadruplet(x: Tensor, filters: Tensor, weight: Tensor, main: Edges, middle: Edges) -> Tensor:
    """Sum over quadruplets as `ejmp_kernels.quadruplet.quadruplet` does."""
    found = quadruplets(main, middle, filters.shape[1])
    values = reference.gather(x, found.inputs) * (found.circular.mT @ filters) * found.inputs_valid[..., None]
    return reference.quadruplet_sum(values, weight, found.middles, found.angular)


def pair(h: Tensor, radial: Tensor, ptr: Tensor, source: Tensor) -> Tensor:
    """Sum over pairs as `ejmp_kernels.pair.pair` does."""
    atoms = torch.arange(len(h), device=h.device)
    table = reference.neighbor_table(atoms, ptr, int(ptr.diff().max()))
    return reference.pair_sum(h, radial, source, table)
