"""Fit the ScaleFactors of a model, once, on a few batches."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ejmp.graph.graph import AtomGraph
from ejmp.model.jmp import JMP
from ejmp.model.layers import Comparison, ScaleFactor


class _FactorReachedError(Exception):
    """Ends a forward pass at the factor that is being fitted."""


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
    backend, model.requested_backend = model.requested_backend, "reference"  # the one whose layers run one by one
    try:
        for factor in _forward_order(model, names, graphs[0]):
            fitted[names[factor]] = _fit(model, factor, graphs, names[factor])
    except BaseException:
        for factor, value in before.items():
            factor.scale_factor.copy_(value)
        raise
    finally:
        model.requested_backend = backend
    return fitted


def _forward_order(model: JMP, names: dict[ScaleFactor, str], graph: AtomGraph) -> list[ScaleFactor]:
    order: list[ScaleFactor] = []

    def note(factor: ScaleFactor, _output: Tensor, _compared_with: Comparison) -> None:
        order.append(factor)

    for factor in names:
        factor.observer = note
    try:
        model(graph)
    finally:
        for factor in names:
            factor.observer = None
    return order


def _fit(model: JMP, factor: ScaleFactor, graphs: Sequence[AtomGraph], name: str) -> float:
    variances = torch.zeros(2, dtype=torch.float64)

    def observe(_factor: ScaleFactor, output: Tensor, compared_with: Comparison) -> None:
        rows = output.flatten(0, -2).shape[0]
        both = torch.tensor([_variance(*compared_with()), _variance(output)], dtype=torch.float64)
        if not both.isnan().any():  # a batch with fewer than two rows, such as one without triplets, says nothing
            variances.add_(both * rows)
        raise _FactorReachedError

    factor.observer = observe
    try:
        for graph in graphs:
            try:
                model(graph)
            except _FactorReachedError:
                continue
    finally:
        factor.observer = None
    value = (variances[0] / variances[1]).sqrt().item()
    if not 0 < value < float("inf"):
        raise ValueError(
            f"{name}: cannot be fitted on these batches: the variances of its reference and output are "
            f"{variances.tolist()}; they need several elements, and triplets and quadruplets"
        )
    factor.scale_factor.fill_(value)
    return value
