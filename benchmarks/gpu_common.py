"""What every step of the GPU campaign shares: settings, timing by turns, ceilings, rows on disk, provenance."""

import copy
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ejmp
from ejmp.measure import bench, datasheets, workloads
from ejmp.measure.flops import GraphSizes, count_macs, graph_sizes
from ejmp.measure.instruments import copy_rate, gemm_rates, precisions_of, synchronize, time_call
from ejmp.model.backend import why_unavailable
from ejmp.provenance import provenance
from ejmp_kernels import availability, registry

FORMAT = 1
NAMED = ("fp32", "tf32", "fp16", "bf16")
TINY = ejmp.JMPConfig(
    num_tasks=1,
    direct_forces=False,
    emb_size_atom=16,
    emb_size_edge=16,
    emb_size_trip_in=16,
    emb_size_trip_out=16,
    emb_size_quad_in=16,
    emb_size_quad_out=16,
    emb_size_pair_in=16,
    emb_size_pair_out=16,
    emb_size_rbf=16,
    emb_size_cbf=4,
    emb_size_sbf=4,
    num_radial=16,
    num_spherical=3,
    num_before_skip=1,
    num_after_skip=0,
    num_concat=1,
    num_atom=1,
    num_output_after_atom=0,
    num_atom_emb_layers=0,
    num_global_out_layers=1,
)
"""Of the dry run: every kind of layer, nothing of its size."""
PEROXIDE = ((8, 8, 1, 1), ((0.0, 0.73, 0), (0, -0.73, 0), (0.8, 0.9, 0.5), (-0.75, -0.95, 0.5)))
"""Atomic numbers and positions in A: the smallest molecule with quadruplets."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how much."""

    device: torch.device
    dry: bool
    out: Path
    seconds: float
    """A step starts no more rows after this long."""

    @property
    def config(self) -> ejmp.JMPConfig:
        return TINY if self.dry else ejmp.jmp_l(scalar=True)

    @property
    def model_name(self) -> str:
        return "tiny model of the dry run" if self.dry else "JMP-L scalar"

    @property
    def precisions(self) -> list[str]:
        """Those of the device, in the table's order; a dry run takes one, because the interpreter has no bf16."""
        found = precisions_of(self.device)
        return ["fp32"] if self.dry else [p for p in NAMED if p in found]

    def workload(self, structures: int) -> workloads.Workload:
        """At most four different structures, repeated, so that sizes are exact multiples."""
        if self.dry:
            found = [ejmp.Structure(numbers=PEROXIDE[0], positions=PEROXIDE[1])] * structures
            return workloads.Workload(name="peroxide", structures=found, cutoff=6.0, max_neighbors=[8] * structures)
        made = workloads.rocksalt(min(structures, 4))
        found = list(itertools.islice(itertools.cycle(made.structures), structures))
        return dataclasses.replace(made, structures=found, max_neighbors=[30] * structures)

    def graph(self, structures: int, **options: Any) -> ejmp.AtomGraph:
        return bench.workload_graph(self.workload(structures), device=self.device, **options)

    def sizes(self, structures: int) -> GraphSizes:
        """Count part of the batch and multiply, because counting lists all quadruplets."""
        part = min(structures, 4)
        if structures % part:
            return graph_sizes(self.graph(structures))
        found = dataclasses.asdict(graph_sizes(self.graph(part)))
        return GraphSizes(**{name: value * structures // part for name, value in found.items()})


LONG = ("log_tail", "text", "parameters")
"""Fields of rows that are not printed."""


class Skip(Exception):  # noqa: N818 - not an error
    """What is not measured, and why."""


class Step:
    """The results of one step, written after every row: what was measured survives whatever comes after.

    Args:
        name: of the step and its file.
        setting: where and how much.
        **about: what holds for all rows.
    """

    def __init__(self, name: str, setting: Setting, **about: Any) -> None:
        self.setting = setting
        self.path = setting.out / f"{name}.json"
        self.start = time.perf_counter()
        self.lost = ""
        made = describe(setting.device)
        self.result: dict[str, Any] = {"format": FORMAT, "step": name, "dry": setting.dry, "provenance": made, **about}
        self.result["rows"] = []
        self.write()

    def left(self) -> float:
        return self.setting.seconds - (time.perf_counter() - self.start)

    def check(self) -> None:
        """Do nothing if there is time for one more row.

        Raises:
            Skip: if there is not, or the GPU is lost.
        """
        if self.lost or self.left() < 0:
            raise Skip(self.lost or f"the step's {self.setting.seconds:.0f} s were used up")

    def write(self) -> None:
        self.result["seconds"] = time.perf_counter() - self.start
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".part")
        new.write_text(json.dumps(self.result, indent=1) + "\n")
        new.replace(self.path)

    def add(self, row: dict[str, Any]) -> None:
        self.result["rows"].append(row)
        self.write()
        state = row.get("skipped") or row.get("failed")
        named = ", ".join(str(v)[:100] for k, v in row.items() if isinstance(v, str | int) and k not in LONG)
        print(f"  {named}" if state else f"  {named}: {row.get('ms', 0):.4g} ms", flush=True)

    @contextmanager
    def row(self, **about: Any) -> Iterator[dict[str, Any]]:
        """Add the row that the body fills, or the reason why it could not."""
        found = dict(about)
        with reasons(found):
            yield found
        if any(word in found.get("failed", "") for word in ("CUDA error", "illegal memory access")):
            self.lost = "an earlier row broke the CUDA context"
        self.add(found)
        gc.collect()
        if self.setting.device.type == "cuda" and not self.lost:
            torch.cuda.empty_cache()


@contextmanager
def reasons(row: dict[str, Any]) -> Iterator[None]:
    """Note in a row why it could not be measured: one row must not end the others."""
    try:
        yield
    except Skip as reason:
        row["skipped"] = str(reason)
    except torch.OutOfMemoryError:
        row["skipped"] = "out of memory"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is in the row
        row["failed"] = f"{type(error).__name__}: {str(error).strip()[:300]}"


def gate(row: dict[str, Any], tolerance: float) -> None:
    """Do nothing if a row's error is within a tolerance.

    Raises:
        RuntimeError: if it is not, or not a number; nothing is timed then.
    """
    if not row["error"] <= tolerance:
        raise RuntimeError(f"not timed: error {row['error']:.1e}")


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


def by_turns(
    calls: dict[str, Callable[[], Any]],
    setting: Setting,
    *,
    seconds: float = 2.0,
    most: int = 50,
    flush: bool = False,
    first: dict[str, float] | None = None,
) -> dict[str, list[float]]:
    """Time calls by turns after warming up, so that all see the same minutes of the machine; return milliseconds.

    Args:
        calls: by name.
        setting: on CUDA, times are of events.
        seconds: go on this long, for at least 3 rounds.
        most: rounds.
        flush: empty the L2 cache before each call.
        first: milliseconds that the calls took before, all that a dry run wants.
    """
    device, found = setting.device, {name: [] for name in calls}
    if setting.dry:
        return {name: [(first or {}).get(name) or 1e3 * time_call(call, device)] for name, call in calls.items()}
    for call in (*calls.values(), *calls.values()):
        call()
    scratch = None
    if flush and device.type == "cuda":
        scratch = torch.empty(1 << 29, dtype=torch.int8, device=device)  # long enough to launch what comes after it
    synchronize(device)
    start = time.perf_counter()
    while len(found[next(iter(calls))]) < 3 or (
        len(found[next(iter(calls))]) < most and time.perf_counter() - start < seconds
    ):
        for name, call in calls.items():
            if device.type != "cuda":
                found[name].append(1e3 * time_call(call, device))
                continue
            if scratch is not None:
                scratch.zero_()
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            call()
            after.record()
            after.synchronize()
            found[name].append(before.elapsed_time(after))
    return found


def by_turns_or_why(
    calls: dict[str, Callable[[], Any]], setting: Setting, rows: list[dict[str, Any]], **options: Any
) -> dict[str, list[float]]:
    """Time calls by turns as `by_turns` does; if that fails, note why in the rows that have no reason yet."""
    times: dict[str, list[float]] = {}
    note: dict[str, Any] = {}
    with reasons(note):
        times = by_turns(calls, setting, **options) if calls else {}
    for row in rows:
        if "skipped" not in row and "failed" not in row:
            row.update(note)
    return times


def error_of(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest difference over the largest value."""
    if exact.numel() == 0:
        return 0.0
    exact = exact.double()
    return ((value.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300)).item()


def ceilings(setting: Setting, rows: int, precisions: list[str] | None = None) -> dict[str, Any]:
    """Measure matrix products of (rows, 1024, 1024), or the dry run's width, and a copy; the shares' denominators."""
    width = setting.config.emb_size_edge
    rates = gemm_rates(rows, precisions or setting.precisions, setting.device, sizes=(width, width))
    best: dict[str, float] = {}
    for name, rate in rates.items():
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


def rates(tflop: float, milliseconds: float, precision: str, limits: dict[str, Any]) -> dict[str, Any]:
    """Return a row's rate, and its shares of the measured and the datasheet's peak."""
    tflops = tflop / (1e-3 * milliseconds)
    peak = limits["datasheet_tflops"][precision]
    return {
        "tflops": tflops,
        "gemm_share": tflops / limits["gemm_tflops"][precision],
        "mfu": None if peak is None else tflops / peak,
    }


def forward_tflop(config: ejmp.JMPConfig, sizes: GraphSizes) -> float:
    """Return the model's own work in a forward pass, two operations per multiply-add."""
    return 2e-12 * sum(count_macs(config, sizes).values())


def ratio(over: list[float], times: list[float]) -> float:
    """Return the median of the rounds' ratios, which the machine's drift does not touch."""
    return statistics.median(o / t for o, t in zip(over, times, strict=True))


def median(values: list[float]) -> float:
    return statistics.median(values)


def make_model(setting: Setting, blocks: int = 6, *, forces: bool = False) -> ejmp.JMP:
    """Return a model with random weights, the same for every call."""
    torch.manual_seed(0)
    model = ejmp.JMP(dataclasses.replace(setting.config, blocks=blocks, direct_forces=forces))
    return model.to(setting.device).eval()


def on_backend(model: ejmp.JMP, backend: str, precision: str = "fp32") -> ejmp.JMP:
    """Return a copy of a model that shares its parameters."""
    shared = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    shared.requested_backend, shared.precision = backend, precision
    return shared


def describe(device: torch.device) -> dict[str, Any]:
    """Return provenance with what a GPU's number needs besides: driver, limits, clocks, what the backends are."""
    triton = importlib.util.find_spec("triton") is not None
    found = provenance(device) | {
        "triton": (_version("triton") or _version("pytorch-triton")) if triton else None,
        "triton_interpreter": os.environ.get("TRITON_INTERPRET") == "1",
        "native": availability.why_unavailable(device.type) or "there",
        "nvidia_smi": nvidia_smi(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"sm": properties.multi_processor_count, "memory_gib": properties.total_memory / 2**30}
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


FIELDS = (
    "driver_version", "power.limit", "power.draw", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu",
    "ecc.mode.current", "persistence_mode",
)  # fmt: skip


def nvidia_smi(device: torch.device) -> dict[str, str] | str:
    """Return what nvidia-smi says of the card, or why it says nothing; nothing is changed."""
    if device.type != "cuda":
        return "no GPU"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "nvidia-smi is not there"
    command = [tool, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader", f"--id={device.index or 0}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode or len(values) != len(FIELDS):
        return f"nvidia-smi failed: {(done.stderr or done.stdout).strip()[:200]}"
    return dict(zip(FIELDS, values, strict=True))


def folder_name(device: torch.device) -> str:
    """Return the folder of a GPU's results, such as nvidia-h200."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "dry"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
