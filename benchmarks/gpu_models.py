"""Steps of the GPU campaign on the forward pass: blocks and batch sizes, and the ways to run one model."""

import copy
import time
from statistics import median

import torch
from gpu_setting import Setting, make_model
from gpu_step import Skip, Step, reasons, require_error
from gpu_timing import (
    backends,
    ceilings,
    fastest,
    forward_tflop,
    milliseconds,
    milliseconds_or_why,
    peak_mib,
    rate_and_shares,
)

import ejmp
from ejmp.graph.padding import Buckets, GraphShape
from ejmp.measure import bench
from ejmp.measure.flops import count_macs
from ejmp.measure.timing import median_ratio, synchronize
from ejmp.model.precision import products

CHECKED = 4
"""Number of structures whose energies are compared with float64."""


class Exact:
    """The energies of the first structures of every batch in float64, and the scale of errors."""

    def __init__(self, setting: Setting, model: ejmp.JMP) -> None:
        self.structures = CHECKED
        double = copy.deepcopy(model.on(backend="reference", precision="fp32")).double()
        graph = setting.graph(self.structures, dtype=torch.float64)
        with torch.no_grad():
            features = double.features(graph)
            self.energy = double.heads(features, graph).energy
            atoms = torch.cat([head(features.mlp_E[-1]) for head in double.output.out_energy], dim=1)
        self.scale = (atoms.abs().sum() / self.structures).item()

    def error(self, energy: torch.Tensor) -> float:
        """Return the largest error of an energy over the sum of its atoms' absolute energies."""
        most = min(self.structures, len(energy))
        return ((energy[:most].double() - self.energy[:most]).abs().max() / self.scale).item()


ERROR = "largest error of an energy against float64, over the sum of the absolute energies of its atoms"
"""Explanation of the column "error" (`Exact.error`) that goes into the results."""


@torch.no_grad()
def run_blocks(setting: Setting) -> None:
    """Measure the block-count table in every precision, in batches of more and more structures, up to memory."""
    backend = fastest(setting)
    step = Step("blocks", setting, model=setting.model_name, backend=backend, error_means=ERROR, ceilings={})
    full = make_model(setting)
    counts = (3, 2) if setting.dry else (6, 5, 4, 3, 2)
    models = {b: full if b == full.config.blocks else ejmp.prune(full, blocks=b) for b in counts}
    exact = {b: Exact(setting, model) for b, model in models.items()}
    lost: set[str] = set()  # precisions that memory no longer holds
    for structures in (1, 2) if setting.dry else (1, 4, 16, 64, 256, 1024):
        for precision in reversed(setting.precisions):  # the fast ones first
            if precision in lost:
                continue
            found: dict = {"precision": precision, "structures": structures}
            with reasons(found):
                step.require_time()
                graph, sizes = setting.graph(structures), setting.sizes(structures)
                limits = ceilings(setting, graph.main.num_edges, [precision])
                require_time_for(step, sum(forward_tflop(m.config, sizes) for m in models.values()), limits, precision)
            if len(found) > 2:
                step.add(found)
                lost.add(precision)
                continue
            step.result["ceilings"][f"{structures} {precision}"] = limits
            calls = {b: model.on(backend=backend, precision=precision) for b, model in models.items()}
            one_batch(step, (structures, precision), calls, graph, (sizes, exact))
            if any(row.get("skipped") == "out of memory" for row in step.result["rows"][-len(counts) :]):
                lost.add(precision)


def require_time_for(step: Step, tflop: float, limits: dict, precision: str) -> None:
    """Raise Skip if the time that is left is too short for five rounds at half the ceiling's rate.

    Raises:
        Skip: if it is; not in a dry run.
    """
    expected = 10 * tflop / limits["gemm_tflops"][precision]
    if not step.setting.dry and expected > step.left():
        raise Skip(f"it would take {expected:.0f} s, and {step.left():.0f} s are left")


def one_batch(step: Step, key: tuple[int, str], models: dict, graph, known: tuple) -> None:
    """Add a row per number of blocks, all timed by turns."""
    setting, (structures, precision), (sizes, exact) = step.setting, key, known
    limits = step.result["ceilings"][f"{structures} {precision}"]
    rows, calls = {}, {}
    for b, model in models.items():
        found: dict = {}
        with reasons(found):
            energies: list[torch.Tensor] = []
            found["peak_mib"] = peak_mib(setting, lambda m=model, e=energies: e.append(m(graph).energy))
            found["error"] = exact[b].error(energies[0] if energies else model(graph).energy)
            require_error(found, bench.GATE[precision])
            calls[b] = lambda m=model: m(graph)
        rows[b] = found
    seconds = min(4.0, max(0.5, step.left() / 10))
    times = milliseconds_or_why(calls, setting, list(rows.values()), seconds=seconds)
    for b, found in rows.items():
        with step.row(precision=precision, structures=structures, blocks=b) as row:
            row.update(found)
            if b not in times:
                continue
            row["ms"], row["samples"] = median(times[b]), len(times[b])
            row.update(rate_and_shares(forward_tflop(models[b].config, sizes), row["ms"], precision, limits))
            seconds = 1e-3 * row["ms"]
            row.update({"structures_per_s": structures / seconds, "atoms_per_s": sizes.atoms / seconds})
            row.update({"edges": sizes.edges, "edges_per_s": sizes.edges / seconds})
            row["gmac"] = 1e-9 * sum(count_macs(models[b].config, sizes).values())
            row["parameters"] = sum(p.numel() for p in models[b].parameters())
            most = max(times)
            row["x_of_most"] = median_ratio(times[most], times[b])
            row["most_blocks"] = most
            if most == 6:
                row["published_x"] = bench.PUBLISHED_THROUGHPUT[b]


WAYS = ("reference", "native", "triton")
"""Ways to run a model as it is: its backends."""
COMPILED = ("graph", "throughput", "latency", "torch.compile(reference)")
"""Ways to run a model that prepare it first: `JMP.compile` as a CUDA graph alone, by inductor, by both; and what plain
torch offers. The last ones take longest to compile, and are left out if time is short."""


def run_compare(setting: Setting) -> None:
    """Run one batch on every backend, by turns; "as shipped" is eager fp16 autocast."""
    compare_ways(setting, "compare", WAYS)


def run_compiled(setting: Setting) -> None:
    """Run one batch in every compiled way beside the fastest backend, by turns."""
    compare_ways(setting, "compiled", (fastest(setting), *COMPILED))


def compare_ways(setting: Setting, name: str, ways: tuple[str, ...]) -> None:
    """Measure a step of ways to run one batch in every precision."""
    structures = 1 if setting.dry else 17
    graph, sizes = setting.graph(structures), setting.sizes(structures)
    wanted = ["fp32"] if setting.dry else [p for p in ("bf16", "fp16", "tf32", "fp32") if p in setting.precisions]
    limits = ceilings(setting, graph.main.num_edges, wanted)
    about = {"model": setting.model_name, "structures": structures, "edges": sizes.edges, "error_means": ERROR}
    about["padded_edges"] = tight_shape(graph).main
    step = Step(name, setting, ceilings=limits, as_shipped="reference fp16", **about)
    model = make_model(setting, 1 if setting.dry else 6)
    exact, tflop = Exact(setting, model), forward_tflop(model.config, sizes)
    for precision in wanted:
        compare_one(step, (precision, ways), (model, graph, exact), (tflop, sizes.edges))


def compare_one(step: Step, what: tuple[str, tuple[str, ...]], known: tuple, work: tuple[float, int]) -> None:
    """Add a row per way to run the model, all timed by turns with JMP as it was shipped: eager, fp16 autocast."""
    setting, (precision, ways), (model, graph, exact), (tflop, edges) = step.setting, what, known, work
    calls, rows, first = {}, [], {}
    step.result["unfinished"] = rows  # what is known of each way, should the step be ended before all are timed
    for way in ways:
        found: dict = {"precision": precision, "way": way}
        rows.append(found)
        with reasons(found), torch.no_grad():
            step.require_time()
            if way in COMPILED and not setting.dry and step.left() < 45:
                raise Skip(f"{step.left():.0f} s are left, too few to compile it")
            start = time.perf_counter()
            call = prepare(setting, model, way, (precision, graph))
            energy = call(graph).energy
            synchronize(setting.device)
            found["first_call_s"] = time.perf_counter() - start
            found["error"] = exact.error(energy)
            require_error(found, bench.GATE[precision])
            found["peak_mib"] = peak_mib(setting, lambda c=call: c(graph))
            calls[way], first[way] = (lambda c=call: c(graph)), 1e3 * found["first_call_s"]
            alone = milliseconds({way: calls[way]}, setting, seconds=0.5, first=first)[way]
            found["ms_alone"] = median(alone)
        step.write()
    if calls and "fp16" in step.result["ceilings"]["gemm_tflops"]:
        eager = model.on(backend="reference", precision="fp16")
        calls["as shipped"] = lambda: eager(graph)
    with torch.no_grad():
        times = milliseconds_or_why(calls, setting, rows, seconds=4.0, first=first)
    del step.result["unfinished"]
    for found in rows:
        with step.row(**found) as row:
            samples = times.get(row["way"])
            if samples is None:
                continue
            row["ms"], row["samples"] = median(samples), len(samples)
            row.update(rate_and_shares(tflop, row["ms"], precision, step.result["ceilings"]))
            row["edges_per_s"] = edges / (1e-3 * row["ms"])
            others = [other for other in ("as shipped", "reference", "torch.compile(reference)") if other in times]
            row.update({f"x of {other}": median_ratio(times[other], samples) for other in others})


def tight_shape(graph: ejmp.AtomGraph) -> GraphShape:
    """Return the least shape with room for padding: measured with the usual ladder, a fifth of the edges could be."""
    return GraphShape.holding(GraphShape.of(graph))


def prepare(setting: Setting, model: ejmp.JMP, way: str, what: tuple[str, ejmp.AtomGraph]):
    """Return a function that runs a model in a precision on a graph in one of the ways.

    Raises:
        Skip: if the installation cannot do it, with the reason.
    """
    precision, graph = what
    there, compiler = backends(setting), "aot_eager" if setting.dry else "inductor"
    if way in there:
        if there[way] is not None:
            raise Skip(there[way])
        return model.on(backend=way, precision=precision)
    if way == "torch.compile(reference)":
        eager = model.on(backend="reference", precision=precision)
        traced = torch.compile(eager.forward, backend=compiler)

        def compiled(graph):
            with products(precision):
                return traced(graph)

        return compiled
    if way in ("graph", "latency") and setting.device.type != "cuda":
        raise Skip("CUDA graphs need a GPU")
    fast = model.on(backend=fastest(setting), precision=precision)
    mode, compiler = ("latency", None) if way == "graph" else (way, compiler)
    fast.compile(mode, buckets=Buckets([tight_shape(graph)], growth=None), compiler=compiler)
    return fast
