"""The forward pass on fused ops: what `reference_executor` spells out in plain torch, from the same parameters.

It runs on the native or the Triton kernels, which have the same ops. Nothing here lists a triplet, pads a table or
waits for the device. Scale factors are folded into the small weights beside them, activations, filters, residuals and
scalings are one pass after each product (in Triton its epilogue), and of a layer on [h_source, h_target, m] only the
part of m runs on edges. Tested to give what the reference backend gives.
"""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ejmp.graph.graph import AtomGraph, EdgeSet
from ejmp.model.bases import Bases, BasisProjection, ProjectedBases
from ejmp.model.executor import Executor
from ejmp.model.interactions import (
    AtomUpdate,
    InteractionBlock,
    OutputBlock,
    PairInteraction,
    QuadrupletInteraction,
    TripletInteraction,
)
from ejmp.model.layers import INV_SQRT_2, INV_SQRT_3, Dense, FinalMLP, Linear, Residual, ScaleFactor
from ejmp.model.regions import region
from ejmp_kernels.activation import activate
from ejmp_kernels.dense import After, AtomRows, Filter, dense, finish, linear_swap_add, passes
from ejmp_kernels.derived import columns, held
from ejmp_kernels.linear import linear
from ejmp_kernels.pair import pair
from ejmp_kernels.quadruplet import quadruplet_linear
from ejmp_kernels.radial import radial
from ejmp_kernels.registry import Backend
from ejmp_kernels.sums import atom_sum, edge_sum
from ejmp_kernels.triplet import triplet


def scaled(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight times a number, in a type."""
    return (weight * scale.to(weight.dtype)).to(dtype)


def stacked(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows of two weights in a type."""
    return torch.cat([first, second]).to(dtype)


def of_atoms(weight: Tensor, size: int) -> Tensor:
    """Return the rows for sources and for targets, [2 out, size], of a weight for [h_source, h_target, m]."""
    return torch.cat([weight[:, :size], weight[:, size : 2 * size]])


class FusedExecutor(Executor):
    """The steps of a forward pass on kernels; see `Executor`. Linear maps take their type from their operands.

    Args:
        graph: a batch.
        low: the 16-bit type of the linear maps; None for the parameters' own.
        backend: whose kernels.
        hold: whether what is made of parameters, such as copies in the low type, is held for later passes.
    """

    bases: ProjectedBases

    def __init__(self, graph: AtomGraph, low: torch.dtype | None, backend: Backend, *, hold: bool) -> None:
        super().__init__(graph, low)
        self.hold = hold
        self.backend: Backend = backend
        assert graph.main.swap is not None
        self.swap = graph.main.swap

    def linear_maps(self) -> AbstractContextManager[object]:
        """Return an empty context: the methods below cast operands themselves."""
        return nullcontext()

    def low_features(self, x: Tensor) -> Tensor:
        """Return features in the low type, if there is one."""
        return x if self.low is None else x.to(self.low)

    def of_weights(self, make: Callable[..., Tensor], *sources: Tensor, options: tuple[Hashable, ...]) -> Tensor:
        """Return what a function makes of weights; what is made of parameters may be held."""
        if self.hold and isinstance(sources[0], nn.Parameter):
            return held(make, sources, *options)
        return make(*sources, *options)

    def operands(self, layer: Linear, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Return what is multiplied for a layer: its input, and its weight's columns from `first` on."""
        weight = layer.linear.weight
        if self.low is None:
            return x, weight[:, first:] if first else weight
        return x.to(self.low), self.of_weights(columns, weight, options=(self.low, first))

    def folded(self, layer: Linear, scale: ScaleFactor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a layer's weight times a scale factor, in a type (default: that of linear maps)."""
        weight = layer.linear.weight
        return self.of_weights(scaled, weight, scale.scale_factor, options=(dtype or self.low or weight.dtype,))

    def filter(self, layer: Linear, rbf: Tensor, scale: ScaleFactor) -> Filter:
        """Return the filter that a linear layer makes of a radial basis, with a scale factor folded into its weight."""
        return Filter(self.low_features(rbf), self.folded(layer, scale))

    def dense(
        self, layer: Dense, x: Tensor, factor: Tensor | Filter | None = None, add: Tensor | None = None, **rest: Any
    ) -> Tensor:
        """Apply a linear layer and what `After` says, such as its activation."""
        x, weight = self.operands(layer, x)
        return dense(x, weight, After(factor=factor, add=add, **rest), backend=self.backend)

    def residual(self, layer: nn.Module, x: Tensor, scale: float = 1.0, **rest: Any) -> Tensor:
        """Apply a residual layer and scale, and what `After` can say of its sum."""
        assert isinstance(layer, Residual)
        first, second = layer.dense_mlp
        assert isinstance(first, Dense)
        assert isinstance(second, Dense)
        scale *= INV_SQRT_2
        return self.dense(second, self.dense(first, x), add=x, scale=scale, add_scale=scale, **rest)

    def residuals(self, layers: nn.Sequential, x: Tensor, scale: float = 1.0, **rest: Any) -> Tensor:
        """Apply residual layers in a row and scale, and what `After` can say of the last sum."""
        if not len(layers):
            return finish(x * scale, After(**rest), backend=self.backend)
        *before, last = layers
        for layer in before:
            x = self.residual(layer, x)
        return self.residual(last, x, scale, **rest)

    def dense_residuals(self, layers: nn.Sequential | nn.ModuleList, x: Tensor) -> tuple[Tensor, ...]:
        """Apply a dense layer and residual layers after it; return the output of each."""
        first, *rest = layers
        assert isinstance(first, Dense)
        outputs = [self.dense(first, x)]
        for layer in rest:
            outputs.append(self.residual(layer, outputs[-1]))
        return tuple(outputs)

    def atom_rows(self, layer: Dense, h: Tensor) -> AtomRows:
        """Return what atoms add to the product of edges in a dense layer of [h_source, h_target, m]."""
        main, weight, size = self.graph.main, layer.linear.weight, h.shape[1]
        both = self.of_weights(of_atoms, weight, options=(size,))
        from_source, to_target = linear(h, both, backend=self.backend).chunk(2, dim=1)  # cheap: not in the low type
        return AtomRows(from_source, to_target, main.source, main.target, self.swap, main.ptr)

    def embed_edges(self, layer: Dense, h: Tensor, m: Tensor) -> Tensor:
        """Apply a dense layer to [h_source, h_target, m], of whose weight only the part of m runs on edges."""
        x, weight = self.operands(layer, m, 2 * h.shape[1])
        return dense(x, weight, After(rows=self.atom_rows(layer, h)), backend=self.backend)

    def _wide(self, x: Tensor) -> Tensor:
        """Give sums over neighbours the type of the geometry; Triton's kernels take low types and sum in float32."""
        return x if self.backend == "triton" else x.to(self.graph.dtype)

    def project(self, bases: Bases) -> ProjectedBases:
        """Evaluate and project every radial basis, those of equal distances in one call."""
        quad, trip, edge_atom, update, out, cbf_trip, cbf_atom_edge = self._radial(
            bases,
            "main",
            *(bases.mlp_rbf_qint, bases.mlp_rbf_tint, bases.mlp_rbf_eaint, bases.mlp_rbf_h, bases.mlp_rbf_out),
            *(bases.mlp_cbf_tint, bases.mlp_cbf_aeint),
        )
        rbf_atom_edge, cbf_edge_atom = self._radial(bases, "atom_edges", bases.mlp_rbf_aeint, bases.mlp_cbf_eaint)
        (cbf_quad,) = self._radial(bases, "quad_edges", bases.mlp_cbf_qint)
        (sbf_quad,) = self._radial(bases, "main", bases.mlp_sbf_qint)
        return ProjectedBases(
            rbf_quad=quad,
            rbf_trip=trip,
            rbf_edge_atom=edge_atom,
            rbf_atom_update=update,
            rbf_out=out,
            rbf_atom_edge=rbf_atom_edge,
            rbf_pair=self._radial_product(bases, "atom_pairs", bases.mlp_rbf_aint.weight.mT),
            cbf_trip=cbf_trip,
            cbf_atom_edge=cbf_atom_edge,
            cbf_edge_atom=cbf_edge_atom,
            cbf_quad=cbf_quad,
            sbf_quad=self._narrow(sbf_quad) if self.backend == "triton" else sbf_quad,
        )

    def _radial(self, bases: Bases, edges: str, *projections: Linear | BasisProjection) -> list[Tensor]:
        """Return one tensor per projection: [E, rbf], or [E, A, S] of a `BasisProjection`."""
        weights = [p.weight.flatten(1) if isinstance(p, BasisProjection) else p.linear.weight.mT for p in projections]
        together = self._radial_product(bases, edges, torch.cat(weights, dim=1))
        return [
            part.contiguous().view(len(part), p.weight.shape[2], p.weight.shape[1])
            if isinstance(p, BasisProjection)
            else self._narrow(part)
            for part, p in zip(together.split([w.shape[1] for w in weights], dim=1), projections, strict=True)
        ]

    def _narrow(self, x: Tensor) -> Tensor:
        """Return what all blocks read of a basis, contiguous, in the low type if there is one and no derivatives are.

        Derivatives by all blocks are summed in the type that it has here.
        """
        dtype = x.dtype if self.low is None or torch.is_grad_enabled() else self.low
        return x.to(dtype).contiguous()

    def _radial_product(self, bases: Bases, edges: str, weight: Tensor) -> Tensor:
        """Return the radial basis of an edge set times a weight, [E, R] x [R, out]."""
        basis, distance = bases.radial_basis, getattr(self.graph, edges).distance
        offset, temps = (x.to(distance.dtype) for x in (basis.rbf.offset, basis.rbf.temps))
        return radial(distance, offset, temps, weight, basis.cutoffs[edges], basis.exponent, backend=self.backend)

    def filtered(
        self, layer: TripletInteraction | QuadrupletInteraction, first: Dense, m: Tensor, rbf: Tensor
    ) -> Tensor:
        """Apply a dense layer, filter by the radial basis and down-project: [E_in, .] to [E_in, C]."""
        factor = self.filter(layer.mlp_rbf, rbf, layer.scale_rbf)
        return self._wide(self.dense(layer.down_projection, self.dense(first, m, factor)))

    def triplets(
        self, layer: TripletInteraction, x: Tensor, cbf: Tensor, out: EdgeSet, into: EdgeSet, *, to_atoms: bool = False
    ) -> Tensor:
        """Sum over triplets and mix, [E_out or N, trip_out]."""
        summed = triplet(x, cbf, out, into, to_atoms=to_atoms, backend=self.backend)
        return self.mix(layer.mlp_cbf.bilinear, summed, layer.scale_cbf_sum)

    def mix(self, layer: Linear, x: Tensor, scale: ScaleFactor) -> Tensor:
        """Apply a linear layer to sums over neighbours, with a scale factor folded into its weight."""
        return linear(self.low_features(x), self.folded(layer, scale), backend=self.backend)

    def to_edges(self, layer: TripletInteraction | QuadrupletInteraction, y: Tensor, add: Tensor) -> Tensor:
        """Up-project messages for edges and counter-edges and add half their sum / sqrt(2), [E, M]."""
        assert layer.up_projection_ac is not None
        weights = layer.up_projection_ca.linear.weight, layer.up_projection_ac.linear.weight
        weight = self.of_weights(stacked, *weights, options=(self.low or y.dtype,))
        return linear_swap_add(
            self.low_features(y), weight, self.swap, add, scale=0.5 * INV_SQRT_2, backend=self.backend
        )

    def quadruplets(self, layer: QuadrupletInteraction, m: Tensor) -> Tensor:
        """Sum over quadruplets and mix, [E, quad_out]."""
        graph, bases = self.graph, self.bases
        x = self.filtered(layer, layer.dense_db, m, bases.rbf_quad)
        cbf = bases.cbf_quad.mT
        weight = self.folded(layer.mlp_cbf, layer.scale_cbf, cbf.dtype)
        filters = linear(cbf.flatten(0, 1), weight, backend=self.backend).view(*cbf.shape[:2], x.shape[1])
        mix = self.folded(layer.mlp_sbf.bilinear, layer.scale_sbf_sum, x.dtype)
        edges = graph.main, graph.quad_edges
        return quadruplet_linear(x, filters, bases.sbf_quad, *edges, mix, backend=self.backend)

    def messages_to_edges(self, block: InteractionBlock, h: Tensor, m: Tensor) -> Tensor:
        """Return half the sum of what a block sends to edges, [E, M]."""
        graph, bases = self.graph, self.bases
        trip, quad, near = block.trip_interaction, block.quad_interaction, block.atom_edge_interaction
        out = self.dense(block.dense_ca, m, scale=0.5)
        with region("edge_to_edge"):
            x = self.filtered(trip, trip.dense_ba, m, bases.rbf_trip)
            out = self.to_edges(trip, self.triplets(trip, x, bases.cbf_trip, graph.main, graph.main), out)
        with region("quadruplets"):
            out = self.to_edges(quad, self.quadruplets(quad, m), out)
        with region("atom_to_edge"):
            # atoms are activated before they are gathered onto edges
            x = self.dense(near.dense_ba, h).index_select(0, graph.atom_edges.source)
            x = x * linear(*self.filter(near.mlp_rbf, bases.rbf_atom_edge, near.scale_rbf), backend=self.backend)
            x = self._wide(self.dense(near.down_projection, x))
            y = self.triplets(near, x, bases.cbf_atom_edge, graph.main, graph.atom_edges)
            return self.to_edges(near, y, out)

    def edges_to_atoms(self, layer: TripletInteraction, m: Tensor) -> Tensor:
        """Sum triplets into atoms, [N, C]."""
        graph, bases = self.graph, self.bases
        x = self.filtered(layer, layer.dense_ba, m, bases.rbf_edge_atom)
        y = self.triplets(layer, x, bases.cbf_edge_atom, graph.atom_edges, graph.main, to_atoms=True)
        return self.dense(layer.up_projection_ca, y)

    def pairs(self, layer: PairInteraction, h: Tensor) -> Tensor:
        """Sum over pairs of atoms, [N, C]."""
        edges = self.graph.atom_pairs
        x = self._wide(self.dense(layer.down_projection, h))
        summed = pair(x, self.bases.rbf_pair, edges.ptr, edges.source, backend=self.backend)
        return self.dense(layer.up_projection, self.mix(layer.bilinear, summed, layer.scale_rbf_sum))

    def atom_sum(self, layer: AtomUpdate, m: Tensor, rbf: Tensor) -> Tensor:
        """Sum edges into atoms through a filter of the radial basis and scale, [E, M] to [N, M]."""
        filters = self.filter(layer.dense_rbf, rbf, layer.scale_sum)
        return atom_sum(m, filters, self.graph.main.ptr, backend=self.backend)

    def embed(self, bases: Bases, h: Tensor) -> Tensor:
        """Evaluate the bases, and return the first edge features, [N, C] to [E, M]."""
        with region("edge_embedding"):
            layer = bases.edge_emb.dense
            x = self._radial_product(bases, "main", layer.linear.weight[:, 2 * h.shape[1] :].mT)
            m = passes(self.low_features(x), After(rows=self.atom_rows(layer, h)), backend=self.backend)
        with region("bases"):
            self.bases = self.project(bases)
        return m

    def block(self, block: InteractionBlock, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Update atoms [N, C] and edges [E, M] by one interaction block."""
        new_m = self.messages_to_edges(block, h, m)
        with region("edge_to_atom"):
            from_edges = self.edges_to_atoms(block.edge_atom_interaction, m)
        with region("atom_pairs"):
            from_atoms = self.pairs(block.atom_interaction, h)
        h = (h + from_edges + from_atoms) * INV_SQRT_3
        m = self.residuals(block.layers_before_skip, new_m, scale=INV_SQRT_2, more=m, more_scale=INV_SQRT_2)
        m = self.residuals(block.layers_after_skip, m)
        with region("atom_updates"):
            h = self.residuals(block.atom_emb_layers, h)
            update = self.atom_sum(block.atom_update, m, self.bases.rbf_atom_update)
            h = (h + self.dense_residuals(block.atom_update.layers, update)[-1]) * INV_SQRT_2
        m2 = self.embed_edges(block.concat_layer.dense, h, m)
        return h, self.residuals(block.residual_m, m2, scale=INV_SQRT_2, more=m, more_scale=INV_SQRT_2)

    def energy(self, block: OutputBlock, h: Tensor, m: Tensor) -> Tensor:
        """Read out atoms and edges, x_E [N, C]."""
        x = self.dense_residuals(block.layers, self.atom_sum(block, m, self.bases.rbf_out))[-1]
        return self.residuals(block.seq_energy2, (x + h) * INV_SQRT_2)

    def forces(self, block: OutputBlock, m: Tensor) -> Tensor:
        """Read out edges, x_F [E, M]."""
        filters = self.filter(block.dense_rbf_F, self.bases.rbf_out, block.scale_rbf_F)
        return self.residuals(block.seq_forces, m, outer=filters)

    def final_mlp(self, mlp: FinalMLP, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the output of each layer of the final MLP, [., size]."""
        return self.dense_residuals(mlp.out_mlp, torch.cat(x, dim=-1))

    def head(self, layers: nn.Sequential, x: Tensor) -> Tensor:
        """Apply a head in the parameters' type, [., size] to [., 1]."""
        for layer in layers:
            if not isinstance(layer, nn.Linear):
                x = activate(x, in_place=True, backend=self.backend)
            elif self.backend == "triton":
                x = layer(x)
            else:
                x = linear(x, layer.weight, backend=self.backend)
                x = x if layer.bias is None else x + layer.bias
        return x

    def sum_by_target(self, x: Tensor, target: Tensor, ptr: Tensor) -> Tensor:  # noqa: ARG002 - ptr says the same
        """Sum rows by target in a fixed order, [E, M] to [N, M]."""
        return edge_sum(x, ptr, backend=self.backend)
