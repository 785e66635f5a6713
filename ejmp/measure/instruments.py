"""Instruments: timing, matrix-product rates, memory in use, and where and on what a number was measured."""

import functools
import itertools
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ejmp.model.config import Precision
from ejmp.model.precision import LOW_PRECISION, check_precision, tf32_products
from ejmp_kernels import gemm


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds a call takes, with the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Return median, 95th percentile (nearest rank) and number of samples."""
    ordered = sorted(values)
    rank = math.ceil(0.95 * len(ordered)) - 1
    return {"median": statistics.median(ordered), "p95": ordered[rank], "samples": len(ordered)}


def precisions_of(device: torch.device) -> list[Precision]:
    """Return the precisions worth measuring on a device: all it has, but not the CPU's slow fp16."""
    found: list[Precision] = []
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        try:
            check_precision(precision, device)
        except ValueError:
            continue
        if precision != "fp16" or device.type == "cuda":
            found.append(precision)
    return found


class StoragePeak(TorchDispatchMode):
    """Follow the bytes of all tensors made inside the context; scratch memory inside an operation is not seen."""

    def __init__(self, known: Iterable[Any]) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.seen = {value.untyped_storage()._cdata for value in known if isinstance(value, Tensor)}  # noqa: SLF001

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note the storages it made."""
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.seen:  # noqa: SLF001
                    self.seen.add(storage._cdata)  # noqa: SLF001
                    self.held += storage.nbytes()
                    self.peak = max(self.peak, self.held)
                    weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())  # noqa: SLF001
        return out

    def _release(self, storage: int, size: int) -> None:
        self.seen.discard(storage)
        self.held -= size


def repeated_seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Return the seconds of each of several calls, after one that is not counted.

    On CUDA by events on a queue that stays full, so that what a launch or a wait costs on the host is not in them.
    """
    call()
    if device.type != "cuda":
        return [time_call(call, device) for _ in range(repeats)]
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize(device)
    return [1e-3 * before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def gemm_rates(
    rows: int,
    precisions: Sequence[Precision],
    device: torch.device,
    repeats: int | None = None,
    *,
    sizes: tuple[int, int] = (1024, 1024),
) -> dict[str, float]:
    """Measure the machine's matrix products with every provider at hand, in GFLOP/s.

    torch's float32 product goes to MKL, which is slow on AMD CPUs; the oneDNN in the same torch is often twice as fast.

    Args:
        rows: of the left factor.
        precisions: one product each.
        device: where.
        repeats: the median of how many counts; by default 3, on CUDA 20.
        sizes: (out, in), the shape of the weight; the model's edge layers have (1024, 1024).
    """
    rates = {}
    width_out, width_in = sizes
    for precision in precisions:
        dtype = LOW_PRECISION.get(precision, torch.float32)
        x = torch.randn(rows, width_in, device=device, dtype=dtype)
        w = torch.randn(width_out, width_in, device=device, dtype=dtype)
        products: dict[str, Callable[..., Tensor]] = {"torch": torch.nn.functional.linear}
        if device.type == "cpu" and precision == "fp32" and torch.backends.mkldnn.is_available():
            products["onednn"] = lambda x, w: gemm.PROVIDERS["onednn"](x, w.mT)
        for provider, product in products.items():
            with tf32_products() if precision == "tf32" else nullcontext():
                call = functools.partial(product, x, w)
                seconds = repeated_seconds(call, device, repeats or (20 if device.type == "cuda" else 3))
            rates[f"{precision} {provider}"] = 2e-9 * rows * width_out * width_in / statistics.median(seconds)
    return rates


def copy_rate(device: torch.device, size: int = 1 << 28, repeats: int = 5) -> float:
    """Measure how fast memory is copied, in GB/s read and written together."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = min(repeated_seconds(lambda: target.copy_(source), device, repeats))
    return 2e-9 * size / seconds
