"""The forward pass with linear maps in 8-bit integers: the fused one, whose dense layers multiply quantised rows.

What is only multiplied again, as between the two layers of a residual, is written in 8 bits by the activation before
it; the edges' features, which five layers of a block read, are quantised once. Everything else is as in bfloat16:
filters of the radial basis, up-projections to edges (whose inputs are narrow), sums over quadruplets, residual streams.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ejmp.graph.graph import AtomGraph
from ejmp.model.fused_executor import FusedExecutor
from ejmp.model.interactions import QuadrupletInteraction, TripletInteraction
from ejmp.model.layers import INV_SQRT_2, Dense, Linear, Residual, ScaleFactor
from ejmp_kernels.quantized import (
    QuantizedRows,
    linear,
    linear_activate,
    linear_activate_rows,
    packed,
    quantize_rows,
)

if TYPE_CHECKING:
    from collections.abc import MutableMapping

LOW = torch.bfloat16
"""The type of what is not in 8 bits."""


class QuantizedExecutor(FusedExecutor):
    """The steps of a forward pass on native kernels, in 8 bits where that pays; nothing here has a derivative.

    Args:
        graph: a batch, on a CPU with VNNI.
    """

    def __init__(self, graph: AtomGraph) -> None:
        super().__init__(graph, LOW, "native", hold=True)
        self._rows: MutableMapping[Tensor, QuantizedRows] = WeakTensorKeyDictionary()

    def rows(self, x: Tensor) -> QuantizedRows:
        """Return a tensor in 8 bits, which is made once as long as the tensor lives."""
        found = self._rows.get(x)
        if found is None:
            found = self._rows[x] = quantize_rows(x)
        return found

    def dense(self, layer: Dense, x: Tensor, factor: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        """Apply a linear layer and its activation, and multiply by a factor of the output's shape."""
        return linear_activate(self.rows(x), packed(layer.linear.weight), factor, scale=scale, dtype=LOW)

    def residual(self, layer: nn.Module, x: Tensor, scale: float = 1.0) -> Tensor:
        """Apply a residual layer and scale."""
        assert isinstance(layer, Residual)
        first, second = layer.dense_mlp
        assert isinstance(first, Dense)
        assert isinstance(second, Dense)
        y = linear_activate_rows(self.rows(x), packed(first.linear.weight), dtype=LOW)
        scale *= INV_SQRT_2
        return linear_activate(y, packed(second.linear.weight), add=x, scale=scale, add_scale=scale, dtype=x.dtype)

    def filtered(
        self, layer: TripletInteraction | QuadrupletInteraction, dense: Dense, m: Tensor, rbf: Tensor
    ) -> Tensor:
        """Apply a dense layer, filter by the radial basis and down-project: [E_in, .] to [E_in, C]."""
        factor = self.linear_layer(layer.mlp_rbf, rbf, layer.scale_rbf)
        y = linear_activate_rows(self.rows(m), packed(dense.linear.weight), factor, dtype=LOW)
        return self._wide(linear_activate(y, packed(layer.down_projection.linear.weight), dtype=LOW))

    def mix(self, layer: Linear, x: Tensor, scale: ScaleFactor) -> Tensor:
        """Apply a linear layer to sums over neighbours, with a scale factor folded into their scales."""
        rows = quantize_rows(x)
        rows = QuantizedRows(rows.values, rows.scales * scale.scale_factor)
        return linear(rows, packed(layer.linear.weight), x.dtype)

    def linear_of_edges(self, dense: Dense, m: Tensor, first: int) -> Tensor:
        """Return the product of edge features with the columns of a weight from `first` on."""
        return linear(self.rows(m), packed(dense.linear.weight, first), LOW)
