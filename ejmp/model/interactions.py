"""The five message-passing interactions and the block they form (GemNet-OC, arXiv 2204.02782, figure 1).

Attribute names are upstream's: ca is the output edge c->a, ba and db are input edges, ac the counter-edge.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ejmp.graph.graph import AtomGraph
from ejmp.model.angle_tables import Geometry
from ejmp.model.bases import BasisValues, EdgeEmbedding
from ejmp.model.config import JMPConfig
from ejmp.model.layers import INV_SQRT_2, INV_SQRT_3, Dense, Linear, Residual, ScaleFactor, residuals
from ejmp_kernels import specification
from ejmp_kernels.specification import Triplets


@dataclass(frozen=True, kw_only=True)
class BlockInputs:
    """What every block reads and none changes."""

    graph: AtomGraph
    bases: BasisValues
    geometry: Geometry


class Bilinear(nn.Module):
    """The plain linear map after a neighbour sum; the extra level is in upstream's state dict."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.bilinear = Linear(num_in, num_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map [E, A * C] to [E, out]."""
        return self.bilinear(x)


def swap_and_add(to_edge: Tensor, to_counter: Tensor, swap: Tensor) -> Tensor:
    """Return (to_edge[e] + to_counter[counter-edge of e]) / sqrt(2), [E, M]."""
    return (to_edge + to_counter.index_select(0, swap)) * INV_SQRT_2


class TripletInteraction(nn.Module):
    """Messages b->a (edges or atoms b) to edges c->a or, after a second sum, to atoms a.

    Serves upstream's trip_interaction, atom_edge_interaction (inputs from atoms) and edge_atom_interaction (outputs
    to atoms, without a counter-edge).
    """

    def __init__(self, config: JMPConfig, *, num_in: int, num_out: int, to_atoms: bool = False) -> None:
        super().__init__()
        size_in, size_out = config.emb_size_trip_in, config.emb_size_trip_out
        self.dense_ba = Dense(num_in, num_in)
        self.mlp_rbf = Linear(config.emb_size_rbf, num_in)
        self.scale_rbf = ScaleFactor()
        self.mlp_cbf = Bilinear(config.emb_size_cbf * size_in, size_out)
        self.scale_cbf_sum = ScaleFactor()
        self.down_projection = Dense(num_in, size_in)
        self.up_projection_ca = Dense(size_out, num_out)
        self.up_projection_ac = None if to_atoms else Dense(size_out, num_out)

    def inputs(self, x: Tensor, rbf: Tensor, source: Tensor | None = None) -> Tensor:
        """Filter and down-project inputs [N or E_in, .] to [E_in, C]; `source` gathers atoms onto edges."""
        x = self.dense_ba(x)
        if source is not None:
            x = x.index_select(0, source)
        filtered = self.scale_rbf(x * self.mlp_rbf(rbf), lambda: (x, None))
        return self.down_projection(filtered)

    def outputs(self, summed: Tensor, x: Tensor, triplets: Triplets) -> Tensor:
        """Mix the neighbour sums [rows, A * C] and scale them to the variance of their inputs."""
        return self.scale_cbf_sum(self.mlp_cbf(summed), lambda: (x, triplets.counts(len(x))))

    def to_edges(self, x: Tensor, cbf: Tensor, triplets: Triplets, swap: Tensor) -> Tensor:
        """Sum over triplets into output edges, [E, M]."""
        out = self.outputs(_aggregate(x, cbf, triplets), x, triplets)
        assert self.up_projection_ac is not None
        return swap_and_add(self.up_projection_ca(out), self.up_projection_ac(out), swap)

    def to_atoms(self, x: Tensor, cbf: Tensor, triplets: Triplets, target: Tensor, num_atoms: int) -> Tensor:
        """Sum over triplets and then over the output edges of each atom, [N, C]."""
        summed = specification.segment_sum(_aggregate(x, cbf, triplets), target, num_atoms)
        return self.up_projection_ca(self.outputs(summed, x, triplets))


def _aggregate(x: Tensor, cbf: Tensor, triplets: Triplets) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return specification.triplet_sum(x.to(cbf.dtype), cbf, triplets.table, triplets.angular)


class QuadrupletInteraction(nn.Module):
    """Messages d->b through middle edges b->a to edges c->a, with the dihedral angle."""

    def __init__(self, config: JMPConfig) -> None:
        super().__init__()
        size_in, size_out, edge = config.emb_size_quad_in, config.emb_size_quad_out, config.emb_size_edge
        self.dense_db = Dense(edge, edge)
        self.mlp_rbf = Linear(config.emb_size_rbf, edge)
        self.scale_rbf = ScaleFactor()
        self.mlp_cbf = Linear(config.emb_size_cbf, size_in)
        self.scale_cbf = ScaleFactor()
        self.mlp_sbf = Bilinear(config.emb_size_sbf * size_in, size_out)
        self.scale_sbf_sum = ScaleFactor()
        self.down_projection = Dense(edge, size_in)
        self.up_projection_ca = Dense(size_out, edge)
        self.up_projection_ac = Dense(size_out, edge)

    def forward(self, m: Tensor, inputs: BlockInputs) -> Tensor:
        """Map edges [E, M] to edges [E, M]."""
        bases, quads = inputs.bases, inputs.geometry.quadruplets
        x = self.dense_db(m)
        filtered = self.scale_rbf(x * self.mlp_rbf(bases.rbf_quad), lambda: (x, None))
        x_db = self.down_projection(filtered)
        with torch.autocast(m.device.type, enabled=False):
            gathered = specification.gather(x_db.to(bases.cbf_quad.dtype), quads.inputs)
            circular = (bases.cbf_quad @ quads.circular).mT
            x_t = gathered * self.mlp_cbf(circular)
            kept = quads.inputs_valid
            x_t = self.scale_cbf(x_t, lambda: (gathered[kept], None), rows=kept) * kept[..., None]
            summed = specification.quadruplet_sum(x_t, bases.sbf_quad, quads.middles, quads.angular)

        def gathered_per_quadruplet() -> tuple[Tensor, Tensor]:
            counts = torch.zeros(len(x_t) + 1, x_t.shape[1], dtype=x_t.dtype, device=x_t.device)
            counts.index_put_((quads.middles,), quads.valid.to(x_t.dtype), accumulate=True)
            return x_t.flatten(0, 1), counts[:-1].flatten()

        out = self.scale_sbf_sum(self.mlp_sbf(summed), gathered_per_quadruplet)
        assert inputs.graph.main.swap is not None
        return swap_and_add(self.up_projection_ca(out), self.up_projection_ac(out), inputs.graph.main.swap)


class PairInteraction(nn.Module):
    """Messages between atoms, from far more neighbours than there are edges."""

    def __init__(self, config: JMPConfig) -> None:
        super().__init__()
        size_in, size_out = config.emb_size_pair_in, config.emb_size_pair_out
        self.bilinear = Linear(config.emb_size_rbf * size_in, size_out)
        self.scale_rbf_sum = ScaleFactor()
        self.down_projection = Dense(config.emb_size_atom, size_in)
        self.up_projection = Dense(size_out, config.emb_size_atom)

    def forward(self, h: Tensor, inputs: BlockInputs) -> Tensor:
        """Map atoms [N, C] to atoms [N, C]."""
        source, rbf = inputs.graph.atom_pairs.source, inputs.bases.rbf_pair
        x = self.down_projection(h)
        with torch.autocast(h.device.type, enabled=False):
            summed = specification.pair_sum(x.to(rbf.dtype), rbf, source, inputs.geometry.pairs)

        def gathered_per_pair() -> tuple[Tensor, Tensor]:
            return x, torch.bincount(source, minlength=len(x)).to(rbf.dtype)

        return self.up_projection(self.scale_rbf_sum(self.bilinear(summed), gathered_per_pair))


class AtomUpdate(nn.Module):
    """Sum edges into atoms through a radial filter, then Dense and residuals."""

    def __init__(self, config: JMPConfig) -> None:
        super().__init__()
        self.dense_rbf = Linear(config.emb_size_rbf, config.emb_size_edge)
        self.scale_sum = ScaleFactor()
        self.layers = nn.Sequential(
            Dense(config.emb_size_edge, config.emb_size_atom),
            *(Residual(config.emb_size_atom) for _ in range(config.num_atom)),
        )

    def atom_sum(self, m: Tensor, rbf: Tensor, graph: AtomGraph) -> Tensor:
        """Return scale_sum * sum over edges of m * plain(rbf), [E, M] to [N, M]."""
        weights = self.dense_rbf(rbf)
        with torch.autocast(m.device.type, enabled=False):
            x = specification.atom_sum(m.to(rbf.dtype), weights.to(rbf.dtype), graph.main.target, graph.num_atoms)
        return self.scale_sum(x, lambda: (m, None))

    def forward(self, m: Tensor, rbf: Tensor, graph: AtomGraph) -> Tensor:
        """Map edges [E, M] to atoms [N, C]."""
        return self.layers(self.atom_sum(m, rbf, graph))


class InteractionBlock(nn.Module):
    """One block: all interactions from the same h and m, then updates of both."""

    def __init__(self, config: JMPConfig) -> None:
        super().__init__()
        atom, edge = config.emb_size_atom, config.emb_size_edge
        self.dense_ca = Dense(edge, edge)
        self.trip_interaction = TripletInteraction(config, num_in=edge, num_out=edge)
        self.quad_interaction = QuadrupletInteraction(config)
        self.atom_edge_interaction = TripletInteraction(config, num_in=atom, num_out=edge)
        self.edge_atom_interaction = TripletInteraction(config, num_in=edge, num_out=atom, to_atoms=True)
        self.atom_interaction = PairInteraction(config)
        self.layers_before_skip = residuals(config.num_before_skip, edge)
        self.layers_after_skip = residuals(config.num_after_skip, edge)
        self.atom_emb_layers = residuals(config.num_atom_emb_layers, atom)
        self.atom_update = AtomUpdate(config)
        self.concat_layer = EdgeEmbedding(atom, edge, edge)
        self.residual_m = residuals(config.num_concat, edge)

    def forward(self, h: Tensor, m: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
        """Update atoms [N, C] and edges [E, M]."""
        graph, bases = inputs.graph, inputs.bases
        new_m = self._messages_to_edges(h, m, inputs)
        h = (h + self._edges_to_atoms(m, inputs) + self.atom_interaction(h, inputs)) * INV_SQRT_3
        m = (m + self.layers_before_skip(new_m)) * INV_SQRT_2
        m = self.layers_after_skip(m)
        h = self.atom_emb_layers(h)
        h = (h + self.atom_update(m, bases.rbf_atom_update, graph)) * INV_SQRT_2
        m2 = self.concat_layer(h, m, graph.main.source, graph.main.target)
        m = (m + self.residual_m(m2)) * INV_SQRT_2
        return h, m

    def _messages_to_edges(self, h: Tensor, m: Tensor, inputs: BlockInputs) -> Tensor:
        graph, bases, geometry = inputs.graph, inputs.bases, inputs.geometry
        swap = graph.main.swap
        assert swap is not None
        trip, near = self.trip_interaction, self.atom_edge_interaction
        x = trip.inputs(m, bases.rbf_trip)
        e2e = trip.to_edges(x, bases.cbf_trip, geometry.edge_to_edge, swap)
        quad = self.quad_interaction(m, inputs)
        x = near.inputs(h, bases.rbf_atom_edge, graph.atom_edges.source)
        a2e = near.to_edges(x, bases.cbf_atom_edge, geometry.atom_to_edge, swap)
        return (self.dense_ca(m) + e2e + quad + a2e) * 0.5

    def _edges_to_atoms(self, m: Tensor, inputs: BlockInputs) -> Tensor:
        graph, bases, geometry = inputs.graph, inputs.bases, inputs.geometry
        layer = self.edge_atom_interaction
        x = layer.inputs(m, bases.rbf_edge_atom)
        return layer.to_atoms(x, bases.cbf_edge_atom, geometry.edge_to_atom, graph.atom_edges.target, graph.num_atoms)


class OutputBlock(AtomUpdate):
    """Turn h and m after a block into what the final MLP reads (upstream: `out_blocks`)."""

    def __init__(self, config: JMPConfig) -> None:
        super().__init__(config)
        atom, edge = config.emb_size_atom, config.emb_size_edge
        self.seq_energy_pre = self.layers
        self.seq_energy2 = residuals(config.num_output_after_atom, atom)
        if config.direct_forces:
            self.scale_rbf_F = ScaleFactor()
            self.seq_forces = residuals(config.num_atom, edge)
            self.dense_rbf_F = Linear(config.emb_size_rbf, edge)

    def energy(self, h: Tensor, m: Tensor, rbf: Tensor, graph: AtomGraph) -> Tensor:
        """Return x_E, [N, C]."""
        x = self.layers(self.atom_sum(m, rbf, graph))
        return self.seq_energy2((x + h) * INV_SQRT_2)

    def forces(self, m: Tensor, rbf: Tensor) -> Tensor:
        """Return x_F, [E, M]."""
        x = self.seq_forces(m)
        return self.scale_rbf_F(x * self.dense_rbf_F(rbf), lambda: (x, None))
