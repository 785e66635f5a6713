"""The small layers everything is made of: Dense, Residual, ScaleFactor, and their initialisation.

Attribute names are upstream's, because the state dict's names are.
"""

import math

import torch
from torch import Tensor, nn

from ejmp.model.initialisation import one_thread, orthogonal_

INV_SQRT_2 = 1 / math.sqrt(2)
INV_SQRT_3 = 1 / math.sqrt(3)


class ScaledSiLU(nn.Module):
    """The activation SiLU(x) / 0.6, which keeps the variance of normal inputs near one (GemNet, arXiv 2106.08903)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to each element."""
        return nn.functional.silu(x) * (1 / 0.6)


@torch.no_grad()
def he_orthogonal_(weight: Tensor) -> Tensor:
    """Fill a weight with a semi-orthogonal matrix, standardised over its inputs and scaled by fan_in^-1/2.

    A matrix [out, in] is standardised over `in`; a 3-d weight [R, S, emb] over its first two dimensions.
    Source: GemNet's initialiser (arXiv 2106.08903), as JMP uses it.
    """
    if weight.is_meta:
        return weight
    inputs = [0, 1] if weight.ndim == 3 else [1]
    fan_in = math.prod(weight.shape[i] for i in inputs)
    with one_thread():
        orthogonal_(weight.flatten(1))
        weight -= weight.mean(inputs, keepdim=True)
        variance = torch.linalg.vector_norm(weight, dim=inputs, keepdim=True).square() / max(fan_in - 1, 1)
        weight *= ((variance + 1e-6) * fan_in).rsqrt()
    return weight


class Linear(nn.Module):
    """A linear map without bias or activation, with he-orthogonal random weights."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        linear = nn.utils.skip_init(nn.Linear, num_in, num_out, bias=False, device=torch.get_default_device())
        assert isinstance(linear, nn.Linear)
        he_orthogonal_(linear.weight)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., num_in] to [..., num_out]."""
        return self.linear(x)


class Dense(Linear):
    """A linear map without bias, then ScaledSiLU."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out)
        self.activation = ScaledSiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., num_in] to [..., num_out]."""
        return self.activation(self.linear(x))


class Residual(nn.Module):
    """The residual layer (x + Dense(Dense(x))) / sqrt(2)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.dense_mlp = nn.Sequential(Dense(size, size), Dense(size, size))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., size] to [..., size]."""
        return (x + self.dense_mlp(x)) * INV_SQRT_2


def residuals(num: int, size: int) -> nn.Sequential:
    """Return `num` residual layers in a row."""
    return nn.Sequential(*(Residual(size) for _ in range(num)))


class ScaleFactor(nn.Module):
    """Multiply by a fitted number that gives an output the variance of a reference (`ejmp.fit_scale_factors`).

    The number is 1 until it is fitted.
    """

    scale_factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale_factor", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Scale a tensor of any shape, in its own type."""
        return x * self.scale_factor.to(x.dtype)


class FinalMLP(nn.Module):
    """Join the outputs of all blocks: Dense down to the size of one, then residuals (the paper's g)."""

    def __init__(self, num_outputs: int, size: int, num_layers: int) -> None:
        super().__init__()
        self.out_mlp = nn.ModuleList([Dense(num_outputs * size, size), *(Residual(size) for _ in range(num_layers))])

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Map blocks + 1 tensors [., size] to the output of each layer, [., size]."""
        value = torch.cat(x, dim=-1)
        outputs = []
        for layer in self.out_mlp:
            value = layer(value)
            outputs.append(value)
        return tuple(outputs)
