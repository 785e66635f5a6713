"""Linear maps without bias: out = x weight^T, by the product `gemm` chooses, at every order of derivative.

The native backend has one op, `ejmp::matmul(a, b, transpose_a, transpose_b)`: its gradients are itself with other
transpositions, so it can be differentiated as often as one likes (csrc/bindings/products.cpp). Small products are
torch's own; for the others it calls `ejmp::product`, which is `gemm.product`. With Triton the vendor's product is
torch's own, and `dense` takes what comes after a product into its epilogue. 2 m k n FLOP, counted by torch's counter.
Specification: torch.nn.functional.linear.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.utils.flop_counter import register_flop_formula

from ejmp_kernels.gemm import product
from ejmp_kernels.registry import NAMESPACES, Backend, check_storage, ops_of, register_shape, when_loaded

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


def _check(op: str, a: Tensor, b: Tensor, transpose_a: bool = False, transpose_b: bool = False) -> None:
    """Raise ValueError if two arguments of an op cannot be multiplied."""
    for name, x in (("a", a), ("b", b)):
        if x is None:  # torch lets it pass
            raise ValueError(f"{op}: {name} must be a tensor, got none")
        if x.ndim != 2 or not x.is_floating_point() or x.layout != torch.strided:
            raise ValueError(f"{op}: {name} must be a matrix of floats, got {x.layout} {x.dtype} {list(x.shape)}")
    if b.dtype != a.dtype or b.device != a.device:
        raise ValueError(f"{op}: b must be {a.dtype} on {a.device} as a, got {b.dtype} on {b.device}")
    if a.shape[0 if transpose_a else 1] != b.shape[1 if transpose_b else 0]:
        shapes = f"{list(a.shape)}{'^T' * transpose_a} times {list(b.shape)}{'^T' * transpose_b}"
        raise ValueError(f"{op}: a and b must fit together, got {shapes}")


@when_loaded
def _register(namespace: str) -> None:
    if namespace != NAMESPACES["native"]:
        return

    def checked(a: Tensor, b: Tensor) -> Tensor:
        _check("product", a, b)
        check_storage("product", "a", a)
        check_storage("product", "b", b)
        return product(a, b)

    def fake(a: Tensor, b: Tensor, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
        _check("matmul", a, b, transpose_a, transpose_b)
        return a.new_empty(a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1])

    def flops(a: torch.Size, b: torch.Size, transpose_a: bool, transpose_b: bool, out_shape: Any = None) -> int:
        return 2 * a[0] * a[1] * b[0 if transpose_b else 1]

    _LIBRARY.impl("product", checked, "CompositeExplicitAutograd")
    register_shape("ejmp::matmul", fake)
    register_shape("ejmp::product", fake)
    register_flop_formula([torch.ops.ejmp.matmul])(flops)
    register_shape("ejmp::transposed", lambda x: x.new_empty(x.shape[::-1]))
