"""A matrix product and all that follows it in a dense layer, written once; its kernels are in `gemm_kernels`.

out = alpha silu(z) factor (basis filter^T) + beta add + gamma more
z[i, j] = sum_k x[i, k] weight[j, k] + source_rows[source[i], j] + target_rows[target[i], j]

x [m, k], weight [n, k], basis [m, r], filter [n, r], the other arrays [m, n], all of one type and row-major; only add
and more may be in the type of sums, and out is in the type of add. Rows of atoms [N, n] are in the type of sums. Each
of them may be absent, and the filter may multiply the whole sum instead. Sums and epilogue are in float32 (float64 for
float64), rounded once. 2 m n (k + r) FLOP; reads what is there once and writes out, where a product and passes after it
move 2 m n numbers more for the product and as many for the filter, 3 m n for `more` and 4 m n for the rows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ejmp_kernels.triton_kernels import gemm_specialized, launch
from ejmp_kernels.triton_kernels.gemm_kernels import by_descriptors, by_pointers
from ejmp_kernels.triton_kernels.gemm_specialized import specialized

NO_OPTIONS = ("fused", "TMA", "FLATTEN", "SPECIALIZED", "PROGRAMS", "RATE")
"""Names of settings that are not handed to both kernels as they are."""


def precision(x: Tensor) -> str:
    """Return how products run; those of float32 in TF32 only where torch's own would."""
    if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return launch.dot_precision(x)


def fuses(x: Tensor) -> bool:
    """Return whether a type takes these kernels, and not the vendor's product and a pass after it.

    They are for products that tensor cores make in one go. Three TF32 products for one of float32 are no faster than
    the vendor's on the ordinary cores and round otherwise, and in float64 the pass after the product costs little.
    """
    return launch.config("linear_activate", x)["fused"] and precision(x) != "tf32x3"


class Kind(NamedTuple):
    """What the launch of a product depends on."""

    device: torch.device
    dtype: torch.dtype
    m: int
    n: int
    k: int
    r: int
    """Columns of the basis, 0 without one."""
    rows: bool
    """Whether there are rows of atoms."""
    wide: bool
    """Whether something of the size of out is in the type of sums."""
    filter_sum: bool
    aligned: bool
    """Whether the rows of all arrays begin at multiples of 16 bytes."""
    tf32: bool
    """Whether torch would multiply float32 in TF32."""


@dataclass(frozen=True)
class Launch:
    """How a product is launched; made once for every `Kind`, as making it takes longer than the launch itself."""

    kernel: Any
    grid: tuple[int]
    described: list[Callable[[Tensor], Any] | None]
    """What makes a descriptor of x, weight, factor, basis, filter, add, more, out; None where a pointer is passed."""
    scalars: tuple[int, ...]
    options: dict[str, Any]


def settings(kind: Kind) -> dict[str, Any]:
    """Return the launch settings of a product: of large, middle and small tiles those that take the least time.

    That is the number of tiles that the busiest processor makes, times their area, over the rate of such tiles relative
    to large ones (RATE). Large tiles would leave processors idle where there are few rows, and compute what nobody
    needs where there are few columns. Rows that are not aligned are read number by number, which wants many registers,
    so they take small tiles.
    """
    like = torch.empty(0, dtype=kind.dtype, device=kind.device)
    large = launch.config("linear_activate", like)
    middle, small = (large | launch.config(f"linear_activate_{size}", like) for size in ("middle", "small"))
    if not kind.aligned:
        return small | {"TMA": False}

    def seconds(chosen: dict[str, Any]) -> float:
        tiles = triton.cdiv(kind.m, chosen["BLOCK_M"]) * triton.cdiv(kind.n, chosen["BLOCK_N"])
        rounds = triton.cdiv(tiles, launch.processors(kind.device))
        return rounds * chosen["BLOCK_M"] * chosen["BLOCK_N"] / chosen["RATE"]

    return min((large, middle, small), key=seconds)


def prepare(kind: Kind) -> Launch:
    """Return how a product is launched."""
    chosen, like = settings(kind), torch.empty(0, dtype=kind.dtype, device=kind.device)
    options = {name: value for name, value in chosen.items() if name not in NO_OPTIONS}
    block_m, block_n, block_k = (options[f"BLOCK_{letter}"] for letter in "MNK")
    tiles = triton.cdiv(kind.m, block_m) * triton.cdiv(kind.n, block_n)
    grid = (min(tiles, launch.processors(kind.device) * chosen["PROGRAMS"]),)
    described: list[Any] = [None] * 8
    if chosen["SPECIALIZED"] and chosen["TMA"] and not (kind.r or kind.rows or kind.wide):
        described[:2] = gemm_specialized.described([block_m, block_k]), gemm_specialized.described([block_n, block_k])
        options["STAGES"] = options.pop("num_stages")
        return Launch(specialized, grid, described, (kind.m, kind.n, kind.k), options)
    # numbers in the type of sums need twice the memory in the epilogue
    parts = 4 if kind.rows or kind.wide else 2
    options |= {"SUM": launch.accumulator(like), "PRECISION": precision(like), "FILTER_SUM": kind.filter_sum}
    options |= {"BLOCK_R": launch.power_of_2(kind.r, 16), "PARTS": parts}
    kernel = by_pointers
    if chosen["TMA"]:
        kernel, part, options["FLATTEN"] = by_descriptors, block_n // parts, chosen["FLATTEN"]
        tile, narrow = [block_m, part], ([block_m, options["BLOCK_R"]], [part, options["BLOCK_R"]])
        blocks = ([block_m, block_k], [block_n, block_k], tile, *narrow, tile, tile, tile)
        described = [functools.partial(TensorDescriptor.from_tensor, block_shape=block) for block in blocks]
    else:
        options["EVEN_K"] = kind.k % block_k == 0
    return Launch(kernel, grid, described, (kind.m, kind.n, kind.k, kind.r), options)


@functools.lru_cache(maxsize=4096)
def _prepared(_architecture: str, kind: Kind) -> Launch:
    return prepare(kind)


@launch.define(
    "linear_fused(Tensor x, Tensor weight, Tensor? factor, Tensor? basis, Tensor? filter, Tensor? add, Tensor? more, "
    "Tensor? source_rows, Tensor? source, Tensor? target_rows, Tensor? target, float alpha, float beta, float gamma, "
    "bool filter_sum) -> Tensor"
)
def linear_fused(
    x: Tensor,
    weight: Tensor,
    factor: Tensor | None,
    basis: Tensor | None,
    filter: Tensor | None,  # noqa: A002 - its name in the formula
    add: Tensor | None,
    more: Tensor | None,
    source_rows: Tensor | None,
    source: Tensor | None,
    target_rows: Tensor | None,
    target: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    filter_sum: bool,
) -> Tensor:
    """Return a product and all that follows it, see the top of this file; it has no derivative."""
    _check(x, weight, factor, add, more)
    _check_filter(x, weight, basis, filter)
    rows = (source_rows, source, target_rows, target)
    _check_atoms(x, weight, *rows)
    arrays, scales = [x, weight, factor, basis, filter, add, more], (float(alpha), float(beta), float(gamma))
    if not fuses(x):
        return _by_passes(arrays, rows, scales, filter_sum=filter_sum)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype if add is None else add.dtype, device=x.device)
    if out.numel():
        run([*arrays, out], rows, scales, filter_sum=filter_sum)
    return out


def _check(x: Tensor, weight: Tensor, factor: Tensor | None, add: Tensor | None, more: Tensor | None) -> None:
    launch.check_rows("linear_fused", "x", x, 2)
    launch.check_rows("linear_fused", "weight", weight, 2)
    (m, k), n, like = x.shape, weight.shape[0], (x.dtype,)
    or_sums = like if x.dtype in (torch.float32, torch.float64) else (x.dtype, torch.float32)
    given = {"factor": (factor, like), "add": (add, or_sums), "more": (more, or_sums)}
    whole = {name: (t, types, (m, n)) for name, (t, types) in given.items() if t is not None}
    expected = {"x": (x, launch.REAL, (m, k)), "weight": (weight, like, (n, k)), **whole}
    launch.check_arguments("linear_fused", x.device, **expected)


def _check_filter(x: Tensor, weight: Tensor, basis: Tensor | None, filter_weight: Tensor | None) -> None:
    if (basis is None) != (filter_weight is None):
        raise ValueError("linear_fused: filter must be given where basis is")
    if basis is None or filter_weight is None:
        return
    launch.check_rows("linear_fused", "basis", basis, 2)
    width = basis.shape[1]
    if not 0 < width <= launch.MOST_BASIS:
        raise ValueError(f"linear_fused: basis must have 1..{launch.MOST_BASIS} columns, got {width}")
    launch.check_arguments(
        "linear_fused",
        x.device,
        basis=(basis, (x.dtype,), (x.shape[0], width)),
        filter=(filter_weight, (x.dtype,), (weight.shape[0], width)),
    )


def _check_atoms(x: Tensor, weight: Tensor, *rows: Tensor | None) -> None:
    if all(t is None for t in rows):
        return
    if any(t is None for t in rows):
        raise ValueError("linear_fused: source_rows, source, target_rows and target must be given together")
    source_rows, source, target_rows, target = rows
    num_atoms = launch.check_rows("linear_fused", "source_rows", source_rows, 2)
    real, shape, ids = (launch.sums_dtype(x),), (num_atoms, weight.shape[0]), ((torch.int64,), (x.shape[0],))
    launch.check_arguments(
        "linear_fused",
        x.device,
        source_rows=(source_rows, real, shape),
        target_rows=(target_rows, real, shape),
        source=(source, *ids),
        target=(target, *ids),
    )
    for name, numbers in (("source", source), ("target", target)):
        launch.check_ids("linear_fused", name, numbers, num_atoms)


def _by_passes(
    arrays: list[Any], rows: tuple[Any, ...], scales: tuple[float, float, float], *, filter_sum: bool
) -> Tensor:
    """Return it by the vendor's product and passes after it, where those are faster; arguments as for `run`."""
    (x, weight, factor, basis, filter_weight, add, more), (source_rows, source, target_rows, target) = arrays, rows
    alpha, beta, gamma = scales
    z = torch.nn.functional.linear(x, weight)
    if source_rows is not None:
        z = (source_rows.index_select(0, source) + target_rows.index_select(0, target) + z).to(z.dtype)
    filters = None if basis is None else torch.nn.functional.linear(basis, filter_weight)
    if filters is not None and not filter_sum:
        factor = filters if factor is None else factor * filters
    z, factor = (t if t is None or add is None else t.to(add.dtype) for t in (z, factor))
    out = torch.ops.ejmp_triton.activate_(z, factor, add, alpha, beta)
    if more is not None:
        out.add_(more, alpha=gamma)
    return out.mul_(filters) if filter_sum else out


def run(
    arrays: list[Tensor | None],
    rows: tuple[Tensor | None, ...],
    scales: tuple[float, float, float],
    *,
    filter_sum: bool,
) -> None:
    """Launch one of the kernels.

    Args:
        arrays: x, weight, factor, basis, filter, add, more, out, of which the last is written.
        rows: source_rows, source, target_rows, target.
        scales: alpha, beta, gamma.
        filter_sum: whether the filter multiplies the sum.
    """
    arrays, rows = launch.packed(arrays), launch.packed(rows)
    x, _, _, basis, _, *wide, out = arrays
    kind = Kind(
        device=x.device,
        dtype=x.dtype,
        m=out.shape[0],
        n=out.shape[1],
        k=x.shape[1],
        r=0 if basis is None else basis.shape[1],
        rows=rows[0] is not None,
        wide=any(t is not None and t.dtype != x.dtype for t in (*wide, out)),
        filter_sum=filter_sum,
        aligned=all(map(_aligned, arrays)),
        tf32=precision(x) == "tf32",
    )
    how = prepare(kind) if launch.OVERRIDES else _prepared(launch.architecture(x.device), kind)
    given = [t if t is None or make is None else make(t) for t, make in zip(arrays, how.described, strict=True)]
    if how.kernel is specialized:
        _, _, factor, _, _, add, more, _ = given
        given = [*given[:2], factor, add, more, given[-1]]
    else:
        given += rows
    with launch.on_device(x):
        how.kernel[how.grid](*given, *how.scalars, *scales, **how.options)


def _aligned(x: Tensor | None) -> bool:
    return x is None or (x.numel() > 0 and x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0)
