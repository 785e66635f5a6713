"""The forward pass in plain torch: the model as the papers write it, layer by layer.

Source: GemNet-OC (arXiv 2204.02782), figure 1. Neighbour sums run over padded tables (`ejmp.model.angle_tables`), as
`ejmp_kernels.specification` says.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ejmp.model.angle_tables import AngleTables, angle_tables
from ejmp.model.bases import Bases, BasisValues
from ejmp.model.executor import Executor
from ejmp.model.interactions import (
    AtomUpdate,
    InteractionBlock,
    OutputBlock,
    PairInteraction,
    QuadrupletInteraction,
    TripletInteraction,
)
from ejmp.model.layers import INV_SQRT_2, INV_SQRT_3, FinalMLP, Linear, ScaleFactor
from ejmp.model.regions import region
from ejmp_kernels import specification
from ejmp_kernels.specification import Quadruplets, Triplets


class ReferenceExecutor(Executor):
    """The steps of a forward pass in plain torch; see `Executor`."""

    bases: BasisValues
    tables: AngleTables

    def linear_maps(self) -> AbstractContextManager[object]:
        """Return torch's autocast to the low type."""
        return nullcontext() if self.low is None else torch.autocast(self.graph.device.type, dtype=self.low)

    def _full_precision(self) -> AbstractContextManager[object]:
        """Return the context of geometry, bases and sums, which stay in the graph's type."""
        return torch.autocast(self.graph.device.type, enabled=False)

    def embed(self, bases: Bases, h: Tensor) -> Tensor:
        """Evaluate bases and angles, and return the first edge features, [N, C] to [E, M]."""
        with self._full_precision():
            with region("bases"):
                self.bases = bases(self.graph)
            with region("angles"):
                self.tables = angle_tables(self.graph, bases.num_spherical)
        with region("edge_embedding"):
            return bases.edge_emb(h, self.bases.radial, self.graph.main.source, self.graph.main.target)

    def block(self, block: InteractionBlock, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Update atoms [N, C] and edges [E, M] by one interaction block."""
        main = self.graph.main
        new_m = self.messages_to_edges(block, h, m)
        with region("edge_to_atom"):
            from_edges = self.edges_to_atoms(block.edge_atom_interaction, m)
        with region("atom_pairs"):
            from_atoms = self.pairs(block.atom_interaction, h)
        h = (h + from_edges + from_atoms) * INV_SQRT_3
        m = (m + block.layers_before_skip(new_m)) * INV_SQRT_2
        m = block.layers_after_skip(m)
        with region("atom_updates"):
            h = block.atom_emb_layers(h)
            update = self.atom_sum(block.atom_update, m, self.bases.rbf_atom_update)
            h = (h + block.atom_update.layers(update)) * INV_SQRT_2
        m2 = block.concat_layer(h, m, main.source, main.target)
        m = (m + block.residual_m(m2)) * INV_SQRT_2
        return h, m

    def messages_to_edges(self, block: InteractionBlock, h: Tensor, m: Tensor) -> Tensor:
        """Return half the sum of what a block sends to edges, [E, M]."""
        trip, quad, near = block.trip_interaction, block.quad_interaction, block.atom_edge_interaction
        bases, tables = self.bases, self.tables
        with region("edge_to_edge"):
            x = self.filtered(trip.dense_ba(m), trip.mlp_rbf, bases.rbf_trip, trip.scale_rbf)
            x = self.triplets(trip, trip.down_projection(x), bases.cbf_trip, tables.edge_to_edge)
            from_edges = self.to_edges(trip, x)
        with region("quadruplets"):
            x = self.filtered(quad.dense_db(m), quad.mlp_rbf, bases.rbf_quad, quad.scale_rbf)
            x = self.quadruplets(quad, quad.down_projection(x), tables.quadruplets)
            from_paths = self.to_edges(quad, x)
        with region("atom_to_edge"):
            x = near.dense_ba(h).index_select(0, self.graph.atom_edges.source)
            x = self.filtered(x, near.mlp_rbf, bases.rbf_atom_edge, near.scale_rbf)
            x = self.triplets(near, near.down_projection(x), bases.cbf_atom_edge, tables.atom_to_edge)
            from_atoms = self.to_edges(near, x)
        return (block.dense_ca(m) + from_edges + from_paths + from_atoms) * 0.5

    def edges_to_atoms(self, layer: TripletInteraction, m: Tensor) -> Tensor:
        """Sum triplets into atoms, [E, M] to [N, C]."""
        x = self.filtered(layer.dense_ba(m), layer.mlp_rbf, self.bases.rbf_edge_atom, layer.scale_rbf)
        into = self.graph.atom_edges.target
        y = self.triplets(layer, layer.down_projection(x), self.bases.cbf_edge_atom, self.tables.edge_to_atom, into)
        return layer.up_projection_ca(y)

    def filtered(self, x: Tensor, radial: Linear, rbf: Tensor, scale: ScaleFactor) -> Tensor:
        """Multiply features by a filter made of the radial basis and scale them, [E, M]."""
        return scale(x * radial(rbf))

    def triplets(
        self, layer: TripletInteraction, x: Tensor, cbf: Tensor, triplets: Triplets, into_atoms: Tensor | None = None
    ) -> Tensor:
        """Sum over triplets, mix and scale, [E_in, C] to [E_out, out], or to [N, out] by the atoms of the outputs."""
        with self._full_precision():
            summed = specification.triplet_sum(x.to(cbf.dtype), cbf, triplets.table, triplets.angular)
        if into_atoms is not None:
            summed = specification.segment_sum(summed, into_atoms, self.graph.num_atoms)
        return layer.scale_cbf_sum(layer.mlp_cbf(summed))

    def quadruplets(self, layer: QuadrupletInteraction, x: Tensor, quads: Quadruplets) -> Tensor:
        """Sum over quadruplets, mix and scale, [E, C] to [E, out]."""
        with self._full_precision():
            gathered = specification.gather(x.to(self.bases.cbf_quad.dtype), quads.inputs)
            circular = (self.bases.cbf_quad @ quads.circular).mT
            values = self.circular_filtered(layer, gathered, circular) * quads.inputs_valid[..., None]
        return self.quadruplet_sum(layer, values, quads)

    def circular_filtered(self, layer: QuadrupletInteraction, gathered: Tensor, circular: Tensor) -> Tensor:
        """Multiply the inputs of each middle edge by a filter of their angle and scale them, [E_mid, K, C]."""
        return layer.scale_cbf(gathered * layer.mlp_cbf(circular))

    def quadruplet_sum(self, layer: QuadrupletInteraction, values: Tensor, quads: Quadruplets) -> Tensor:
        """Sum the values of all middle edges over quadruplets, mix and scale, [E_mid, K, C] to [E, out]."""
        with self._full_precision():
            summed = specification.quadruplet_sum(values, self.bases.sbf_quad, quads.middles, quads.angular)
        return layer.scale_sbf_sum(layer.mlp_sbf(summed))

    def to_edges(self, layer: TripletInteraction | QuadrupletInteraction, x: Tensor) -> Tensor:
        """Up-project messages for edges and counter-edges and add both, over sqrt(2), [E, M]."""
        assert layer.up_projection_ac is not None
        assert self.graph.main.swap is not None
        to_counter = layer.up_projection_ac(x).index_select(0, self.graph.main.swap)
        return (layer.up_projection_ca(x) + to_counter) * INV_SQRT_2

    def pairs(self, layer: PairInteraction, h: Tensor) -> Tensor:
        """Sum over pairs of atoms, [N, C] to [N, C]."""
        return layer.up_projection(self.pair_sum(layer, layer.down_projection(h)))

    def pair_sum(self, layer: PairInteraction, x: Tensor) -> Tensor:
        """Sum neighbours times their radial basis, mix and scale, [N, C] to [N, out]."""
        source, rbf = self.graph.atom_pairs.source, self.bases.rbf_pair
        with self._full_precision():
            summed = specification.pair_sum(x.to(rbf.dtype), rbf, source, self.tables.pairs)
        return layer.scale_rbf_sum(layer.bilinear(summed))

    def atom_sum(self, layer: AtomUpdate, m: Tensor, rbf: Tensor) -> Tensor:
        """Sum edges into atoms through a filter of the radial basis and scale, [E, M] to [N, M]."""
        weights = layer.dense_rbf(rbf)
        with self._full_precision():
            main = self.graph.main
            x = specification.atom_sum(m.to(rbf.dtype), weights.to(rbf.dtype), main.target, self.graph.num_atoms)
        return layer.scale_sum(x)

    def energy(self, block: OutputBlock, h: Tensor, m: Tensor) -> Tensor:
        """Read out atoms and edges, x_E [N, C]."""
        x = block.layers(self.atom_sum(block, m, self.bases.rbf_out))
        return block.seq_energy2((x + h) * INV_SQRT_2)

    def forces(self, block: OutputBlock, m: Tensor) -> Tensor:
        """Read out edges, x_F [E, M]."""
        return self.filtered(block.seq_forces(m), block.dense_rbf_F, self.bases.rbf_out, block.scale_rbf_F)

    def final_mlp(self, mlp: FinalMLP, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the output of each layer of the final MLP, [., size]."""
        return mlp(x)

    def head(self, layers: nn.Sequential, x: Tensor) -> Tensor:
        """Apply a head, [., size] to [., 1]."""
        return layers(x)

    def sum_by_target(self, x: Tensor, target: Tensor, ptr: Tensor) -> Tensor:
        """Sum rows by target, [E, ...] to [N, ...]. index_add on CUDA is not deterministic."""
        return specification.segment_sum(x, target, ptr.shape[0] - 1)
