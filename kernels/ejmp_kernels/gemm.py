"""Matrix products through the fastest provider at hand, chosen per machine, type, layout and size by measurement.

torch's own float32 product goes to MKL, which takes a slow path on AMD processors; the oneDNN inside the same torch
does the same product up to twice as fast, to the same rounding. Which one is faster is measured at the first product of
a kind and kept in a file, so that later runs choose alike. EJMP_GEMM=torch or EJMP_GEMM=onednn pins the provider, for
results that do not depend on a measurement.
"""

import functools
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ejmp_kernels.cache import cache_root

WORTH_MEASURING = 5e6
"""Multiply-adds from which on the choice matters; for smaller products torch's own is taken."""
_ROUNDS, _SECONDS = 5, 0.1
"""A measurement takes at least so many rounds and about so long, in seconds."""


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    a, b = _dense(a), _dense(b)
    if not a.is_contiguous() and hasattr(torch.ops.ejmp, "transposed"):
        a = torch.ops.ejmp.transposed(a.mT)  # oneDNN's would run on one thread
    return torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")  # noqa: SLF001 - what Inductor calls


def _dense(x: Tensor) -> Tensor:
    """Copy a matrix if it has gaps between its rows or columns, which make oneDNN a hundred times slower."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


PROVIDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch": torch.mm, "onednn": _onednn}
"""Ways to multiply two matrices, by the name that EJMP_GEMM gives them."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, [m, k] x [k, n] -> [m, n], by the provider that is fastest for products like it; no autograd.

    Raises:
        ValueError: if EJMP_GEMM names no provider.
    """
    return PROVIDERS[choose(a, b)](a, b)


def choose(a: Tensor, b: Tensor) -> str:
    """Return the name of the provider that `product` takes.

    Raises:
        ValueError: if EJMP_GEMM names no provider.
    """
    wanted = pinned()
    if "onednn" not in providers(a):
        return "torch"
    if wanted != "auto":
        return wanted
    m, k, n = (*a.shape, b.shape[1])
    if m * k * n < WORTH_MEASURING:
        return "torch"
    kind = (a.dtype, _layout(a), _layout(b), _bucket(m), _bucket(k), _bucket(n), torch.get_num_threads())
    if kind not in _chosen:
        key = " ".join(str(x).removeprefix("torch.") for x in kind[:-1])
        _chosen[kind] = _choices().get(key) or _measure(key, a, b)
    return _chosen[kind]


_chosen: dict[tuple, str] = {}
"""Providers that this process has chosen, by the kind of product."""


def pinned() -> str:
    """Return the provider that EJMP_GEMM asks for, or "auto".

    Raises:
        ValueError: if there is no such provider.
    """
    wanted = os.environ.get("EJMP_GEMM", "auto")
    if wanted not in ("auto", *PROVIDERS):
        raise ValueError(f"EJMP_GEMM: expected auto, {' or '.join(PROVIDERS)}, got {wanted!r}")
    return wanted


def providers(a: Tensor) -> tuple[str, ...]:
    """Return the names of the providers that multiply matrices of a's type on its device."""
    return _providers(a.device.type, a.dtype)


@functools.cache
def _providers(device: str, dtype: torch.dtype) -> tuple[str, ...]:
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return ("torch",)
    # oneDNN has bfloat16 products for processors with AVX-512 only
    known = dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001
    return tuple(PROVIDERS) if known else ("torch",)


def _layout(x: Tensor) -> str:
    return "n" if x.stride(1) == 1 else "t"


def _bucket(size: int) -> int:
    """Round to the nearest power of two: one measurement serves a range of sizes."""
    return 2 ** round(math.log2(size))


def cache_file() -> Path:
    """Return where choices are kept: one file per processor, number of threads and torch version."""
    name = f"{_processor()}-{torch.get_num_threads()}threads-torch{torch.__version__}"
    return cache_root() / "gemm" / "".join(c if c.isalnum() or c in "-._" else "_" for c in name).lower()


@functools.cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    found = [fields[key] for key in ("model name", "cpu family", "model", "stepping") if key in fields]
    return "-".join(found) or platform.processor() or platform.machine()


_known: dict[Path, dict[str, str]] = {}
"""Contents of the cache files that this process has read."""


def _choices() -> dict[str, str]:
    """Return the choices known for this machine; the file is read once, and a damaged one counts as empty."""
    path = cache_file()
    if path not in _known:
        try:
            found = json.loads(path.read_text())
            _known[path] = {key: name for key, name in found.items() if name in PROVIDERS}
        except (OSError, ValueError, AttributeError):
            _known[path] = {}
    return _known[path]


def _measure(key: str, a: Tensor, b: Tensor) -> str:
    """Time all providers by turns on the operands themselves and remember the fastest.

    The shortest time counts, because others on the machine only ever add; torch's own has to be beaten by 3%.
    """
    seconds: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    start = time.perf_counter()
    while len(seconds["torch"]) < _ROUNDS or (time.perf_counter() - start < _SECONDS and len(seconds["torch"]) < 100):
        for name, samples in seconds.items():
            begin = time.perf_counter()
            PROVIDERS[name](a, b)
            samples.append(time.perf_counter() - begin)
    shortest = {name: min(samples) for name, samples in seconds.items()}
    fastest = min(shortest, key=shortest.__getitem__)
    best = fastest if shortest[fastest] < 0.97 * shortest["torch"] else "torch"
    _choices()[key] = best
    _write(cache_file(), _choices())
    return best


def _write(path: Path, choices: dict[str, str]) -> None:
    """Replace the file as a whole; where it cannot be written, choices last as long as the process."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            json.dump(choices, file, indent=1, sort_keys=True)
        temporary.replace(path)
    except OSError:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
