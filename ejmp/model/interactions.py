"""The parameters of the five interactions and the blocks they form (GemNet-OC, arXiv 2204.02782, figure 1).

What is computed with them is in the executors. Attribute names are upstream's: ca is the output edge c->a, ba and db
are input edges, ac the counter-edge.
"""

from torch import Tensor, nn

from ejmp.model.bases import EdgeEmbedding
from ejmp.model.config import JMPConfig
from ejmp.model.layers import Dense, Linear, Residual, ScaleFactor, residuals


class Bilinear(nn.Module):
    """The linear map after a sum over neighbours; the extra level is in upstream's state dict."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.bilinear = Linear(num_in, num_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map [E, A * C] to [E, out]."""
        return self.bilinear(x)


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


class PairInteraction(nn.Module):
    """Messages between atoms, from far more neighbours than there are edges."""

    def __init__(self, config: JMPConfig) -> None:
        super().__init__()
        size_in, size_out = config.emb_size_pair_in, config.emb_size_pair_out
        self.bilinear = Linear(config.emb_size_rbf * size_in, size_out)
        self.scale_rbf_sum = ScaleFactor()
        self.down_projection = Dense(config.emb_size_atom, size_in)
        self.up_projection = Dense(size_out, config.emb_size_atom)


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
