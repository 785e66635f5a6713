"""The block-count benchmark: one workload through models of 6, 5, 4, 3, 2 blocks, interleaved, gated, in one run."""

import copy
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import ejmp
from ejmp.compress.pruning import prune
from ejmp.graph.graph import AtomGraph
from ejmp.measure.flops import GraphSizes, count_macs, graph_sizes
from ejmp.measure.memory import peak_memory, tensors_of
from ejmp.measure.rates import gemm_rates
from ejmp.measure.timing import Rounds, by_turns, median_ratio, summarise
from ejmp.measure.workloads import Workload
from ejmp.model.backend import Backend
from ejmp.model.config import Precision
from ejmp.model.jmp import JMP
from ejmp.provenance import provenance
from ejmp_kernels import availability

PUBLISHED_THROUGHPUT = {6: 1.00, 5: 1.14, 4: 1.34, 3: 1.61, 2: 1.99}
"""Throughput over that of 6 blocks by number of blocks: samples/s on one V100 in Ghunaim et al., table 2."""
FLOP_CONVENTION = "1 GMAC = 10^9 multiply-adds of matrix products (fvcore); GFLOP = 2 x GMAC (torch.utils.flop_counter)"
METHANOL = (
    (6, 8, 1, 1, 1, 1),
    ((-0.05, 0.66, 0), (-0.05, -0.76, 0), (-1.09, 0.98, 0), (0.44, 1.07, 0.89), (0.44, 1.07, -0.89), (0.87, -1.06, 0)),
)
"""The molecule that `check_model` runs on: atomic numbers, and positions in A."""
GATE = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1, "int8": 2e-1, "fp8": 3e-1}
"""Largest allowed difference from float64 in the final MLP's output, relative to its largest value, by precision."""

ROUNDS = Rounds(least=2, most=15, seconds=100.0, warm_ups=0)
"""How often a model is timed unless somebody asks for more; measuring memory has warmed it up before."""


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """A request to time one workload through models of several numbers of blocks."""

    workload: Workload
    """Batch that every model runs on."""
    blocks: tuple[int, ...] = (6, 5, 4, 3, 2)
    """Numbers of blocks; the models with fewer are pruned from the one with most."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    """Precisions to run every model at."""
    device: str = "cpu"
    """Device as torch names it."""
    rounds: Rounds = ROUNDS
    """How often every model is timed."""
    seed: int = 0
    """Seed of the random weights."""
    small: bool = False
    """Whether to use JMP-S instead of JMP-L."""
    model: JMP | None = None
    """Model to prune and measure; None: JMP-L or JMP-S with random weights, scalar."""
    backend: Backend = "auto"
    """Backend that is measured."""
    compare: bool = False
    """Whether to time the reference backend too, in every round."""


Case = tuple[int, Precision, Backend]
"""What is timed: a number of blocks, at a precision, on a backend."""


def run(request: BenchRequest, report: Callable[[str], None] = lambda _line: None) -> dict[str, Any]:
    """Run the benchmark and return everything it found, ready for JSON.

    Every model first passes `check_model`. Then each round times every model and the machine's matrix products once, so
    that all see the same minutes of the machine.

    Args:
        request: what to measure.
        report: called with a line about what is happening.

    Raises:
        RuntimeError: if a model's output is wrong; nothing is timed then.
        ValueError: if the workload has no edges.
    """
    device, workload = torch.device(request.device), request.workload
    made = provenance(device) | {"seed": request.seed}
    graph, graph_ms = _timed_graph(workload, device)
    if graph.main.num_edges == 0:
        raise ValueError(f"{workload.name}: no two atoms are within {workload.cutoff} A: nothing to measure")
    report(f"{workload.name}: {graph.num_atoms} atoms, {graph.main.num_edges} edges; making the model")
    full = request.model or random_model(max(request.blocks), small=request.small, seed=request.seed)
    models = make_models(request.blocks, full.on(backend=request.backend).to(device))
    gates = {b: check_model(model, request.precisions, models[max(models)]) for b, model in models.items()}
    report("every model passes its check; measuring memory and warming up")
    backends: list[Backend] = [request.backend, "reference"] if request.compare else [request.backend]
    calls: dict[Case, Callable[[], Tensor]] = {
        (b, p, k): functools.partial(forward_pass, models[b].on(precision=p, backend=k), graph)
        for b, p, k in itertools.product(request.blocks, request.precisions, backends)
    }
    memory = {case: peak_memory(call, device, tensors_of(models[case[0]], graph)) for case, call in calls.items()}
    times, rates = _time_all(calls, request, graph, report)
    sizes, rows = graph_sizes(graph), []
    for p, b in itertools.product(request.precisions, request.blocks):
        case = (b, p, request.backend)
        row = make_row(models[b], graph, sizes, times[case], _best(rates, p))
        row |= {"precision": p, "error_vs_float64": gates[b][p], "peak_memory_mib": memory[case] / 2**20}
        if request.compare:
            row |= _compared(times[case], times[b, p, "reference"], memory[b, p, "reference"])
        rows.append(row)
    _add_ratios(rows, published=not request.small and request.model is None)
    return {
        "benchmark": "blocks",
        "model": f"{model_name(request.model, small=request.small)}, backend {models[max(models)].backend}",
        "workload": {"name": workload.name, "cutoff": workload.cutoff, "sizes": asdict(sizes)}
        | {"max_neighbors": sorted(set(workload.max_neighbors)), "structures": graph.num_structures},
        "convention": FLOP_CONVENTION,
        "graph_ms": graph_ms,
        "gemm_gflops": {name: summarise(values) for name, values in rates.items()},
        "rows": rows,
        "provenance": made,
    }


def random_model(blocks: int, *, small: bool = False, seed: int = 0) -> JMP:
    """Return JMP-L's scalar model, or JMP-S's, with random weights."""
    torch.manual_seed(seed)
    preset = ejmp.jmp_s if small else ejmp.jmp_l
    return JMP(preset(blocks=blocks, scalar=True))


def model_name(model: JMP | None, *, small: bool) -> str:
    """Return what results call a model: a preset's name, or for a model of somebody's its size."""
    if model is None:
        return f"{'JMP-S' if small else 'JMP-L'} scalar"
    return f"given model of {sum(p.numel() for p in model.parameters()):,} parameters"


def make_models(blocks: Sequence[int], full: JMP) -> dict[int, JMP]:
    """Return a model and its prunings to fewer blocks, by number of blocks.

    Raises:
        ValueError: if it has not that many blocks.
    """
    full = full.eval()
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
        model: model to check.
        precisions: precisions that will be timed.
        full: the model it was pruned from, keeping the first blocks; None if it was not pruned.

    Returns:
        The error at each precision, relative to the largest value.

    Raises:
        RuntimeError: if the model fails; errors are held against `GATE`.
    """
    device, blocks = model.device, model.config.blocks
    graph = ejmp.build_graph(ejmp.Structure(numbers=METHANOL[0], positions=METHANOL[1]), 12.0, device=device)
    double, in_double = copy.deepcopy(model.on(precision="fp32")).double(), graph.to(dtype=torch.float64)
    exact = double.features(in_double).mlp_E[-1]
    quarter = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64, device=device)
    turned = double.features(in_double.with_positions(graph.positions @ quarter)).mlp_E[-1]
    if not _error(turned, exact) <= 1e-9:
        raise RuntimeError(f"{blocks} blocks: not invariant under rotation, error {_error(turned, exact):.1e}")
    if full is not None:
        expected = full.features(graph).x_E
        for i, found in enumerate(model.features(graph).x_E):
            if not _error(found, expected[i]) <= GATE["fp32"]:
                raise RuntimeError(f"{blocks} blocks: block {i} gives something else than in the full model")
    errors = {}
    for precision in precisions:
        errors[precision] = _error(model.on(precision=precision).features(graph).mlp_E[-1], exact)
        if not errors[precision] <= GATE[precision]:
            raise RuntimeError(f"{blocks} blocks, {precision}: error {errors[precision]:.1e} against float64")
    return errors


def _error(value: Tensor, exact: Tensor) -> float:
    return ((value - exact).abs().max() / exact.abs().max()).item()


@torch.no_grad()
def forward_pass(model: JMP, graph: AtomGraph) -> Tensor:
    """Run one forward pass and return the energies, [B, T]; what is timed.

    Raises:
        RuntimeError: if an energy is not finite.
    """
    energy = model(graph).energy
    if not torch.isfinite(energy).all():
        raise RuntimeError(f"{model.config.blocks} blocks, {model.precision}: the energy is not finite")
    return energy


def _timed_graph(workload: Workload, device: torch.device) -> tuple[AtomGraph, dict[str, dict[str, float]]]:
    """Build the graph by turns with every backend there is; return the graph and milliseconds by backend."""
    backends = ["reference"] if availability.why_unavailable() else ["native", "reference"]
    builds = {name: functools.partial(workload_graph, workload, device=device, backend=name) for name in backends}
    times = by_turns(builds, device, Rounds(least=7))
    return workload_graph(workload, device=device), {
        name: summarise([1e3 * s for s in seconds]) for name, seconds in times.items()
    }


def _time_all(
    calls: dict[Case, Callable[[], Tensor]],
    request: BenchRequest,
    graph: AtomGraph,
    report: Callable[[str], None],
) -> tuple[dict[Case, list[float]], dict[str, list[float]]]:
    """Return the seconds of each case, and the rates of matrix products in GFLOP/s, one of each per round."""
    rates: dict[str, list[float]] = {}

    def after_round(number: int, seconds: float) -> None:
        for name, rate in gemm_rates(graph.main.num_edges, request.precisions, graph.device).items():
            rates.setdefault(name, []).append(rate)
        report(f"round {number} done, {seconds:.0f} s")

    return by_turns(calls, graph.device, request.rounds, after_round=after_round), rates


def _compared(seconds: Sequence[float], reference: Sequence[float], reference_bytes: int) -> dict[str, Any]:
    """Return what the reference backend took in the same rounds, and how many times faster the measured one is."""
    return {
        "reference_ms": summarise([1e3 * s for s in reference]),
        "speedup": median_ratio(reference, seconds),
        "reference_peak_memory_mib": reference_bytes / 2**20,
    }


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
        row["ratio"] = {"structures_per_s": median_ratio(full["samples_ms"], row["samples_ms"])}
        row["ratio"] |= {name: row[name] / full[name] for name in ("gmac", "parameters", "peak_memory_mib")}
        if published and full["blocks"] == 6:
            row["published_throughput_ratio"] = PUBLISHED_THROUGHPUT.get(row["blocks"])
