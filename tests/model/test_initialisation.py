"""Random orthogonal weights against torch's, which factorise a matrix of normal numbers."""

import pytest
import torch
from scipy.stats import ks_2samp
from support.tolerances import tolerance

from ejmp.model.initialisation import PANEL, orthogonal_
from ejmp.model.layers import he_orthogonal_

SHAPES = [(1, 1), (5, 1), (1, 5), (7, 7), (300, PANEL + 1), (PANEL, 2 * PANEL), (400, 400)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_or_columns_are_orthonormal(shape, dtype):
    torch.manual_seed(0)
    weight = torch.full(shape, torch.nan, dtype=dtype)
    assert orthogonal_(weight) is weight
    tall = weight if shape[0] >= shape[1] else weight.mT
    error = (tall.mT @ tall - torch.eye(tall.shape[1], dtype=dtype)).abs().max()
    assert error < tolerance("orthonormal rows", dtype)


def drawn(fill, count, shape):
    torch.manual_seed(1)
    return torch.stack([fill(torch.empty(shape, dtype=torch.float64)) for _ in range(count)])


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6)])
def test_the_distribution_is_that_of_torch(shape):
    """Single entries, sums over the diagonal, and the product of a square's corners, which are not independent."""
    ours = drawn(orthogonal_, 4000, shape)
    theirs = drawn(torch.nn.init.orthogonal_, 4000, shape)
    statistics = [
        *(lambda w, i=i, j=j: w[:, i, j] for i in (0, shape[0] - 1) for j in (0, shape[1] - 1)),
        lambda w: w.diagonal(dim1=1, dim2=2).sum(1),
        lambda w: w[:, 0, 0] * w[:, 1, 1] * w[:, 0, 1] * w[:, 1, 0],
        lambda w: w[:, -1].abs().max(1).values,
    ]
    for statistic in statistics:
        assert ks_2samp(statistic(ours).numpy(), statistic(theirs).numpy()).pvalue > 1e-3
    if shape[0] == shape[1]:
        reflections = (torch.linalg.det(ours) < 0).double().mean().item()
        assert reflections == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (12, 7, 16)])
def test_weights_are_standardised_over_their_inputs(shape):
    torch.manual_seed(2)
    weight = he_orthogonal_(torch.empty(shape, dtype=torch.float64))
    inputs = (0, 1) if len(shape) == 3 else (1,)
    fan_in = shape[1] if len(shape) == 2 else shape[0] * shape[1]
    assert weight.mean(inputs).abs().max() < 1e-12
    assert torch.allclose(weight.var(inputs) * fan_in, torch.ones(1, dtype=torch.float64), rtol=2e-2)
