"""Calls that `tune` times: the ops at JMP-L's widths on random edges, by the kernel whose settings they decide."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ejmp_kernels.activation import SCALED_SILU
from ejmp_kernels.dense import linear_activate

ELSEWHERE = {
    "quadruplet_sums": "quadruplet_backward",
    "quadruplet_gather": "quadruplet_backward",
    "quadruplet_sums_double": "quadruplet_double",
}
"""Op to time a kernel in, where the kernel's name does not begin with the op's."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the arrays in the calls."""

    rows: int = 32768
    """Rows m of the products; half as many are timed too."""
    wide: int = 1024
    """Columns k of the products, and n of one of them; the other is four times as wide."""
    atoms: int = 1024
    """Number of atoms."""
    degree: int = 30
    """Number of edges into each atom."""
    channels: int = 64
    """Channels of the features on edges."""


DRY = Sizes(rows=64, wide=32, atoms=2, degree=3, channels=16)
"""Sizes of a dry run."""


def random_edges(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return pointers, sources, images (all different) and unit vectors of edges from random atoms."""
    count = sizes.atoms * sizes.degree
    ptr = torch.arange(0, count + 1, sizes.degree, device=device)
    source = torch.randint(sizes.atoms, (count,), device=device)
    vector = torch.randn(count, 3, dtype=dtype, device=device)
    return ptr, source, torch.arange(count, device=device), vector / vector.norm(dim=1, keepdim=True)


def products(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, list[Callable]]:
    """Return calls of the fused product by the kernel whose settings they decide."""

    def call(m: int, n: int) -> Callable[[], Tensor]:
        x, weight, out = (torch.randn(*s, dtype=dtype, device=device) for s in ((m, k), (n, k), (m, n)))
        weight /= k**0.5
        return lambda: linear_activate(x, weight, out, out, add_scale=0.7, backend="triton")

    k, rows = sizes.wide, (sizes.rows, sizes.rows // 2)
    return {
        "linear_activate": [call(m, n) for m in rows for n in (k, 4 * k)],
        "linear_activate_middle": [call(max(1, 3 * sizes.rows // 32), k)],
        "linear_activate_small": [call(max(1, sizes.rows // 64), k)],
    }


def graph_ops(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Callable]:
    """Return one call of each op on edges, and of the flat passes, by the op's name."""
    ops, real = torch.ops.ejmp_triton, torch.float64 if dtype == torch.float64 else torch.float32
    ptr, source, image, v = random_edges(sizes, real, device)
    count, c, ids = len(source), sizes.channels, (ptr, source, image)

    def features(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    def wide(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=real, device=device)

    swap = torch.arange(count, device=device).flip(0)
    calls: dict[str, Callable] = {}

    def with_gradients(name: str, inputs: tuple[Tensor, ...], rest: tuple) -> None:
        grad = getattr(ops, name)(*inputs, *rest)
        calls[name] = lambda: getattr(ops, name)(*inputs, *rest)
        calls[f"{name}_backward"] = lambda: getattr(ops, f"{name}_backward")(grad, *inputs, *rest)
        if hasattr(ops, f"{name}_double"):
            calls[f"{name}_double"] = lambda: getattr(ops, f"{name}_double")(*inputs, grad, *inputs, *rest)

    with_gradients("triplet", (features(count, c), wide(count, c // 4, 7), v, v), (*ids, *ids, False))
    inputs = (features(count, c), wide(count, 7, c), wide(count, c, 49), v, v)
    with_gradients("quadruplet", inputs, (*ids, *ids, 1e-4, sizes.degree))
    with_gradients("pair", (features(sizes.atoms, c), wide(count, c // 2)), (ptr, source))
    distance, centres = wide(count).abs(), wide(128)
    rows, m = wide(sizes.atoms, sizes.wide), features(count, sizes.wide)
    small, pairs = features(128, 6 * c), features(count, 2 * sizes.wide)
    calls["radial"] = lambda: ops.radial(distance, centres, centres, small, 12.0, 5, 0)
    calls["radial_transposed"] = lambda: ops.radial_transposed(distance, centres, centres, m[:, : 6 * c], 12.0, 5, 0)
    calls["activate"] = lambda: ops.activate(m, m, m, SCALED_SILU, 1.0)
    calls["swap_add"] = lambda: ops.swap_add(pairs, swap, m, SCALED_SILU)
    narrow, up = features(count, c), features(2 * sizes.wide, c)
    calls["linear_swap_add"] = lambda: ops.linear_swap_add(narrow, up, swap, m, SCALED_SILU)
    calls["gather_add"] = lambda: ops.gather_add(m, rows, rows, source, swap, ptr)
    basis, filters = features(count, c // 2), features(sizes.wide, c // 2)
    calls["atom_sum_filtered"] = lambda: ops.atom_sum_filtered(m, basis, filters, ptr)
    calls["edge_sum"] = lambda: ops.edge_sum(m, swap, ptr)
    return calls


def calls_by_kernel(
    kernels: Collection[str], sizes: Sizes, dtype: torch.dtype, device: torch.device
) -> dict[str, list[Callable]]:
    """Return, for each of some kernels, the calls that decide on its settings.

    Raises:
        ValueError: if nothing here calls a kernel.
    """
    found = products(sizes, dtype, device)
    others = set(kernels) - set(found)
    calls = graph_ops(sizes, dtype, device) if others else {}
    for kernel in others:
        names = [ELSEWHERE[kernel]] if kernel in ELSEWHERE else [name for name in calls if kernel.startswith(name)]
        if not names:
            raise ValueError(f"kernel: expected one that {', '.join(calls)} launch, got {kernel!r}")
        found[kernel] = [calls[max(names, key=len)]]
    return {kernel: found[kernel] for kernel in kernels}
