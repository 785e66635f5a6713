"""Linear maps without bias: out = x weight^T, by the product `gemm` chooses, at every order of derivative.

The native backend has one op, `ejmp::matmul(a, b, transpose_a, transpose_b)`: its gradients are itself with other
transpositions, so it can be differentiated as often as one likes (csrc/bindings/dense.cpp). With Triton the vendor's
product is torch's own, and `dense` takes what comes after a product into its epilogue. 2 m k n FLOP, counted by torch's
counter. Specification: torch.nn.functional.linear.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake
from torch.utils.flop_counter import register_flop_formula

from ejmp_kernels.gemm import product
from ejmp_kernels.registry import NAMESPACES, Backend, ops_of, when_loaded

_LIBRARY = Library("ejmp", "IMPL")


def linear(x: Tensor, weight: Tensor, *, backend: Backend = "native") -> Tensor:
    """Return x weight^T, [rows, in] x [out, in] -> [rows, out]; both of one type, on one device.

    Raises:
        ValueError: if the sizes do not fit or the types differ.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        shapes = f"{tuple(x.shape)} {x.dtype}, {tuple(weight.shape)} {weight.dtype}"
        raise ValueError(f"linear: expected x [rows, in] and weight [out, in] of one type, got {shapes}")
    if backend == "triton":
        return torch.nn.functional.linear(x, weight)
    return ops_of("native").matmul(x, weight, False, True)


@when_loaded
def _register(namespace: str) -> None:
    if namespace != NAMESPACES["native"]:
        return

    def matmul(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool) -> Tensor:
        return product(a.mT if transpose_a else a, b.mT if transpose_b else b)

    def fake(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool) -> Tensor:
        return a.new_empty(a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1])

    def flops(a: torch.Size, b: torch.Size, transpose_a: bool, transpose_b: bool, out_shape: Any = None) -> int:
        return 2 * a[0] * a[1] * b[0 if transpose_b else 1]

    _LIBRARY.impl("matmul", matmul, "CompositeExplicitAutograd")
    register_fake("ejmp::matmul")(fake)
    register_flop_formula([torch.ops.ejmp.matmul])(flops)
