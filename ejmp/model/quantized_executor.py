"""The forward pass with linear maps in 8 bits: the fused one, whose dense layers multiply quantised rows.

What is only multiplied again, as between the two layers of a residual, is written in 8 bits by the activation before
it; the edges' features, which five layers of a block read, are quantised once. Everything else is as in bfloat16:
filters of the radial basis, up-projections to edges (whose inputs are narrow), sums over quadruplets, residual streams,
and the layers that the model's config names (`JMPConfig.bf16_layers`).
"""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ejmp.graph.graph import AtomGraph
from ejmp.model.backend import Kernels
from ejmp.model.config import Precision
from ejmp.model.fused_executor import FusedExecutor
from ejmp.model.interactions import QuadrupletInteraction, TripletInteraction
from ejmp.model.layers import INV_SQRT_2, Dense, Linear, Residual, ScaleFactor
from ejmp_kernels import float8, quantized
from ejmp_kernels.dense import After, Filter, finish, made, passes
from ejmp_kernels.linear import linear
from ejmp_kernels.quantized import QuantizedRows
from ejmp_kernels.registry import Backend

if TYPE_CHECKING:
    from collections.abc import MutableMapping

Made = TypeVar("Made")
LOW = torch.bfloat16
"""The type of what is not in 8 bits."""


class Once(Generic[Made]):
    """What is made of tensors, once as long as each lives.

    Args:
        make: makes it.
    """

    def __init__(self, make: Callable[[Tensor], Made]) -> None:
        self._make = make
        self._made: MutableMapping[Tensor, Made] = WeakTensorKeyDictionary()

    def __call__(self, x: Tensor) -> Made:
        """Return what is made of a tensor."""
        found = self._made.get(x)
        if found is None:
            found = self._made[x] = self._make(x)
        return found


class QuantizedExecutor(FusedExecutor):
    """The steps of a forward pass on native kernels, in 8-bit integers where that pays; nothing has a derivative.

    Args:
        graph: a batch, on a CPU with VNNI.
        exact: layers that stay in bfloat16.
        low: the type of what is not in 8 bits: bfloat16, or None for float32, to see what 8 bits alone change.
    """

    def __init__(self, graph: AtomGraph, exact: Collection[nn.Module] = (), low: torch.dtype | None = LOW) -> None:
        super().__init__(graph, low, "native", hold=True)
        self.exact = exact
        self.dtype = low or torch.float32
        self.rows = Once(quantized.quantize_rows)

    def dense(
        self, layer: Dense, x: Tensor, factor: Tensor | Filter | None = None, add: Tensor | None = None, **rest: Any
    ) -> Tensor:
        """Apply a linear layer and what `After` says, such as its activation."""
        if layer in self.exact:
            return super().dense(layer, x, factor, add, **rest)
        after, dtype = After(**rest), self.dtype if add is None else add.dtype
        weight, scales = quantized.packed(layer.linear.weight), {"scale": after.scale, "add_scale": after.add_scale}
        factor = made(factor, self.backend)
        return finish(quantized.linear_activate(self.rows(x), weight, factor, add, dtype=dtype, **scales), after)

    def residual(self, layer: nn.Module, x: Tensor, scale: float = 1.0, **rest: Any) -> Tensor:
        """Apply a residual layer and scale, and what `After` can say of its sum."""
        assert isinstance(layer, Residual)
        first, second = layer.dense_mlp
        assert isinstance(first, Dense)
        assert isinstance(second, Dense)
        if first in self.exact or second in self.exact:
            return super().residual(layer, x, scale, **rest)
        y = quantized.linear_activate_rows(self.rows(x), quantized.packed(first.linear.weight), dtype=self.dtype)
        weight = quantized.packed(second.linear.weight)
        scale *= INV_SQRT_2
        out = quantized.linear_activate(y, weight, add=x, scale=scale, add_scale=scale, dtype=x.dtype)
        return finish(out, After(**rest))

    def filtered(
        self, layer: TripletInteraction | QuadrupletInteraction, first: Dense, m: Tensor, rbf: Tensor
    ) -> Tensor:
        """Apply a dense layer, filter by the radial basis and down-project: [E_in, .] to [E_in, C]."""
        if first in self.exact or layer.down_projection in self.exact:
            return super().filtered(layer, first, m, rbf)
        factor = made(self.filter(layer.mlp_rbf, rbf, layer.scale_rbf), self.backend)
        y = quantized.linear_activate_rows(
            self.rows(m), quantized.packed(first.linear.weight), factor, dtype=self.dtype
        )
        weight = quantized.packed(layer.down_projection.linear.weight)
        return self._wide(quantized.linear_activate(y, weight, dtype=self.dtype))

    def mix(self, layer: Linear, x: Tensor, scale: ScaleFactor) -> Tensor:
        """Apply a linear layer to sums over neighbours, with a scale factor folded into their scales."""
        if layer in self.exact:
            return super().mix(layer, x, scale)
        rows = quantized.quantize_rows(x)
        rows = QuantizedRows(rows.values, rows.scales * scale.scale_factor)
        return quantized.linear(rows, quantized.packed(layer.linear.weight), x.dtype)

    def embed_edges(self, layer: Dense, h: Tensor, m: Tensor) -> Tensor:
        """Apply a dense layer to [h_source, h_target, m], of whose weight only the part of m runs on edges."""
        if layer in self.exact:
            return super().embed_edges(layer, h, m)
        x = quantized.linear(self.rows(m), quantized.packed(layer.linear.weight, 2 * h.shape[1]), self.dtype)
        return passes(x, After(rows=self.atom_rows(layer, h)))


class Float8Executor(FusedExecutor):
    """The steps of a forward pass with dense layers in 8-bit floating point; nothing has a derivative.

    Args:
        graph: a batch, on a GPU that multiplies it.
        backend: whose kernels.
        exact: layers that stay in bfloat16, and those whose widths 8-bit products do not have.
    """

    def __init__(self, graph: AtomGraph, backend: Backend, exact: Collection[nn.Module] = ()) -> None:
        super().__init__(graph, LOW, backend, hold=True)
        self.exact = exact
        self.rows = Once(float8.quantize_rows)

    def _exact(self, layer: Linear, first: int = 0) -> bool:
        return layer in self.exact or not float8.fits(layer.linear.weight, first)

    def _product(self, layer: Linear, x: Tensor, first: int = 0) -> Tensor:
        return float8.linear(self.rows(x), float8.packed(layer.linear.weight, first), LOW)

    def dense(
        self, layer: Dense, x: Tensor, factor: Tensor | Filter | None = None, add: Tensor | None = None, **rest: Any
    ) -> Tensor:
        """Apply a linear layer and what `After` says, such as its activation."""
        if self._exact(layer):
            return super().dense(layer, x, factor, add, **rest)
        return passes(self._product(layer, x), After(factor=factor, add=add, **rest), backend=self.backend)

    def embed_edges(self, layer: Dense, h: Tensor, m: Tensor) -> Tensor:
        """Apply a dense layer to [h_source, h_target, m], of whose weight only the part of m runs on edges."""
        first = 2 * h.shape[1]
        if self._exact(layer, first):
            return super().embed_edges(layer, h, m)
        return passes(self._product(layer, m, first), After(rows=self.atom_rows(layer, h)), backend=self.backend)


class FakeQuantizedExecutor(FusedExecutor):
    """The steps of a forward pass as `QuantizedExecutor` rounds them, in bfloat16 and with derivatives: for training.

    Features and weights of dense layers are rounded to what 8-bit integers can say and go on in bfloat16; derivatives
    pass the rounding as if it were not there (straight-through, arXiv 1308.3432).

    Args:
        graph: a batch.
        backend: whose kernels.
        exact: layers that stay in bfloat16.
        low: the type of what is rounded and of all else that is not in float32: bfloat16, or None for float32.
    """

    def __init__(
        self,
        graph: AtomGraph,
        backend: Backend,
        exact: Collection[nn.Module] = (),
        low: torch.dtype | None = LOW,
    ) -> None:
        super().__init__(graph, low, backend, hold=False)
        self.exact = exact
        self.dtype = low or torch.float32
        self.rounded = Once(lambda x: quantized.straight_through(x).to(self.dtype))

    def operands(self, layer: Linear, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Return what is multiplied for a layer: its input, and its weight's columns from `first` on."""
        if layer in self.exact:
            return super().operands(layer, x, first)
        return self.rounded(x), self.rounded(layer.linear.weight[:, first:])

    def mix(self, layer: Linear, x: Tensor, scale: ScaleFactor) -> Tensor:
        """Apply a linear layer and a scale factor to sums over neighbours."""
        if layer in self.exact:
            return super().mix(layer, x, scale)
        z = linear(*self.operands(layer, x), backend=self.backend)
        return z * scale.scale_factor.to(z.dtype)


def check_layers(names: Sequence[str], model: nn.Module) -> None:
    """Raise ValueError if a name among those of the layers that stay in bfloat16 is not that of a layer.

    Raises:
        ValueError: naming it.
    """
    for name in names:
        try:
            found = model.get_submodule(name)
        except AttributeError:
            found = None
        if not isinstance(found, Linear):
            raise ValueError(f"JMPConfig.bf16_layers: there is no linear layer {name!r}")  # noqa: TRY004


def in_eight_bits(
    graph: AtomGraph,
    kind: Precision | Literal["int8 training"],
    backend: Kernels,
    exact: Collection[nn.Module],
    *,
    recorded: bool,
) -> FusedExecutor:
    """Return what computes a forward pass in 8 bits.

    Args:
        graph: a batch.
        kind: "int8", "fp8", or "int8 training": rounded as in "int8", with derivatives.
        backend: the model's.
        exact: layers that stay in bfloat16.
        recorded: whether derivatives are asked for.

    Raises:
        RuntimeError: if they are and there are none, or the backend has no such products.
    """
    if backend == "reference" or (kind == "int8" and backend != "native"):
        wanted = "native backend" if kind == "int8" else "native and Triton backends"
        raise RuntimeError(f'precision="{kind.split()[0]}" is computed by the {wanted}, this is {backend}')
    if kind == "int8 training":
        return FakeQuantizedExecutor(graph, backend, exact)
    if recorded:
        raise RuntimeError(
            f'precision="{kind}" has no derivatives: predict energies and direct forces under torch.no_grad(), and '
            'gradient forces at precision="bf16"; only a model at "int8" in training mode rounds and has derivatives'
        )
    return QuantizedExecutor(graph, exact) if kind == "int8" else Float8Executor(graph, backend, exact)
