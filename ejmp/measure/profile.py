"""Where the work and the time of a forward pass go: by module, by op, and against what the machine could do.

Two counts of work stand side by side. "model" is what the model defines (`ejmp.measure.flops`), the same for every
backend; rates and utilisation are of this one. "run" is what the products and many-body sums that were run count
themselves (torch.utils.flop_counter; ejmp's ops have formulas), which a backend can make less or more.
"""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ejmp.graph.graph import AtomGraph
from ejmp.measure import datasheets
from ejmp.measure.bench import FLOP_CONVENTION, make_models, model_name, random_model, workload_graph
from ejmp.measure.flops import GraphSizes, count_macs, graph_sizes
from ejmp.measure.rates import gemm_rates
from ejmp.measure.timing import repeated_seconds, synchronize
from ejmp.measure.trace import write_trace
from ejmp.measure.workloads import Workload
from ejmp.model.backend import Backend
from ejmp.model.config import JMPConfig, Precision
from ejmp.model.jmp import JMP
from ejmp.model.regions import observed_by
from ejmp.provenance import provenance

PARTS = (
    "edge_to_edge",
    "quadruplets",
    "atom_to_edge",
    "edge_to_atom",
    "atom_pairs",
    "atom_updates",
    "edge_updates",
)
"""Parts of an interaction block: the regions inside it (`ejmp.model.regions`), and the rest, which updates edges."""
OTHER = "other"
"""What runs between the parts: types changed, tensors joined."""


@dataclass(frozen=True, kw_only=True)
class ProfileRequest:
    """A request to profile one workload through one model.

    Raises:
        ValueError: if blocks or rounds is not positive.
    """

    workload: Workload
    """Batch that the model runs on."""
    blocks: int = 4
    """Number of blocks."""
    precision: Precision = "fp32"
    """Precision of the linear maps."""
    device: str = "cpu"
    """Device as torch names it."""
    backend: Backend = "auto"
    """Backend that is profiled."""
    small: bool = False
    """Whether to use JMP-S instead of JMP-L."""
    model: JMP | None = None
    """Model to prune and profile; None: JMP-L or JMP-S with random weights, scalar."""
    rounds: int = 3
    """Number of passes whose median counts."""
    fvcore: bool = True
    """Whether to make fvcore's table too, on the reference backend in fp32."""
    trace: Path | None = None
    """File for a Chrome trace of some passes; None: there is none."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, value in (("blocks", self.blocks), ("rounds", self.rounds)):
            if value < 1:
                raise ValueError(f"--{name}: expected 1 or more, got {value}")


def run(request: ProfileRequest) -> dict[str, Any]:
    """Profile a model; return everything found, ready for JSON.

    Raises:
        ModuleNotFoundError: if fvcore's table is wanted and fvcore is not installed.
        ValueError: if the workload has no edges.
    """
    if request.fvcore:
        need_fvcore()
    device, workload = torch.device(request.device), request.workload
    graph = workload_graph(workload, device=device)
    if graph.main.num_edges == 0:
        raise ValueError(f"{workload.name}: no two atoms are within {workload.cutoff} A: nothing to profile")
    full = request.model or random_model(request.blocks, small=request.small)
    model = make_models([request.blocks], full)[request.blocks]
    model = model.on(backend=request.backend, precision=request.precision).to(device)
    name = f"{model_name(request.model, small=request.small)}, {request.blocks} blocks"
    head = {"model": name, "workload": workload.name, "provenance": provenance(device)}
    found = profile_model(model, graph, rounds=request.rounds)
    if request.trace is not None:
        write_trace(model, graph, request.trace)
    return head | found | {"fvcore": fvcore_table(model, graph) if request.fvcore else None}


@torch.no_grad()
def profile_model(model: JMP, graph: AtomGraph, *, rounds: int = 3) -> dict[str, Any]:
    """Profile a model's forward pass at its precision, on its backend and device.

    Args:
        model: model to profile.
        graph: batch with edges.
        rounds: number of passes whose median counts.

    Returns:
        "modules" and "ops" (lists of rows), "totals", and what was measured on what; `profile_report.text` shows it.
    """
    device, sizes = graph.device, graph_sizes(graph)
    call = functools.partial(model, graph)
    rates = gemm_rates(graph.main.num_edges, [model.precision], device)
    seconds = statistics.median(repeated_seconds(call, device, rounds))
    with FlopCounterMode(display=False) as counter:
        work = by_part(model, graph, counter.get_total_flops)
    executed = counter.get_total_flops()
    times = [by_part(model, graph, Clock(device)) for _ in range(rounds)]
    macs = analytic(model.config, sizes)
    parts = dict.fromkeys((*macs, *work, *itertools.chain(*times)))
    took = {part: statistics.median(t.get(part, 0.0) for t in times) for part in parts}
    total, rows = sum(took.values()), []
    for part in parts:
        gmac = 1e-9 * macs.get(part, 0)
        row = {"module": part, "gmac": gmac, "gflop": 2 * gmac, "run_gflop": 1e-9 * work.get(part, 0)}
        rows.append(row | {"ms": 1e3 * took[part], "share": took[part] / total})
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "backend": model.backend,
        "precision": model.precision,
        "sizes": dataclasses.asdict(sizes),
        "convention": FLOP_CONVENTION,
        "modules": rows,
        "ops": by_op(model, graph, counter.get_flop_counts()["Global"]),
        "totals": totals(sum(macs.values()), executed, seconds, max(rates.values()), device, model.precision),
    }


def totals(
    macs: int, executed: int, seconds: float, gemm_gflops: float, device: torch.device, precision: str
) -> dict[str, Any]:
    """Return the work of a pass in both conventions, and its rate beside the datasheet's and the measured one."""
    card, peak = datasheets.card_of(device), datasheets.peak_tflops(device, precision)
    tflops = 2e-12 * macs / seconds
    return {
        "gmac": 1e-9 * macs,
        "gflop": 2e-9 * macs,
        "run_gflop": 1e-9 * executed,
        "ms": 1e3 * seconds,
        "tflops": tflops,
        "gemm_tflops": 1e-3 * gemm_gflops,
        "gemm_share": 1e3 * tflops / gemm_gflops,
        "card": card.name if card else "unknown",
        "peak_tflops": peak,
        "peak_source": card.source if card else None,
        "mfu": None if peak is None else tflops / peak,
    }


def analytic(config: JMPConfig, sizes: GraphSizes) -> dict[str, int]:
    """Return the multiply-adds of one forward pass, by module; they add up to `count_macs`."""
    parts = count_macs(config, sizes)
    found = {name: parts[name] for name in ("bases", "angles", "edge_embedding")}
    found["output block 0"] = parts["output_blocks"] // (config.blocks + 1)
    for i in range(config.blocks):
        found |= {f"block {i} {name}": parts[name] // config.blocks for name in PARTS}
        found[f"output block {i + 1}"] = parts["output_blocks"] // (config.blocks + 1)
    return found | {name: parts[name] for name in ("final_mlp", "heads")}


class Clock:
    """A meter of time in seconds; on CUDA it gives events, which are read after the pass."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> Any:
        """Return a point in time."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Marks:
    """Observes the regions of a forward pass: reads a meter at each passage from one part of the model to another."""

    def __init__(self, meter: Callable[[], Any]) -> None:
        self.meter = meter
        self.inside: list[str] = []
        self.marks = [(meter(), OTHER)]

    def enter(self, name: str) -> None:
        """Note that a region begins."""
        self.inside.append(name)
        self.marks.append((self.meter(), self._part()))

    def leave(self) -> None:
        """Note that the region that began last ends."""
        self.inside.pop()
        self.marks.append((self.meter(), self._part()))

    def _part(self) -> str:
        if len(self.inside) == 1 and self.inside[0].startswith("block "):
            return f"{self.inside[0]} edge_updates"
        return " ".join(self.inside) or OTHER


def by_part(model: JMP, graph: AtomGraph, meter: Callable[[], Any]) -> dict[str, Any]:
    """Run a forward pass; return by how much a meter, a `Clock` or a count, advanced in each part of the model."""
    synchronize(graph.device)
    marks = Marks(meter)
    with observed_by(marks):
        model.forward(graph)
    marks.marks.append((meter(), OTHER))
    synchronize(graph.device)
    advanced: dict[str, Any] = {}
    for (start, part), (end, _) in itertools.pairwise(marks.marks):
        step = 1e-3 * start.elapsed_time(end) if isinstance(start, torch.cuda.Event) else end - start
        advanced[part] = advanced.get(part, 0) + step
    return advanced


def by_op(model: JMP, graph: AtomGraph, flops: dict[Any, int]) -> list[dict[str, Any]]:
    """Run a forward pass under torch's profiler; return calls, work and time of each op, the longest first.

    The time of an op of ejmp's includes that of the ops it calls.

    Args:
        model: model to profile.
        graph: batch to run it on.
        flops: operations of each op, from a `FlopCounterMode`.
    """
    cuda = graph.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        model(graph)
        synchronize(graph.device)
    work = {str(op).replace(".", "::"): count for op, count in flops.items()}
    found: dict[str, dict[str, Any]] = {}
    on_device = 0.0
    for event in profiler.events() or ():
        if event.device_type.name != "CPU":
            on_device += 1e-3 * event.self_device_time_total
            continue
        op = _own_op(event)
        if "::" in op.name:
            row = found.setdefault(op.name, {"op": op.name, "calls": 0, "ms": 0.0})
            row["calls"] += op is event
            row["ms"] += 1e-3 * (event.self_device_time_total if cuda else event.self_cpu_time_total)
    for op in work:
        found.setdefault(op, {"op": op, "calls": 0, "ms": 0.0})
    missing = on_device - sum(row["ms"] for row in found.values())
    if cuda and missing > 0:
        found["rest"] = {"op": "kernels of no op", "calls": 0, "ms": missing}
    total = sum(row["ms"] for row in found.values())
    rows = [row | {"gflop": 1e-9 * work.get(op, 0), "share": row["ms"] / total} for op, row in found.items()]
    rows = [row for row in rows if row["ms"] > 0 or row["gflop"] > 0]
    return sorted(rows, key=lambda row: -row["ms"])


def _own_op(event: Any) -> Any:
    """Return the outermost op of ejmp's that an op was called from, or the op itself."""
    outermost, parent = event, event.cpu_parent
    while parent is not None:
        if parent.name.startswith(("ejmp::", "ejmp_triton::")):
            outermost = parent
        parent = parent.cpu_parent
    return outermost


class ByNumbers(nn.Module):
    """A model as a function of one tensor, which is what fvcore traces."""

    def __init__(self, model: JMP, graph: AtomGraph) -> None:
        super().__init__()
        self.model, self.graph = model, graph

    def forward(self, atomic_numbers: torch.Tensor) -> Any:
        """Return energies, and direct forces if there are any."""
        out = self.model(dataclasses.replace(self.graph, atomic_numbers=atomic_numbers))
        return out.energy if out.forces is None else (out.energy, out.forces)


def need_fvcore() -> None:
    """Raise ModuleNotFoundError before a measurement, not after it, if fvcore's table cannot be made.

    Raises:
        ModuleNotFoundError: if fvcore is not installed.
    """
    import fvcore.nn  # noqa: F401, PLC0415


@torch.no_grad()
def fvcore_table(model: JMP, graph: AtomGraph, *, depth: int = 4) -> str:
    """Return fvcore's table of parameters and multiply-adds by module, as the reference backend runs it in fp32.

    That backend computes every place of its padded tables, so the total is above the model's own count.

    Raises:
        ModuleNotFoundError: if fvcore is not installed.
    """
    from fvcore.nn import FlopCountAnalysis, flop_count_table  # noqa: PLC0415

    reference = model.on(backend="reference", precision="fp32")
    analysis = FlopCountAnalysis(ByNumbers(reference, graph), (graph.atomic_numbers,))
    analysis.unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False)
    return flop_count_table(analysis, max_depth=depth, show_param_shapes=False)
