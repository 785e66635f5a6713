"""A linear map and what comes after it: activation, filter, residuals and scalings in the product's epilogue.

out = scale ScaledSiLU(x weight^T + rows) factor + add_scale add + more_scale more. The native backend makes the product
and a pass after it, and where derivatives will be asked for they are one function to autograd, which keeps less for a
second derivative (csrc/bindings/products.cpp). Triton's makes product and passes there, whose derivatives need the
product itself; elsewhere it has one op, 2 m n k FLOP, that makes all of it at once where that is faster, filters that
are products themselves and rows of atoms too. Specification: `specification.activate` of torch.nn.functional.linear.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ejmp_kernels.activation import SCALED_SILU, activate, swap_add
from ejmp_kernels.edge_embedding import gather_add
from ejmp_kernels.linear import linear
from ejmp_kernels.registry import LOW, NAMESPACES, Backend, is_recorded, ops_of, register_shape, when_loaded


class Filter(NamedTuple):
    """A factor that is a product itself, basis weight^T, such as a filter of distances."""

    basis: Tensor
    """[rows, R]; R is at most 128 with Triton."""
    weight: Tensor
    """[out, R], of the same type."""


def made(factor: Tensor | Filter | None, backend: Backend) -> Tensor | None:
    """Return a factor [rows, out] that may have to be made."""
    return linear(*factor, backend=backend) if isinstance(factor, Filter) else factor


class AtomRows(NamedTuple):
    """What atoms add to the product of an edge: the arguments of `edge_embedding.gather_add`, and target [E]."""

    source_rows: Tensor
    target_rows: Tensor
    source: Tensor
    target: Tensor
    swap: Tensor
    ptr: Tensor


@dataclass(frozen=True, kw_only=True)
class After:
    """What follows a product: (scale ScaledSiLU(product + rows) factor + add_scale add + more_scale more) outer."""

    factor: Tensor | Filter | None = None
    """[rows, out], or what it is the product of, or None for one."""
    add: Tensor | None = None
    """[rows, out] or None for zero; the result has its type."""
    more: Tensor | None = None
    """[rows, out] or None for zero."""
    outer: Filter | None = None
    """A filter of the sum, or None for one."""
    rows: AtomRows | None = None
    """What atoms add to the products of edges, or None for nothing."""
    scale: float = 1.0
    add_scale: float = 1.0
    more_scale: float = 1.0

    def tensors(self) -> Iterator[Tensor | None]:
        """Yield what could have derivatives."""
        yield from (self.add, self.more, *(self.outer or ()), *(self.rows or ())[:2])
        yield from self.factor if isinstance(self.factor, Filter) else (self.factor,)


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
        add: [rows, out] or None for zero; the result has its type.
        scale: factor of the activation.
        add_scale: factor of `add`.
        backend: whose kernels to use.

    Returns:
        [rows, out].

    Raises:
        ValueError: if shapes, types or devices do not fit together.
    """
    return dense(x, weight, After(factor=factor, add=add, scale=scale, add_scale=add_scale), backend=backend)


def dense(x: Tensor, weight: Tensor, after: After, *, backend: Backend = "native") -> Tensor:
    """Return x weight^T and what follows it, see `After`.

    Args:
        x: [rows, in].
        weight: [out, in], of the same type.
        after: what follows the product.
        backend: whose kernels to use.

    Returns:
        [rows, out].

    Raises:
        ValueError: if shapes, types or devices do not fit together.
    """
    recorded = is_recorded(x, weight, *after.tensors())
    # in other types Triton's products are the vendor's, and rows of atoms are quickest added atom by atom
    if backend == "triton" and not recorded and (x.dtype in LOW or after.rows is None):
        return _fused(x, weight, after)
    same_type = after.add is None or after.add.dtype == x.dtype  # the atoms' residual stream stays in float32
    if backend == "native" and recorded and same_type and after.rows is None:
        factor, alpha = made(after.factor, backend), after.scale * SCALED_SILU
        out = ops_of(backend).linear_activate(x, weight, factor, after.add, alpha, after.add_scale)
        return finish(out, after, backend=backend)
    return passes(linear(x, weight, backend=backend), after, backend=backend)


def passes(z: Tensor, after: After, *, backend: Backend = "native") -> Tensor:
    """Return what follows a product that nothing else refers to, [rows, out], by passes of their own."""
    if after.rows is not None:
        source_rows, target_rows, source, _, swap, ptr = after.rows
        z = gather_add(z, source_rows, target_rows, source, swap, ptr, backend=backend)
    z = z if after.add is None else z.to(after.add.dtype)
    factor, scales = made(after.factor, backend), {"scale": after.scale, "add_scale": after.add_scale}
    return finish(activate(z, factor, after.add, in_place=True, backend=backend, **scales), after, backend=backend)


def finish(out: Tensor, after: After, *, backend: Backend = "native") -> Tensor:
    """Return (out + more_scale more) outer, [rows, out]: the last of the passes."""
    out = out if after.more is None else torch.add(out, after.more, alpha=after.more_scale)
    return out if after.outer is None else out * linear(*after.outer, backend=backend)


def _fused(x: Tensor, weight: Tensor, after: After) -> Tensor:
    """Return all of it by one op of Triton, which has one filter."""
    factor, outer = after.factor, after.outer
    if outer is not None:
        factor = made(factor, "triton")
    inner, factor = (factor, None) if isinstance(factor, Filter) else (None, factor)
    basis, filters = inner or outer or (None, None)
    source_rows, target_rows, source, target, *_ = after.rows or (None,) * 4
    atoms = (source_rows, source, target_rows, target)
    scales = (after.scale * SCALED_SILU, after.add_scale, after.more_scale)
    wide = (after.add, after.more)
    return ops_of("triton").linear_fused(x, weight, factor, basis, filters, *wide, *atoms, *scales, outer is not None)


def linear_swap_add(
    x: Tensor,
    weight: Tensor,
    swap: Tensor,
    add: Tensor | None = None,
    *,
    scale: float = 1.0,
    backend: Backend = "native",
) -> Tensor:
    """Return `swap_add` of x weight^T: messages up-projected to edges and counter-edges, and added.

    Where no derivatives are asked for, the product [E, 2 M] is never a whole in memory, on a CPU and with Triton.

    Args:
        x: [E, in].
        weight: [2 M, in], the part for edges before that for counter-edges; of the same type.
        swap: [E] int64, the counter-edge of each edge; it undoes itself.
        add: [E, M] or None.
        scale: factor of the sum of both activated messages.
        backend: whose kernels to use.

    Returns:
        [E, M].

    Raises:
        ValueError: if shapes, types or devices do not fit together.
    """
    in_parts = backend == "triton" or (x.device.type == "cpu" and not torch.compiler.is_compiling())
    if in_parts and not is_recorded(x, weight, add):
        return ops_of(backend).linear_swap_add(x, weight, swap, add, scale * SCALED_SILU)
    return swap_add(linear(x, weight, backend=backend), swap, add, scale=scale, backend=backend)


def _flops(x: torch.Size, weight: torch.Size, *_: Any, out_shape: Any = None) -> int:
    return 2 * x[0] * x[1] * weight[0]


def _fake_fused(
    x: Tensor, weight: Tensor, _factor: Any, _basis: Any, _filter: Any, add: Tensor | None, *_: Any
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=x.dtype if add is None else add.dtype)


def _fused_flops(
    x: torch.Size, weight: torch.Size, _factor: Any, basis: torch.Size | None, *_: Any, out_shape: Any = None
) -> int:
    return _flops(x, weight) + (0 if basis is None else 2 * basis[0] * basis[1] * weight[0])


@when_loaded
def _register(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)
    register_shape(f"{namespace}::linear_swap_add", lambda x, w, *_: x.new_empty(x.shape[0], w.shape[0] // 2))
    register_flop_formula([ops.linear_swap_add])(_flops)
    if namespace == NAMESPACES["triton"]:
        register_shape(f"{namespace}::linear_fused", _fake_fused)
        register_flop_formula([ops.linear_fused])(_fused_flops)
