"""A linear map and what comes after it: activation, filter, residual and scalings in the product's epilogue.

out = scale ScaledSiLU(x weight^T) factor + add_scale add. Specification: `reference.activate` of
torch.nn.functional.linear.
"""

import torch
from torch import Tensor

from ejmp_kernels.activation import SCALED_SILU, activate
from ejmp_kernels.library import Backend, ops
from ejmp_kernels.linear import linear


def linear_activate(
    x: Tensor,
    weight: Tensor,
    factor: Tensor | None = None,
    add: Tensor | None = None,
    *,
    scale: float = 1.0,
    add_scale: float = 1.0,
    backend: Backend = "native",
) -> Tensor:
    """Return scale * ScaledSiLU(x weight^T) * factor + add_scale * add.

    Args:
        x: [rows, in].
        weight: [out, in], of the same type.
        factor: [rows, out] or None for one.
        add: [rows, out] or None for zero.
        scale: of the activation.
        add_scale: of what is added.
        backend: whose kernels.

    Returns:
        [rows, out].

    Raises:
        ValueError: if shapes, types or devices do not fit together.
    """
    out = linear(x, weight, backend=backend)
    add = add if add is None else add.to(out.dtype)
    return activate(out, factor, add, scale=scale, add_scale=add_scale, in_place=True, backend=backend)
