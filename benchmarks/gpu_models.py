"""Steps of the GPU campaign on the forward pass: blocks and batch sizes, and the ways to run one model."""

import contextlib
import copy
import time

import torch
from gpu_common import (
    Setting,
    Skip,
    Step,
    backends,
    by_turns_or_why,
    ceilings,
    forward_tflop,
    gate,
    make_model,
    median,
    on_backend,
    rates,
    ratio,
    reasons,
)

import ejmp
from ejmp.measure import bench
from ejmp.measure.flops import count_macs
from ejmp.measure.instruments import synchronize
from ejmp.model.precision import tf32_products

CHECKED = 4
"""Structures whose energies are compared with float64."""


def fastest(setting: Setting) -> str:
    """Return the backend that "auto" takes on the device, or in a dry run the one that runs quickly."""
    there = backends(setting)
    order = ("native", "reference") if setting.dry else ("triton", "native", "reference")
    return next(name for name in order if there[name] is None)


def peak_mib(setting: Setting, call) -> float | None:
    """Return the most memory a call holds beyond what is there before it; None on a CPU."""
    if setting.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(setting.device)
    before = torch.cuda.memory_allocated(setting.device)
    call()
    synchronize(setting.device)
    return (torch.cuda.max_memory_allocated(setting.device) - before) / 2**20


class Exact:
    """Energies of the first structures of every batch in float64, and their scale."""

    def __init__(self, setting: Setting, model: ejmp.JMP) -> None:
        self.structures = CHECKED
        double = on_backend(copy.deepcopy(model).double(), "reference")
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


# ---- blocks and batch sizes ----


@torch.no_grad()
def run_blocks(setting: Setting) -> None:
    """The block-count table in every precision, in batches of more and more structures, up to memory."""
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
                step.check()
                graph, sizes = setting.graph(structures), setting.sizes(structures)
                limits = ceilings(setting, graph.main.num_edges, [precision])
                worth_it(step, sum(forward_tflop(m.config, sizes) for m in models.values()), limits, precision)
            if len(found) > 2:
                step.add(found)
                lost.add(precision)
                continue
            step.result["ceilings"][f"{structures} {precision}"] = limits
            calls = {b: on_backend(model, backend, precision) for b, model in models.items()}
            one_batch(step, (structures, precision), calls, graph, (sizes, exact))
            if any(row.get("skipped") == "out of memory" for row in step.result["rows"][-len(counts) :]):
                lost.add(precision)


def worth_it(step: Step, tflop: float, limits: dict, precision: str) -> None:
    """Do nothing if five rounds at half the ceiling's rate fit into the time that is left.

    Raises:
        Skip: if they do not.
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
            gate(found, bench.GATE[precision])
            calls[b] = lambda m=model: m(graph)
        rows[b] = found
    seconds = min(4.0, max(0.5, step.left() / 10))
    times = by_turns_or_why(calls, setting, list(rows.values()), seconds=seconds)
    for b, found in rows.items():
        with step.row(precision=precision, structures=structures, blocks=b) as row:
            row.update(found)
            if b not in times:
                continue
            row["ms"], row["samples"] = median(times[b]), len(times[b])
            row.update(rates(forward_tflop(models[b].config, sizes), row["ms"], precision, limits))
            seconds = 1e-3 * row["ms"]
            row.update({"structures_per_s": structures / seconds, "atoms_per_s": sizes.atoms / seconds})
            row.update({"edges": sizes.edges, "edges_per_s": sizes.edges / seconds})
            row["gmac"] = 1e-9 * sum(count_macs(models[b].config, sizes).values())
            row["parameters"] = sum(p.numel() for p in models[b].parameters())
            most = max(times)
            row["x_of_most"] = ratio(times[most], times[b])
            row["most_blocks"] = most
            if most == 6:
                row["published_x"] = bench.PUBLISHED_THROUGHPUT[b]


# ---- ways to run one model ----


def run_compare(setting: Setting) -> None:
    """One batch through every way to run the model, by turns; "of_as_shipped" is against eager fp16 autocast."""
    structures = 1 if setting.dry else 17
    graph, sizes = setting.graph(structures), setting.sizes(structures)
    wanted = ["fp32"] if setting.dry else [p for p in ("bf16", "fp16", "tf32", "fp32") if p in setting.precisions]
    limits = ceilings(setting, graph.main.num_edges, wanted)
    about = {"model": setting.model_name, "structures": structures, "edges": sizes.edges, "error_means": ERROR}
    step = Step("compare", setting, ceilings=limits, as_shipped="reference fp16", **about)
    model = make_model(setting, 1 if setting.dry else 6)
    exact, tflop = Exact(setting, model), forward_tflop(model.config, sizes)
    for precision in wanted:
        compare_one(step, precision, (model, graph, exact), (tflop, sizes.edges))


def compare_one(step: Step, precision: str, known: tuple, work: tuple[float, int]) -> None:
    """Add a row per way to run the model, all timed by turns with JMP as it was shipped: eager, fp16 autocast."""
    setting, (model, graph, exact), (tflop, edges) = step.setting, known, work
    calls, rows, first = {}, [], {}
    for way in WAYS:
        found: dict = {"precision": precision, "way": way}
        rows.append(found)
        with reasons(found), torch.no_grad():
            step.check()
            if way in COMPILED and not setting.dry and step.left() < 45:
                raise Skip(f"{step.left():.0f} s are left, too few to compile it")
            start = time.perf_counter()
            call = prepare(setting, model, way, precision)
            energy = call(graph).energy
            synchronize(setting.device)
            found["first_call_s"] = time.perf_counter() - start
            found["error"] = exact.error(energy)
            gate(found, bench.GATE[precision])
            found["peak_mib"] = peak_mib(setting, lambda c=call: c(graph))
            calls[way], first[way] = (lambda c=call: c(graph)), 1e3 * found["first_call_s"]
    if calls and "fp16" in step.result["ceilings"]["gemm_tflops"]:
        eager = on_backend(model, "reference", "fp16")
        calls["as shipped"] = lambda: eager(graph)
    with torch.no_grad():
        times = by_turns_or_why(calls, setting, rows, seconds=4.0, first=first)
    for found in rows:
        with step.row(**found) as row:
            mine = times.get(row["way"])
            if mine is None:
                continue
            row["ms"], row["samples"] = median(mine), len(mine)
            row.update(rates(tflop, row["ms"], precision, step.result["ceilings"]))
            row["edges_per_s"] = edges / (1e-3 * row["ms"])
            others = [other for other in ("as shipped", "reference", "torch.compile(reference)") if other in times]
            row.update({f"x of {other}": ratio(times[other], mine) for other in others})


WAYS = (
    "reference",
    "native",
    "triton",
    "throughput",
    "latency",
    "torch.compile(reference)",
)
"""The compiled ones come last: if time is short, they are left out."""
COMPILED = WAYS[3:]


def prepare(setting: Setting, model: ejmp.JMP, way: str, precision: str):
    """Return a function of a graph.

    Raises:
        Skip: if the installation cannot do it.
    """
    there = backends(setting)
    if way in there:
        if there[way] is not None:
            raise Skip(there[way])
        return on_backend(model, way, precision)
    if way == "torch.compile(reference)":
        eager = on_backend(model, "reference", precision)
        traced = torch.compile(eager.plain, backend="aot_eager" if setting.dry else "inductor")

        def compiled(graph):
            with tf32_products() if precision == "tf32" else contextlib.nullcontext():
                return traced(graph)

        return compiled
    if way == "latency" and setting.device.type != "cuda":
        raise Skip("CUDA graphs need a GPU")
    fast = on_backend(model, fastest(setting), precision)
    fast.compile(way, compiler="aot_eager" if setting.dry else "inductor")
    return fast
