"""The block-count benchmark: one workload through models of 6, 5, 4, 3, 2 blocks, interleaved, gated, in one run."""

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import ejmp
from ejmp.compress.pruning import prune
from ejmp.graph.graph import EDGE_SETS, AtomGraph
from ejmp.measure.flops import GraphSizes, count_macs, graph_sizes
from ejmp.measure.instruments import StoragePeak, gemm_rates, summarise, synchronize, time_call
from ejmp.measure.workloads import Workload
from ejmp.model.backend import Backend
from ejmp.model.config import Precision
from ejmp.model.jmp import JMP
from ejmp.provenance import provenance
from ejmp_kernels import availability

PUBLISHED_THROUGHPUT = {6: 1.00, 5: 1.14, 4: 1.34, 3: 1.61, 2: 1.99}
"""Ghunaim et al., table 2: samples/s on one V100, over that of 6 blocks."""
FLOP_CONVENTION = "1 GMAC = 10^9 multiply-adds of matrix products (fvcore); GFLOP = 2 x GMAC (torch.utils.flop_counter)"
METHANOL = (
    (6, 8, 1, 1, 1, 1),
    ((-0.05, 0.66, 0), (-0.05, -0.76, 0), (-1.09, 0.98, 0), (0.44, 1.07, 0.89), (0.44, 1.07, -0.89), (0.87, -1.06, 0)),
)
"""Atomic numbers and positions in A."""
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
    backend: Backend = "auto"
    compare: bool = False
    """Also time the reference backend in every round."""


def run(plan: Plan, report: Callable[[str], None] = lambda _line: None) -> dict[str, Any]:
    """Run the benchmark and return everything it found, ready for JSON.

    Every model first passes `check_model`. Then each round times the machine's matrix products
    and every model once, so that all see the same minutes of the machine.

    Args:
        plan: what to measure.
        report: called with a line about what is happening.

    Raises:
        RuntimeError: if a model's output is wrong; nothing is timed then.
        ValueError: if the workload has no edges.
    """
    device = torch.device(plan.device)
    made = provenance(device) | {"seed": plan.seed}
    graph, graph_ms = _timed_graph(plan, device)
    if graph.main.num_edges == 0:
        raise ValueError(f"{plan.workload.name}: no two atoms are within {plan.workload.cutoff} A: nothing to measure")
    report(f"{plan.workload.name}: {graph.num_atoms} atoms, {graph.main.num_edges} edges; making the model")
    models = make_models(plan.blocks, small=plan.small, seed=plan.seed, device=device, backend=plan.backend)
    gates = {b: check_model(model, plan.precisions, models[max(models)]) for b, model in models.items()}
    report("every model passes its check; measuring memory and warming up")
    backends = _backends(plan)
    cases = list(itertools.product(plan.blocks, plan.precisions, backends))
    memory = {(b, p, k): peak_memory(models[b], graph, p, k) for b, p, k in cases}
    times, rates = _rounds(plan, models, graph, report)
    sizes = graph_sizes(graph)
    rows = []
    for p, b in itertools.product(plan.precisions, plan.blocks):
        row = make_row(models[b], graph, sizes, times[b, p, plan.backend], _best(rates, p))
        row |= {"precision": p, "error_vs_float64": gates[b][p]}
        row["peak_memory_mib"] = memory[b, p, plan.backend] / 2**20
        if plan.compare:
            row |= _compared(times[b, p, plan.backend], times[b, p, "reference"], memory[b, p, "reference"])
        rows.append(row)
    _add_ratios(rows, published=not plan.small)
    return {
        "benchmark": "blocks",
        "model": f"{'JMP-S' if plan.small else 'JMP-L'} scalar, backend {models[max(models)].backend}",
        "workload": {"name": plan.workload.name, "cutoff": plan.workload.cutoff, "sizes": asdict(sizes)}
        | {"max_neighbors": sorted(set(plan.workload.max_neighbors)), "structures": graph.num_structures},
        "convention": FLOP_CONVENTION,
        "graph_ms": graph_ms,
        "gemm_gflops": {name: summarise(values) for name, values in rates.items()},
        "rows": rows,
        "provenance": made,
    }


def make_models(
    blocks: Sequence[int],
    *,
    small: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    backend: Backend = "auto",
) -> dict[int, JMP]:
    """Return a scalar model with random weights and its prunings to fewer blocks, by number of blocks."""
    torch.manual_seed(seed)
    preset = ejmp.jmp_s if small else ejmp.jmp_l
    full = JMP(preset(blocks=max(blocks), scalar=True), backend).to(device).eval()
    return {b: full if b == full.config.blocks else prune(full, blocks=b) for b in blocks}


def workload_graph(workload: Workload, **options: Any) -> AtomGraph:
    """Build the batched graph of a workload; options as for `build_graph`."""
    return ejmp.build_graph(workload.structures, workload.cutoff, workload.max_neighbors, **options)


@torch.no_grad()
def check_model(model: JMP, precisions: Sequence[Precision], full: JMP | None = None) -> dict[str, float]:
    """Check a model on a methanol molecule before anybody times it.

    Each precision's final MLP output must agree with that of a float64 copy; energies must not change when the
    molecule is turned; and the blocks of a pruned model must give what they gave in the full one.

    Args:
        model: what to check.
        precisions: those that will be timed.
        full: the model it was pruned from, keeping the first blocks.

    Returns:
        Each precision's error, relative to the largest value.

    Raises:
        RuntimeError: if the model fails; errors are held against `GATE`.
    """
    device, blocks = model.embedding.atom_embedding.weight.device, model.config.blocks
    graph = ejmp.build_graph(ejmp.Structure(numbers=METHANOL[0], positions=METHANOL[1]), 12.0, device=device)
    double, in_double = copy.deepcopy(model).double(), graph.to(dtype=torch.float64)
    double.precision = "fp32"
    exact = double.features(in_double).mlp_E[-1]
    quarter = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64, device=device)
    turned = double.features(in_double.with_positions(graph.positions @ quarter)).mlp_E[-1]
    if not _error(turned, exact) <= 1e-9:
        raise RuntimeError(f"{blocks} blocks: not invariant under rotation, error {_error(turned, exact):.1e}")
    if full is not None:
        theirs = full.features(graph).x_E
        for i, mine in enumerate(model.features(graph).x_E):
            if not _error(mine, theirs[i]) <= GATE["fp32"]:
                raise RuntimeError(f"{blocks} blocks: block {i} gives something else than in the full model")
    errors = {}
    for precision in precisions:
        value = _forward(model, graph, precision, lambda m, g: m.features(g).mlp_E[-1])
        errors[precision] = _error(value, exact)
        if not errors[precision] <= GATE[precision]:
            raise RuntimeError(f"{blocks} blocks, {precision}: error {errors[precision]:.1e} against float64")
    return errors


def _error(value: Tensor, exact: Tensor) -> float:
    return ((value - exact).abs().max() / exact.abs().max()).item()


@torch.no_grad()
def _forward(
    model: JMP,
    graph: AtomGraph,
    precision: Precision,
    call: Callable[[JMP, AtomGraph], Tensor] = lambda model, graph: model(graph).energy,
    backend: Backend | None = None,
) -> Tensor:
    before = model.precision, model.requested_backend
    model.precision, model.requested_backend = precision, backend or model.requested_backend
    try:
        return call(model, graph)
    finally:
        model.precision, model.requested_backend = before


def time_forward(model: JMP, graph: AtomGraph, precision: Precision, backend: Backend | None = None) -> float:
    """Return the seconds of one forward pass, with the device idle before and after.

    Raises:
        RuntimeError: if the energy is not finite.
    """
    energies: list[Tensor] = []
    seconds = time_call(lambda: energies.append(_forward(model, graph, precision, backend=backend)), graph.device)
    if not torch.isfinite(energies[0]).all():
        raise RuntimeError(f"{model.config.blocks} blocks, {precision}: the energy is not finite")
    return seconds


def peak_memory(model: JMP, graph: AtomGraph, precision: Precision, backend: Backend | None = None) -> int:
    """Return the most bytes a forward pass holds beyond what was there before it."""
    if graph.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(graph.device)
        before = torch.cuda.memory_allocated(graph.device)
        _forward(model, graph, precision, backend=backend)
        synchronize(graph.device)
        return torch.cuda.max_memory_allocated(graph.device) - before
    owners = (graph, *(getattr(graph, name) for name in EDGE_SETS))
    inputs = [*(vars(owner).values() for owner in owners), model.state_dict().values()]
    with StoragePeak(itertools.chain.from_iterable(inputs)) as memory:
        _forward(model, graph, precision, backend=backend)
    return memory.peak


def _timed_graph(plan: Plan, device: torch.device) -> tuple[AtomGraph, dict[str, dict[str, float]]]:
    """Build the graph by turns with every backend there is; return the graph and milliseconds by backend."""
    backends = ["reference"] if availability.why_unavailable() else ["native", "reference"]
    samples: dict[str, list[float]] = {backend: [] for backend in backends}
    graph = workload_graph(plan.workload, device=device)
    for _ in range(7):
        for backend, found in samples.items():
            build = functools.partial(workload_graph, plan.workload, device=device, backend=backend)
            found.append(1e3 * time_call(build, device))
    return graph, {backend: summarise(found) for backend, found in samples.items()}


Times = dict[tuple[int, str, str], list[float]]


def _backends(plan: Plan) -> list[Backend]:
    return [plan.backend, "reference"] if plan.compare else [plan.backend]


def _compared(seconds: Sequence[float], reference: Sequence[float], reference_bytes: int) -> dict[str, Any]:
    """Return what the reference backend took in the same rounds, and the speed-up: the median of the rounds' ratios."""
    return {
        "reference_ms": summarise([1e3 * s for s in reference]),
        "speedup": statistics.median(r / s for r, s in zip(reference, seconds, strict=True)),
        "reference_peak_memory_mib": reference_bytes / 2**20,
    }


def _rounds(
    plan: Plan, models: dict[int, JMP], graph: AtomGraph, report: Callable[[str], None]
) -> tuple[Times, dict[str, list[float]]]:
    cases = list(itertools.product(plan.blocks, plan.precisions, _backends(plan)))
    times: Times = {case: [] for case in cases}
    rates: dict[str, list[float]] = {}
    start, number = time.perf_counter(), 0
    while number < plan.min_rounds or (number < plan.max_rounds and time.perf_counter() - start < plan.seconds):
        for name, rate in gemm_rates(graph.main.num_edges, plan.precisions, graph.device).items():
            rates.setdefault(name, []).append(rate)
        for b, p, backend in cases:
            times[b, p, backend].append(time_forward(models[b], graph, p, backend))
        number += 1
        report(f"round {number} done, {time.perf_counter() - start:.0f} s")
    return times, rates


def _best(rates: dict[str, list[float]], precision: str) -> float:
    return max(statistics.median(values) for name, values in rates.items() if name.startswith(f"{precision} "))


def make_row(
    model: JMP, graph: AtomGraph, sizes: GraphSizes, seconds: Sequence[float], gemm_gflops: float
) -> dict[str, Any]:
    """Return what follows from the seconds of a model's forward passes, beside a matrix-product rate in GFLOP/s."""
    summary = summarise([1e3 * s for s in seconds])
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


def _add_ratios(rows: list[dict[str, Any]], *, published: bool) -> None:
    """Add to each row what it is of the row with most blocks at the same precision, and the published ratio."""
    for row in rows:
        same = [r for r in rows if r["precision"] == row["precision"]]
        full = max(same, key=lambda r: r["blocks"])
        # Throughput: the median of the ratios within each round, which the machine's drift does not touch.
        pairs = zip(full["samples_ms"], row["samples_ms"], strict=True)
        row["ratio"] = {"structures_per_s": statistics.median(a / b for a, b in pairs)}
        row["ratio"] |= {name: row[name] / full[name] for name in ("gmac", "parameters", "peak_memory_mib")}
        if published and full["blocks"] == 6:
            row["published_throughput_ratio"] = PUBLISHED_THROUGHPUT.get(row["blocks"])
