"""A matrix product and all that follows it in a dense layer, written once; its kernels are in `gemm_kernels`.

out = alpha silu(z) factor (basis filter^T) + beta add + gamma more
z[i, j] = sum_k x[i, k] weight[j, k] + source_rows[source[i], j] + target_rows[target[i], j]

x [m, k], weight [n, k], basis [m, r], filter [n, r], the other arrays [m, n], all of one type and row-major; rows of
atoms [N, n] in the type of sums; each of them may be absent, and the filter may multiply the whole sum instead. Sums
and epilogue are in float32 (float64 for float64), rounded once. 2 m n (k + r) FLOP; reads what is there once and writes
out, where a product and passes after it move 2 m n numbers more for the product and as many for the filter, 3 m n for
`more` and 4 m n for the rows.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ejmp_kernels.triton_kernels import launch
from ejmp_kernels.triton_kernels.gemm_kernels import by_descriptors, by_pointers


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """What follows a product; see the top of this file."""

    factor: Tensor | None = None
    basis: Tensor | None = None
    filter: Tensor | None = None
    add: Tensor | None = None
    more: Tensor | None = None
    source_rows: Tensor | None = None
    source: Tensor | None = None
    target_rows: Tensor | None = None
    target: Tensor | None = None
    alpha: float
    beta: float
    gamma: float = 1.0
    filter_sum: bool = False
    """Whether the filter multiplies the sum, and not the activation alone."""

    @property
    def arrays(self) -> tuple[Tensor | None, ...]:
        """What tiles of the result are read of."""
        return self.factor, self.basis, self.filter, self.add, self.more

    @property
    def rows(self) -> tuple[Tensor | None, ...]:
        """The rows of atoms, and which atoms."""
        return self.source_rows, self.source, self.target_rows, self.target


NO_OPTIONS = ("fused", "TMA", "FLATTEN", "PROGRAMS", "RATE")
"""Names of settings that are not handed to both kernels as they are."""
MOST_BASIS = 128
"""The largest number of columns of a basis, whose product is one step."""


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


def settings(x: Tensor, n: int, *, aligned: bool = True) -> dict[str, Any]:
    """Return the launch settings of a product: of large, middle and small tiles those that take the least time.

    That is the number of tiles that the busiest processor makes, times their area, over the rate of such tiles relative
    to large ones (RATE). Large tiles would leave processors idle where there are few rows, and compute what nobody
    needs where there are few columns. Rows that are not aligned are read number by number, which wants many registers,
    so they take small tiles.

    Args:
        x: [m, k].
        n: number of rows of the weight.
        aligned: whether all arrays are aligned.
    """
    if launch.OVERRIDES:
        return _choose(x, n, aligned=aligned)
    return _chosen(launch.architecture(x.device), x.device, x.dtype, x.shape[0], n, aligned)


@functools.lru_cache(maxsize=4096)
def _chosen(
    _architecture: str, device: torch.device, dtype: torch.dtype, m: int, n: int, aligned: bool
) -> dict[str, Any]:
    return _choose(torch.empty(1, dtype=dtype, device=device).expand(m, 1), n, aligned=aligned)


def _choose(x: Tensor, n: int, *, aligned: bool) -> dict[str, Any]:
    large = launch.config("linear_activate", x)
    middle, small = (large | launch.config(f"linear_activate_{size}", x) for size in ("middle", "small"))
    if not aligned:
        return small | {"TMA": False}

    def seconds(chosen: dict[str, Any]) -> float:
        tiles = triton.cdiv(x.shape[0], chosen["BLOCK_M"]) * triton.cdiv(n, chosen["BLOCK_N"])
        rounds = triton.cdiv(tiles, launch.processors(x.device))
        return rounds * chosen["BLOCK_M"] * chosen["BLOCK_N"] / chosen["RATE"]

    return min((large, middle, small), key=seconds)


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
    epilogue = Epilogue(
        factor=factor, basis=basis, filter=filter, add=add, more=more, source_rows=source_rows, source=source,
        target_rows=target_rows, target=target, alpha=alpha, beta=beta, gamma=gamma, filter_sum=filter_sum,
    )  # fmt: skip
    _check(x, weight, factor=factor, add=add, more=more)
    _check_filter(x, weight, basis, filter)
    _check_atoms(x, weight, *epilogue.rows)
    return _product(x, weight, epilogue)


def _check(x: Tensor, weight: Tensor, **whole: Tensor | None) -> None:
    launch.check_rows("linear_fused", "x", x, 2)
    launch.check_rows("linear_fused", "weight", weight, 2)
    (m, k), n, like = x.shape, weight.shape[0], (x.dtype,)
    given = {name: (t, like, (m, n)) for name, t in whole.items() if t is not None}
    expected = {"x": (x, launch.REAL, (m, k)), "weight": (weight, like, (n, k)), **given}
    launch.check_arguments("linear_fused", x.device, **expected)


def _check_filter(x: Tensor, weight: Tensor, basis: Tensor | None, filter_weight: Tensor | None) -> None:
    if (basis is None) != (filter_weight is None):
        raise ValueError("linear_fused: filter must be given where basis is")
    if basis is None or filter_weight is None:
        return
    launch.check_rows("linear_fused", "basis", basis, 2)
    width = basis.shape[1]
    if not 0 < width <= MOST_BASIS:
        raise ValueError(f"linear_fused: basis must have 1..{MOST_BASIS} columns, got {width}")
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


def _product(x: Tensor, weight: Tensor, epilogue: Epilogue) -> Tensor:
    """Return the product and its epilogue, by a kernel or, where that is faster, by the vendor's product and passes."""
    if not fuses(x):
        return _by_passes(x, weight, epilogue)
    out = x.new_empty(x.shape[0], weight.shape[0])
    if out.numel():
        packed = {name: value.contiguous() for name, value in vars(epilogue).items() if isinstance(value, Tensor)}
        epilogue, x, weight = replace(epilogue, **packed), x.contiguous(), weight.contiguous()
        _run(x, weight, epilogue, out, settings(x, len(weight), aligned=aligned(x, weight, epilogue, out)))
    return out


def _by_passes(x: Tensor, weight: Tensor, epilogue: Epilogue) -> Tensor:
    z, product = torch.nn.functional.linear(x, weight), epilogue.factor
    if epilogue.source_rows is not None:
        rows = epilogue.source_rows.index_select(0, epilogue.source)
        z = (rows + epilogue.target_rows.index_select(0, epilogue.target) + z).to(x.dtype)
    if epilogue.basis is not None:
        filters = torch.nn.functional.linear(epilogue.basis, epilogue.filter)
        if not epilogue.filter_sum:
            product = filters if product is None else product * filters
    out = torch.ops.ejmp_triton.activate_(z, product, epilogue.add, epilogue.alpha, epilogue.beta)
    if epilogue.more is not None:
        out.add_(epilogue.more, alpha=epilogue.gamma)
    return out.mul_(filters) if epilogue.filter_sum else out


def aligned(x: Tensor, weight: Tensor, epilogue: Epilogue, out: Tensor) -> bool:
    """Return whether no array is empty and the rows of all begin at multiples of 16 bytes."""
    return all(map(_aligned, (x, weight, *epilogue.arrays, out)))


def _aligned(x: Tensor | None) -> bool:
    return x is None or (x.numel() > 0 and x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0)


def _run(x: Tensor, weight: Tensor, epilogue: Epilogue, out: Tensor, chosen: dict[str, Any]) -> None:
    """Launch one of the kernels on contiguous arrays.

    Args:
        x: [m, k].
        weight: [n, k].
        epilogue: what follows the product.
        out: [m, n], written.
        chosen: block sizes and options of the launch; also PROGRAMS for each processor, and TMA where there is one.
    """
    (m, n), k = out.shape, x.shape[1]
    width = 1 if epilogue.basis is None else epilogue.basis.shape[1]
    options = {name: value for name, value in chosen.items() if name not in NO_OPTIONS}
    options |= {"SUM": launch.accumulator(x), "PRECISION": precision(x), "FILTER_SUM": epilogue.filter_sum}
    options["BLOCK_R"] = launch.power_of_2(width, 16)
    options["PARTS"] = 2 if epilogue.source is None else 4  # rows of atoms are in the type of sums
    block_m, block_n, block_k, block_r = (options[f"BLOCK_{letter}"] for letter in "MNKR")
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    grid = (min(tiles, launch.processors(x.device) * chosen["PROGRAMS"]),)
    arrays: Any = (x, weight, *epilogue.arrays, out)
    scalars = (m, n, k, width, float(epilogue.alpha), float(epilogue.beta), float(epilogue.gamma))
    with launch.on_device(x):
        if chosen["TMA"]:
            part = block_n // options["PARTS"]
            tile = (block_m, part)
            blocks = (
                (block_m, block_k),
                (block_n, block_k),
                tile,
                (block_m, block_r),
                (part, block_r),
                tile,
                tile,
                tile,
            )
            arrays = (
                t if t is None else TensorDescriptor.from_tensor(t, list(block))
                for t, block in zip(arrays, blocks, strict=True)
            )
            by_descriptors[grid](*arrays, *epilogue.rows, *scalars, FLATTEN=chosen["FLATTEN"], **options)
        else:
            by_pointers[grid](*arrays, *epilogue.rows, *scalars, EVEN_K=k % block_k == 0, **options)
