"""Fit the ScaleFactors of a model, once, on a few batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ejmp.graph.graph import AtomGraph
from ejmp.model.interactions import AtomUpdate, PairInteraction, QuadrupletInteraction, TripletInteraction
from ejmp.model.jmp import JMP
from ejmp.model.layers import Linear, ScaleFactor
from ejmp.model.precision import LOW_PRECISION
from ejmp.model.reference_executor import ReferenceExecutor
from ejmp_kernels.specification import Quadruplets, Triplets


class _FactorReachedError(Exception):
    """Ends a forward pass at the factor that is being fitted."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the output of a factor is compared with."""

    rows: Tensor
    """The reference, [n, C]."""
    counts: Tensor | None = None
    """How often each of its rows counts, [n]; None for once."""
    exists: Tensor | None = None
    """Which rows of the output exist, bool in its shape without the last axis; None for all."""


class _Watcher(ReferenceExecutor):
    """The forward pass in plain torch, which notes before each factor what its output is compared with.

    Source: GemNet-OC as JMP uses it: a filter keeps the variance of what it filters, and a sum over neighbours that of
    its terms.
    """

    def __init__(self, graph: AtomGraph, low: torch.dtype | None) -> None:
        super().__init__(graph, low)
        self.compared_with: dict[nn.Module, Comparison] = {}

    def filtered(self, x: Tensor, radial: Linear, rbf: Tensor, scale: ScaleFactor) -> Tensor:
        self.compared_with[scale] = Comparison(rows=x)
        return super().filtered(x, radial, rbf, scale)

    def triplets(
        self, layer: TripletInteraction, x: Tensor, cbf: Tensor, triplets: Triplets, into_atoms: Tensor | None = None
    ) -> Tensor:
        self.compared_with[layer.scale_cbf_sum] = Comparison(rows=x, counts=triplets.counts(len(x)))
        return super().triplets(layer, x, cbf, triplets, into_atoms)

    def circular_filtered(self, layer: QuadrupletInteraction, gathered: Tensor, circular: Tensor) -> Tensor:
        kept = self.tables.quadruplets.inputs_valid
        self.compared_with[layer.scale_cbf] = Comparison(rows=gathered[kept], exists=kept)
        return super().circular_filtered(layer, gathered, circular)

    def quadruplet_sum(self, layer: QuadrupletInteraction, values: Tensor, quads: Quadruplets) -> Tensor:
        counts = values.new_zeros(len(values) + 1, values.shape[1])
        counts.index_put_((quads.middles,), quads.valid.to(values.dtype), accumulate=True)
        rows = values.flatten(0, 1)
        self.compared_with[layer.scale_sbf_sum] = Comparison(rows=rows, counts=counts[:-1].flatten())
        return super().quadruplet_sum(layer, values, quads)

    def pair_sum(self, layer: PairInteraction, x: Tensor) -> Tensor:
        counts = torch.bincount(self.graph.atom_pairs.source, minlength=len(x)).to(x.dtype)
        self.compared_with[layer.scale_rbf_sum] = Comparison(rows=x, counts=counts)
        return super().pair_sum(layer, x)

    def atom_sum(self, layer: AtomUpdate, m: Tensor, rbf: Tensor) -> Tensor:
        self.compared_with[layer.scale_sum] = Comparison(rows=m)
        return super().atom_sum(layer, m, rbf)


def _variance(rows: Tensor, weights: Tensor | None = None) -> float:
    """Return the unbiased variance over rows, averaged over columns; a row of weight w counts w times.

    NaN if there are fewer than two rows.
    """
    rows = rows.flatten(0, -2).double()
    weights = torch.ones(len(rows), 1, device=rows.device) if weights is None else weights[:, None]
    weights = weights.double()
    total = weights.sum()
    if total < 2:
        return math.nan
    mean = (rows * weights).sum(0) / total
    return (((rows - mean) ** 2 * weights).sum(0) / (total - 1)).mean().item()


@torch.no_grad()
def fit_scale_factors(model: JMP, graphs: Sequence[AtomGraph]) -> dict[str, float]:
    """Fit every ScaleFactor in forward order, so that outputs get the variance of their references.

    value = sqrt(sum_b n_b var(reference_b) / sum_b n_b var(output_b)) over batches b with n_b output rows; factors
    fitted before are in place, later ones do not matter. GemNet (arXiv 2106.08903, appendix) as JMP uses it. Costs
    about factors * batches / 2 forward passes.

    Args:
        model: changed in place.
        graphs: the batches.

    Returns:
        The fitted values by module name.

    Raises:
        ValueError: if there is no batch, or an output has no variance to fit (all factors are then as before).
    """
    if not graphs:
        raise ValueError("graphs: expected at least one batch to fit on, got none")
    names = {module: name for name, module in model.named_modules() if isinstance(module, ScaleFactor)}
    before = {factor: factor.scale_factor.clone() for factor in names}
    fitted: dict[str, float] = {}
    try:
        for factor in _forward_order(model, names, graphs[0]):
            fitted[names[factor]] = _fit(model, factor, graphs, names[factor])
    except BaseException:
        for factor, value in before.items():
            factor.scale_factor.copy_(value)
        raise
    return fitted


def _watched(model: JMP, graph: AtomGraph) -> _Watcher:
    model.check_graph(graph)
    return _Watcher(graph, LOW_PRECISION.get(model.precision))


def _forward_order(model: JMP, names: dict[ScaleFactor, str], graph: AtomGraph) -> list[ScaleFactor]:
    order: list[ScaleFactor] = []

    def note(factor: nn.Module, _inputs: tuple[Tensor]) -> None:
        assert isinstance(factor, ScaleFactor)
        order.append(factor)

    handles = [factor.register_forward_pre_hook(note) for factor in names]
    try:
        model.run(_watched(model, graph))
    finally:
        for handle in handles:
            handle.remove()
    return order


def _fit(model: JMP, factor: ScaleFactor, graphs: Sequence[AtomGraph], name: str) -> float:
    variances = torch.zeros(2, dtype=torch.float64)
    for graph in graphs:
        watcher = _watched(model, graph)
        output = _output_before(model, factor, watcher)
        found = watcher.compared_with[factor]
        output = output if found.exists is None else output[found.exists]
        both = torch.tensor([_variance(found.rows, found.counts), _variance(output)], dtype=torch.float64)
        if not both.isnan().any():  # a batch with fewer than two rows, such as one without triplets, says nothing
            variances.add_(both * output.flatten(0, -2).shape[0])
    value = (variances[0] / variances[1]).sqrt().item()
    if not 0 < value < float("inf"):
        raise ValueError(
            f"{name}: cannot be fitted on these batches: the variances of its reference and output are "
            f"{variances.tolist()}; they need several elements, and triplets and quadruplets"
        )
    factor.scale_factor.fill_(value)
    return value


def _output_before(model: JMP, factor: ScaleFactor, watcher: _Watcher) -> Tensor:
    """Run a forward pass up to a factor and return what it would scale."""
    found: list[Tensor] = []

    def stop(_factor: nn.Module, inputs: tuple[Tensor]) -> None:
        found.append(inputs[0])
        raise _FactorReachedError

    handle = factor.register_forward_pre_hook(stop)
    try:
        model.run(watcher)
    except _FactorReachedError:
        return found[0]
    finally:
        handle.remove()
    raise AssertionError("a forward pass reaches every factor")
