"""Linear maps without bias: out = x weight^T, by the product `gemm` chooses, at every order of derivative.

One op, `ejmp::matmul(a, b, transpose_a, transpose_b)`: its gradients are itself with other transpositions, so it can be
differentiated as often as one likes. 2 m k n FLOP, counted by torch's counter. Specification: torch.nn.functional.linear.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake
from torch.utils.flop_counter import register_flop_formula

from ejmp_kernels.gemm import product


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x weight^T, [rows, in] x [out, in] -> [rows, out]; both of one type, on one device.

    Raises:
        ValueError: if the sizes do not fit or the types differ.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        shapes = f"{tuple(x.shape)} {x.dtype}, {tuple(weight.shape)} {weight.dtype}"
        raise ValueError(f"linear: expected x [rows, in] and weight [out, in] of one type, got {shapes}")
    return torch.ops.ejmp.matmul(x, weight, False, True)  # noqa: FBT003


def _matmul(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool) -> Tensor:
    return product(a.mT if transpose_a else a, b.mT if transpose_b else b)


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:  # noqa: ARG001
    *tensors, ctx.transpose_a, ctx.transpose_b = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    """For c = a b: da = g b^T, db = a^T g; a transposed input gets a transposed gradient."""
    a, b = ctx.saved_tensors
    ta, tb = ctx.transpose_a, ctx.transpose_b
    matmul = torch.ops.ejmp.matmul
    to_a = to_b = None
    if ctx.needs_input_grad[0]:
        to_a = matmul(b, grad, tb, True) if ta else matmul(grad, b, False, not tb)  # noqa: FBT003
    if ctx.needs_input_grad[1]:
        to_b = matmul(grad, a, True, ta) if tb else matmul(a, grad, not ta, False)  # noqa: FBT003
    return (to_a, to_b, None, None)


def _fake(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool) -> Tensor:
    return a.new_empty(a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1])


def _flops(a: torch.Size, b: torch.Size, transpose_a: bool, transpose_b: bool, **_: Any) -> int:  # noqa: ARG001
    return 2 * a[0] * a[1] * b[0 if transpose_b else 1]


_LIBRARY = Library("ejmp", "FRAGMENT")
_LIBRARY.define("matmul(Tensor a, Tensor b, bool transpose_a, bool transpose_b) -> Tensor")
_LIBRARY.impl("matmul", _matmul, "CompositeExplicitAutograd")
register_fake("ejmp::matmul")(_fake)
register_autograd("ejmp::matmul", _backward, setup_context=_setup)
register_flop_formula([torch.ops.ejmp.matmul])(_flops)
