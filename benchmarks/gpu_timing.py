"""Timing in the GPU campaign: which backends there are, calls by turns, and shares of what the machine can do."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from gpu_setting import Setting
from gpu_step import reasons

import ejmp
from ejmp.measure import datasheets
from ejmp.measure.flops import GraphSizes, count_macs
from ejmp.measure.memory import peak_memory
from ejmp.measure.rates import copy_rate, gemm_rates
from ejmp.measure.timing import Rounds, by_turns, time_call
from ejmp.model.backend import why_unavailable
from ejmp_kernels import registry

Calls = dict[str, Callable[[], Any]]


@functools.cache
def backends(setting: Setting) -> dict[str, str | None]:
    """Return why each backend cannot run on the device, or None; the ops of those that can are loaded."""
    found = {name: why_unavailable(name, setting.device.type) for name in ("native", "triton", "reference")}
    for name in ("native", "triton"):
        if found[name] is None:
            try:
                registry.load_backend(name)
            except Exception as error:  # noqa: BLE001 - whatever a backend does, the others are measured
                found[name] = f"does not load: {type(error).__name__}: {error}"
    return found


def fastest(setting: Setting) -> str:
    """Return the backend that "auto" takes on the device, or in a dry run the one that runs quickly."""
    there = backends(setting)
    order = ("native", "reference") if setting.dry else ("triton", "native", "reference")
    return next(name for name in order if there[name] is None)


def milliseconds(
    calls: Calls, setting: Setting, *, seconds: float, flush: bool = False, first: dict[str, float] | None = None
) -> dict[str, list[float]]:
    """Time calls by turns and return the milliseconds of each, one per round.

    Args:
        calls: what to time, by name.
        setting: where; a dry run times each call once.
        seconds: how long to go on, for at least 3 rounds.
        flush: whether to empty the L2 cache before each call.
        first: milliseconds that the calls took when they were checked, which is all that a dry run wants.
    """
    if setting.dry:
        found = {n: [(first or {}).get(n) or 1e3 * time_call(call, setting.device)] for n, call in calls.items()}
    else:
        times = by_turns(calls, setting.device, Rounds(seconds=seconds, warm_ups=2), flush=flush)
        found = {name: [1e3 * s for s in samples] for name, samples in times.items()}
    return found


def milliseconds_or_why(
    calls: Calls, setting: Setting, rows: list[dict[str, Any]], **options: Any
) -> dict[str, list[float]]:
    """Time calls as `milliseconds` does; if that fails, note why in the rows that have no reason yet."""
    times: dict[str, list[float]] = {}
    note: dict[str, Any] = {}
    with reasons(note):
        times = milliseconds(calls, setting, **options) if calls else {}
    for row in rows:
        if "skipped" not in row and "failed" not in row:
            row.update(note)
    return times


def peak_mib(setting: Setting, call: Callable[[], Any]) -> float | None:
    """Return the most memory, in MiB, that a call holds beyond what is there before it; None on a CPU."""
    return None if setting.device.type != "cuda" else peak_memory(call, setting.device, ()) / 2**20


def error_of(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest difference of two tensors over the largest value of the exact one."""
    if exact.numel() == 0:
        return 0.0
    exact = exact.double()
    return ((value.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300)).item()


def ceilings(setting: Setting, rows: int, precisions: list[str] | None = None) -> dict[str, Any]:
    """Measure what the shares in rows are of: matrix products of (rows, 1024, 1024) in TFLOP/s, a copy in GB/s."""
    width = setting.config.emb_size_edge
    best: dict[str, float] = {}
    for name, rate in gemm_rates(rows, precisions or setting.precisions, setting.device, sizes=(width, width)).items():
        precision = name.split()[0]
        best[precision] = max(best.get(precision, 0.0), 1e-3 * rate)
    size = 1 << 22 if setting.dry else 1 << 31 if setting.device.type == "cuda" else 1 << 28
    return {
        "gemm_shape": [rows, width, width],
        "gemm_tflops": best,
        "copy_gbytes_per_s": copy_rate(setting.device, size),
        "datasheet_tflops": {p: datasheets.peak_tflops(setting.device, p) for p in best},
        "datasheet_gbytes_per_s": None if (card := datasheets.card_of(setting.device)) is None else card.gbytes_per_s,
        "card": card.name if card else "unknown",
    }


def rate_and_shares(tflop: float, ms: float, precision: str, limits: dict[str, Any]) -> dict[str, Any]:
    """Return the rate of some work in TFLOP/s, and its shares of the measured and of the datasheet's peak."""
    tflops = tflop / (1e-3 * ms)
    peak = limits["datasheet_tflops"][precision]
    return {
        "tflops": tflops,
        "gemm_share": tflops / limits["gemm_tflops"][precision],
        "mfu": None if peak is None else tflops / peak,
    }


def forward_tflop(config: ejmp.JMPConfig, sizes: GraphSizes) -> float:
    """Return the model's own work in a forward pass, in 10^12 operations, two per multiply-add."""
    return 2e-12 * sum(count_macs(config, sizes).values())
