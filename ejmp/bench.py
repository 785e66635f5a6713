"""The block-count benchmark: one workload through models of 6, 5, 4, 3, 2 blocks, interleaved, gated, in one run."""

import copy
import datetime as dt
import functools
import itertools
import os
import platform
import statistics
import subprocess
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ejmp
from ejmp.flops import GraphSizes, count_macs, graph_sizes
from ejmp.graph import AtomGraph
from ejmp.model import JMP, LOW_PRECISION, Precision, allow_tf32
from ejmp.prune import prune
from ejmp.workloads import Workload
from ejmp_kernels import extension

PUBLISHED_THROUGHPUT = {6: 1.00, 5: 1.14, 4: 1.34, 3: 1.61, 2: 1.99}
"""Ghunaim et al., table 2: samples/s on one V100, over that of 6 blocks."""
FLOP_CONVENTION = "1 GMAC = 10^9 multiply-adds of matrix products (fvcore); GFLOP = 2 x GMAC (torch.utils.flop_counter)"
GATE = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}
"""Largest difference from float64 in the final MLP's output, relative to its largest value."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.

    Rounds are repeated until `seconds` have passed, but at least `min_rounds` and at most `max_rounds`.
    """

    workload: Workload
    blocks: tuple[int, ...] = (6, 5, 4, 3, 2)
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    device: str = "cpu"
    min_rounds: int = 2
    max_rounds: int = 15
    seconds: float = 100.0
    seed: int = 0
    small: bool = False
    """Use JMP-S instead of JMP-L."""


def run(plan: Plan, report: Callable[[str], None] = lambda _line: None) -> dict[str, Any]:
    """Run the benchmark and return everything it found, ready for JSON.

    Every model first passes a correctness check against float64. Then each round times the machine's matrix products
    and every model once, so that all see the same minutes of the machine.

    Args:
        plan: what to measure.
        report: called with a line about what is happening.

    Raises:
        RuntimeError: if a model's output is wrong; nothing is timed then.
    """
    device = torch.device(plan.device)
    graph, graph_ms = _timed_graph(plan, device)
    report(f"{plan.workload.name}: {graph.num_atoms} atoms, {graph.main.num_edges} edges; making the model")
    torch.manual_seed(plan.seed)
    preset = ejmp.jmp_s if plan.small else ejmp.jmp_l
    full = JMP(preset(blocks=max(plan.blocks), scalar=True)).to(device).eval()
    models = {b: prune(full, blocks=b) for b in plan.blocks}
    gates = {b: check_model(model, plan.precisions) for b, model in models.items()}
    report("every model agrees with float64; measuring memory and warming up")
    memory = {(b, p): peak_memory(models[b], graph, p) for p in plan.precisions for b in plan.blocks}
    times, rates = _rounds(plan, models, graph, report)
    sizes = graph_sizes(graph)
    rows = [
        _row(models[b], graph, sizes, times[b, p], _best(rates, p))
        | {"precision": p, "peak_memory_mib": memory[b, p] / 2**20, "error_vs_float64": gates[b][p]}
        for p in plan.precisions
        for b in plan.blocks
    ]
    _add_ratios(rows)
    return {
        "benchmark": "blocks",
        "model": f"{'JMP-S' if plan.small else 'JMP-L'} scalar, backend {full.backend}",
        "workload": {"name": plan.workload.name, "cutoff": plan.workload.cutoff, "sizes": asdict(sizes)}
        | {"max_neighbors": sorted(set(plan.workload.max_neighbors)), "structures": graph.num_structures},
        "convention": FLOP_CONVENTION,
        "graph_ms": graph_ms,
        "gemm_gflops": {name: _summary(values) for name, values in rates.items()},
        "rows": rows,
        "provenance": provenance(device) | {"seed": plan.seed},
    }


def workload_graph(workload: Workload, **options: Any) -> AtomGraph:
    """Build the batched graph of a workload; options as for `build_graph`."""
    return ejmp.build_graph(workload.structures, workload.cutoff, workload.max_neighbors, **options)


def check_model(model: JMP, precisions: Sequence[Precision]) -> dict[str, float]:
    """Return each precision's error against a float64 copy of the model, on a methanol molecule.

    Raises:
        RuntimeError: if an error is beyond `GATE`.
    """
    numbers = [6, 8, 1, 1, 1, 1]
    positions = [[-0.05, 0.66, 0], [-0.05, -0.76, 0], [-1.09, 0.98, 0], [0.44, 1.07, 0.89], [0.44, 1.07, -0.89]]
    methanol = ejmp.Structure(numbers=numbers, positions=[*positions, [0.87, -1.06, 0]])
    device = model.embedding.atom_embedding.weight.device
    graph = ejmp.build_graph(methanol, 12.0, device=device)
    exact = copy.deepcopy(model).double().features(graph.to(dtype=torch.float64)).mlp_E[-1]
    errors = {}
    for precision in precisions:
        value = _forward(model, graph, precision, lambda m, g: m.features(g).mlp_E[-1])
        error = ((value - exact).abs().max() / exact.abs().max()).item()
        if not error <= GATE[precision]:
            raise RuntimeError(f"{model.config.blocks} blocks, {precision}: error {error:.1e} against float64")
        errors[precision] = error
    return errors


@torch.no_grad()
def _forward(
    model: JMP,
    graph: AtomGraph,
    precision: Precision,
    call: Callable[[JMP, AtomGraph], Tensor] = lambda model, graph: model(graph).energy,
) -> Tensor:
    before = model.precision
    model.precision = precision
    try:
        return call(model, graph)
    finally:
        model.precision = before


def time_forward(model: JMP, graph: AtomGraph, precision: Precision) -> float:
    """Return the seconds of one forward pass, with the device idle before and after.

    Raises:
        RuntimeError: if the energy is not finite.
    """
    _synchronize(graph.device)
    start = time.perf_counter()
    energy = _forward(model, graph, precision)
    _synchronize(graph.device)
    seconds = time.perf_counter() - start
    if not torch.isfinite(energy).all():
        raise RuntimeError(f"{model.config.blocks} blocks, {precision}: the energy is not finite")
    return seconds


def peak_memory(model: JMP, graph: AtomGraph, precision: Precision) -> int:
    """Return the most bytes a forward pass holds beyond what was there before it."""
    if graph.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _forward(model, graph, precision)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    edge_sets = (graph.main, graph.atom_edges, graph.quad_edges, graph.atom_pairs)
    inputs = [vars(owner).values() for owner in (graph, *edge_sets)] + [model.state_dict().values()]
    with StoragePeak(itertools.chain.from_iterable(inputs)) as memory:
        _forward(model, graph, precision)
    return memory.peak


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


def gemm_rates(rows: int, precisions: Sequence[Precision], device: torch.device, repeats: int = 3) -> dict[str, float]:
    """Measure the machine's matrix products at (rows, 1024, 1024) with every library at hand, in GFLOP/s.

    torch's float32 product goes to MKL, which is slow on AMD CPUs; the oneDNN in the same torch is often twice as fast.
    """
    rates = {}
    for precision in precisions:
        dtype = LOW_PRECISION.get(precision, torch.float32)
        x = torch.randn(rows, 1024, device=device, dtype=dtype)
        w = torch.randn(1024, 1024, device=device, dtype=dtype)
        libraries: dict[str, Callable[..., Tensor]] = {"torch": torch.nn.functional.linear}
        if device.type == "cpu" and precision == "fp32" and torch.backends.mkldnn.is_available():
            libraries["onednn"] = lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")  # noqa: SLF001
        for library, product in libraries.items():
            with allow_tf32(precision == "tf32"):
                seconds = [_time_call(lambda p=product, a=x, b=w: p(a, b), device) for _ in range(repeats + 1)][1:]
            rates[f"{precision} {library}"] = 2e-9 * rows * 1024 * 1024 / statistics.median(seconds)
    return rates


def provenance(device: torch.device) -> dict[str, Any]:
    """Return what a number needs to be believed: hardware, versions, commit, load, date."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    found = {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "ejmp": ejmp.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time_call(call: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _timed_graph(plan: Plan, device: torch.device) -> tuple[AtomGraph, dict[str, dict[str, float]]]:
    """Build the graph by turns with every backend there is; return the graph and milliseconds by backend."""
    backends = ["reference"] if extension.unavailable() else ["native", "reference"]
    samples: dict[str, list[float]] = {backend: [] for backend in backends}
    graph = workload_graph(plan.workload, device=device)
    for _ in range(7):
        for backend, found in samples.items():
            build = functools.partial(workload_graph, plan.workload, device=device, backend=backend)
            found.append(1e3 * _time_call(build, device))
    return graph, {backend: _summary(found) for backend, found in samples.items()}


Times = dict[tuple[int, str], list[float]]


def _rounds(
    plan: Plan, models: dict[int, JMP], graph: AtomGraph, report: Callable[[str], None]
) -> tuple[Times, dict[str, list[float]]]:
    times: Times = {(b, p): [] for b in plan.blocks for p in plan.precisions}
    rates: dict[str, list[float]] = {}
    start, number = time.perf_counter(), 0
    while number < plan.min_rounds or (number < plan.max_rounds and time.perf_counter() - start < plan.seconds):
        for name, rate in gemm_rates(graph.main.num_edges, plan.precisions, graph.device).items():
            rates.setdefault(name, []).append(rate)
        for b in plan.blocks:
            for p in plan.precisions:
                times[b, p].append(time_forward(models[b], graph, p))
        number += 1
        report(f"round {number} done, {time.perf_counter() - start:.0f} s")
    return times, rates


def _summary(values: list[float]) -> dict[str, float]:
    """Return median, 95th percentile (nearest rank) and number of samples."""
    ordered = sorted(values)
    rank = min(len(ordered) - 1, round(0.95 * len(ordered) + 0.5) - 1)
    return {"median": statistics.median(ordered), "p95": ordered[rank], "samples": len(ordered)}


def _best(rates: dict[str, list[float]], precision: str) -> float:
    return max(statistics.median(values) for name, values in rates.items() if name.startswith(f"{precision} "))


def _row(model: JMP, graph: AtomGraph, sizes: GraphSizes, seconds: list[float], gemm_gflops: float) -> dict[str, Any]:
    summary = _summary([1e3 * s for s in seconds])
    median = summary["median"] / 1e3
    gmac = sum(count_macs(model.config, sizes).values()) * 1e-9
    return {
        "blocks": model.config.blocks,
        "ms": summary,
        "samples_ms": [1e3 * s for s in seconds],
        "structures_per_s": graph.num_structures / median,
        "atoms_per_s": graph.num_atoms / median,
        "edges_per_s": graph.main.num_edges / median,
        "gmac": gmac,
        "gflop": 2 * gmac,
        "gemm_share": 2 * gmac / median / gemm_gflops,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    """Add to each row what it is of the row with most blocks at the same precision, and the published ratio."""
    for row in rows:
        same = [r for r in rows if r["precision"] == row["precision"]]
        full = max(same, key=lambda r: r["blocks"])
        row["ratio"] = {name: row[name] / full[name] for name in ("structures_per_s", "gmac", "parameters")}
        # Throughput: the median of the ratios within each round, which the machine's drift does not touch.
        pairs = zip(full["samples_ms"], row["samples_ms"], strict=True)
        row["ratio"]["structures_per_s"] = statistics.median(a / b for a, b in pairs)
        row["ratio"]["peak_memory_mib"] = row["peak_memory_mib"] / full["peak_memory_mib"]
        if full["blocks"] == 6:
            row["published_throughput_ratio"] = PUBLISHED_THROUGHPUT.get(row["blocks"])
