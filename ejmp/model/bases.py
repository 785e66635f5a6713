"""Radial bases and their projections, shared by all interaction blocks, and the edge embedding."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ejmp.graph.graph import AtomGraph
from ejmp.model.config import JMPConfig
from ejmp.model.layers import Dense, Linear, he_orthogonal_
from ejmp_kernels import specification


class GaussianBasis(nn.Module):
    """The centres and inverse widths of the Gaussians, with the float32 values that upstream stores."""

    offset: Tensor
    temps: Tensor

    def __init__(self, num_radial: int) -> None:
        super().__init__()
        self.register_buffer("offset", torch.linspace(0, 1, num_radial))
        self.register_buffer("temps", torch.full((num_radial,), 0.5 * (num_radial - 1) ** 2))


class RadialBasis(nn.Module):
    """Gaussians under a polynomial envelope, zero from the cutoff on, which may differ by edge set."""

    def __init__(self, config: JMPConfig) -> None:
        super().__init__()
        self.cutoffs = config.rbf_cutoffs
        self.exponent = config.envelope_exponent
        self.rbf = GaussianBasis(config.num_radial)

    def forward(self, distance: Tensor, edges: str = "main") -> Tensor:
        """Map distances [E] in A of an edge set to [E, R]."""
        offset, temps = self.rbf.offset.to(distance.dtype), self.rbf.temps.to(distance.dtype)
        return specification.gaussian_basis(distance, offset, temps, self.cutoffs[edges], self.exponent)


class RadialHolder(nn.Module):
    """A place in upstream's state dict: every circular and spherical basis there carries its own radial basis."""

    def __init__(self, radial_basis: RadialBasis) -> None:
        super().__init__()
        self.radial_basis = radial_basis


class BasisProjection(nn.Module):
    """Project radial functions onto an embedding for each spherical function.

    The weight is stored [R, S, A]; the product with it is viewed, not transposed, as [E, A, S]: upstream's memory
    order, which checkpoints depend on.
    """

    def __init__(self, num_radial: int, num_spherical: int, emb_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_radial, num_spherical, emb_size))
        he_orthogonal_(self.weight)

    def forward(self, radial: Tensor) -> Tensor:
        """Map [E, R] to [E, A, S]."""
        _, num_spherical, emb_size = self.weight.shape
        return (radial @ self.weight.flatten(1)).view(-1, emb_size, num_spherical)


class PairProjection(nn.Module):
    """A bare [rbf, R] weight (upstream keeps the atom-atom radial projection as one)."""

    def __init__(self, num_radial: int, emb_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(emb_size, num_radial))
        he_orthogonal_(self.weight)

    def forward(self, radial: Tensor) -> Tensor:
        """Map [E, R] to [E, rbf]."""
        return nn.functional.linear(radial, self.weight)


class EdgeEmbedding(nn.Module):
    """A dense layer on [h_source, h_target, x]: it makes the first edge features, and updates them at a block's end."""

    def __init__(self, num_atom: int, num_edge: int, num_out: int) -> None:
        super().__init__()
        self.dense = Dense(2 * num_atom + num_edge, num_out)

    def forward(self, h: Tensor, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Map atoms [N, C] and edges [E, .] to edges [E, M]."""
        return self.dense(torch.cat([h.index_select(0, source), h.index_select(0, target), x.to(h.dtype)], dim=-1))


@dataclass(frozen=True, kw_only=True)
class ProjectedBases:
    """Projected bases of one graph; every interaction block reads the same."""

    rbf_quad: Tensor
    """Radial basis on main edges for the quadruplet interaction, [E, rbf]."""
    rbf_trip: Tensor
    """Radial basis on main edges for the edge-to-edge interaction, [E, rbf]."""
    rbf_edge_atom: Tensor
    """Radial basis on main edges for the edge-to-atom interaction, [E, rbf]."""
    rbf_atom_update: Tensor
    """Radial basis on main edges for the updates of atoms in blocks, [E, rbf]."""
    rbf_out: Tensor
    """Radial basis on main edges for the output blocks, [E, rbf]."""
    rbf_atom_edge: Tensor
    """Radial basis on atom edges for the atom-to-edge interaction, [E_atom_edges, rbf]."""
    rbf_pair: Tensor
    """Radial basis on atom pairs, [E_pairs, rbf]."""
    cbf_trip: Tensor
    """Circular basis of the edge-to-edge interaction's outputs, [E, cbf, S]."""
    cbf_atom_edge: Tensor
    """Circular basis of the atom-to-edge interaction's outputs, [E, cbf, S]."""
    cbf_edge_atom: Tensor
    """Circular basis of the edge-to-atom interaction's outputs, [E_atom_edges, cbf, S]."""
    cbf_quad: Tensor
    """Circular basis of the quadruplets' middle edges, [E_quad, cbf, S]."""
    sbf_quad: Tensor
    """Spherical basis of the quadruplet interaction's outputs, [E, sbf, S^2]."""


@dataclass(frozen=True, kw_only=True)
class BasisValues(ProjectedBases):
    """Projected bases of one graph, and the unprojected one that the first edge embedding reads."""

    radial: Tensor
    """Radial basis on main edges before any projection, [E, R]."""


class Bases(nn.Module):
    """All bases and projections (upstream: `backbone.bases`)."""

    def __init__(self, config: JMPConfig) -> None:
        super().__init__()
        radial, spherical = config.num_radial, config.num_spherical
        self.num_spherical = spherical
        basis = RadialBasis(config)
        self.radial_basis = basis
        for name in ("cbf_basis_qint", "sbf_basis_qint", "cbf_basis_aeint", "cbf_basis_eaint", "cbf_basis_tint"):
            self.add_module(name, RadialHolder(basis))
        self.radial_basis_aeaint = basis
        self.radial_basis_aint = basis
        self.mlp_rbf_qint = Linear(radial, config.emb_size_rbf)
        self.mlp_cbf_qint = BasisProjection(radial, spherical, config.emb_size_cbf)
        self.mlp_sbf_qint = BasisProjection(radial, spherical**2, config.emb_size_sbf)
        self.mlp_rbf_aeint = Linear(radial, config.emb_size_rbf)
        self.mlp_cbf_aeint = BasisProjection(radial, spherical, config.emb_size_cbf)
        self.mlp_rbf_eaint = Linear(radial, config.emb_size_rbf)
        self.mlp_cbf_eaint = BasisProjection(radial, spherical, config.emb_size_cbf)
        self.mlp_rbf_aint = PairProjection(radial, config.emb_size_rbf)
        self.mlp_rbf_tint = Linear(radial, config.emb_size_rbf)
        self.mlp_cbf_tint = BasisProjection(radial, spherical, config.emb_size_cbf)
        self.mlp_rbf_h = Linear(radial, config.emb_size_rbf)
        self.mlp_rbf_out = Linear(radial, config.emb_size_rbf)
        self.edge_emb = EdgeEmbedding(config.emb_size_atom, radial, config.emb_size_edge)

    def forward(self, graph: AtomGraph) -> BasisValues:
        """Evaluate every basis on a graph."""
        main = self.radial_basis(graph.main.distance)
        near = self.radial_basis(graph.atom_edges.distance, "atom_edges")
        quad = self.radial_basis(graph.quad_edges.distance, "quad_edges")
        pairs = self.radial_basis(graph.atom_pairs.distance, "atom_pairs")
        return BasisValues(
            radial=main,
            rbf_quad=self.mlp_rbf_qint(main),
            rbf_trip=self.mlp_rbf_tint(main),
            rbf_edge_atom=self.mlp_rbf_eaint(main),
            rbf_atom_update=self.mlp_rbf_h(main),
            rbf_out=self.mlp_rbf_out(main),
            rbf_atom_edge=self.mlp_rbf_aeint(near),
            rbf_pair=self.mlp_rbf_aint(pairs),
            cbf_trip=self.mlp_cbf_tint(main),
            cbf_atom_edge=self.mlp_cbf_aeint(main),
            cbf_edge_atom=self.mlp_cbf_eaint(near),
            cbf_quad=self.mlp_cbf_qint(quad),
            sbf_quad=self.mlp_sbf_qint(main),
        )
