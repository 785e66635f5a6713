"""Steps of the GPU campaign on parts: matrix products and copies, every op on every backend, the dense chain."""

import copy
import functools
import itertools
import time
from collections.abc import Callable
from statistics import median

import bench_kernels
import pytest
import torch
from gpu_setting import Setting
from gpu_step import Skip, Step, reasons, require_error
from gpu_timing import backends, ceilings, error_of, milliseconds, milliseconds_or_why, rate_and_shares
from op_cases import Case, model_sizes
from torch.utils.flop_counter import FlopCounterMode

from ejmp.measure import datasheets
from ejmp.measure.rates import copy_rate, gemm_rates
from ejmp.measure.timing import median_ratio
from ejmp.model.backend import why_unavailable
from ejmp.model.layers import INV_SQRT_2, Residual
from ejmp.model.precision import LOW_PRECISION
from ejmp.model.precision import products as products_at
from ejmp_kernels.dense import linear_activate

FEATURES = {
    "edge_to_edge": (0,),
    "atom_to_edge": (0,),
    "edge_to_atom": (0,),
    "quadruplet": (0,),
    "pair": (0,),
    "atom_sum": (0, 1),
    "gather_add": (0,),
    "activate": (0, 1),
    "swap_add": (0, 1),
    "linear": (0, 1),
}
"""Positions of an op's inputs that are in the low type in a low-precision model; other ops do not exist in one."""
WIDENED = ("edge_to_edge", "atom_to_edge", "edge_to_atom", "quadruplet", "pair")
"""Ops before which the native and the reference backend convert features to float32, as the models do."""
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
"""Largest allowed error of an op's results, over the largest value, by precision."""
ORDERS = {"forward": bench_kernels.forward, "backward": bench_kernels.backward, "second": bench_kernels.second}


def run_ceilings(setting: Setting) -> None:
    """Measure the machine's own rates at the model's shapes; every other row is held against these."""
    step = Step("ceilings", setting)
    width = setting.config.emb_size_edge
    for rows in (64,) if setting.dry else (8192, 32768, 131072):
        for out in (width, 4 * width):
            for precision in setting.precisions:
                with step.row(what="product", precision=precision, shape=f"({rows}, {out}, {width})") as row:
                    step.require_time()
                    found = gemm_rates(rows, [precision], setting.device, sizes=(out, width))
                    tflops = 1e-3 * max(found.values())
                    peak = datasheets.peak_tflops(setting.device, precision)
                    row.update({"tflops": tflops, "ms": 2e-9 * rows * out * width / tflops, "gemm_share": 1.0})
                    row.update(
                        {"mfu": None if peak is None else tflops / peak, "error": product_error(setting, precision)}
                    )
    with step.row(what="copy") as row:
        step.require_time()
        size = 1 << 22 if setting.dry else 1 << 31
        found = copy_rate(setting.device, size)
        card = datasheets.card_of(setting.device)
        row.update({"gbytes_per_s": found, "ms": 2e-6 * size / found, "copy_share": 1.0, "error": 0.0})
        row["share_of_datasheet"] = None if card is None else found / card.gbytes_per_s


def product_error(setting: Setting, precision: str) -> float:
    """Return the error of a product of 512 rows against float64, from operands of the type itself."""
    width, dtype = setting.config.emb_size_edge, LOW_PRECISION.get(precision, torch.float32)
    x, w = (torch.randn(n, width, device=setting.device, dtype=dtype) for n in (512, width))
    with products_at(precision), torch.no_grad():
        return error_of(torch.nn.functional.linear(x, w), torch.nn.functional.linear(x.double(), w.double()))


class Inputs:
    """The case of every op on every graph, made once.

    Args:
        setting: where the campaign runs.
        **graphs: the graphs by name.
    """

    def __init__(self, setting: Setting, **graphs) -> None:
        self.graphs, self.sizes = graphs, model_sizes(setting.config)
        self.cases: dict = {}

    def case(self, op: str, graph: str) -> Case:
        if (op, graph) not in self.cases:
            self.cases[op, graph] = bench_kernels.make_case(op, self.graphs[graph], self.sizes)
        return self.cases[op, graph]

    def contestant(self, op: str, graph: str, precision: str, backend: str):
        """Return an op of a backend, and inputs of the types that a model of the precision gives it."""
        case, low = self.case(op, graph), LOW_PRECISION.get(precision)
        inputs = case.inputs
        if low is not None:
            inputs = [x.to(low) if i in FEATURES[op] else x for i, x in enumerate(inputs)]
        function = case.spec if backend == "reference" else functools.partial(case.call, backend=backend)
        if low is not None and backend != "triton" and op in WIDENED:
            return (lambda x, *rest: function(x.float(), *rest)), inputs
        return function, inputs

    def checked(self, op: str, order: str, precision: str, backend: str):
        """Run an op on the small graph; return its largest error against float64, and the call that was run."""
        function, inputs = self.contestant(op, "small", precision, backend)
        exact = ORDERS[order](self.case(op, "double").spec, [x.double() for x in inputs])()
        call = ORDERS[order](function, inputs)
        pairs = [(f, e) for f, e in zip(call(), exact, strict=True) if f is not None and e is not None]
        return max(error_of(f, e) for f, e in pairs), call


def run_ops(setting: Setting) -> None:
    """Check every op, backend and derivative on a small graph against float64, then time it on a large one."""
    small = setting.graph(1)
    graph = small if setting.dry else setting.graph(17)
    inputs = Inputs(setting, small=small, double=small.to(dtype=torch.float64), large=graph)
    limits = ceilings(setting, graph.main.num_edges)
    step = Step("ops", setting, ceilings=limits, edges=graph.main.num_edges, atoms=graph.num_atoms)
    there = backends(setting)
    for precision in [p for p in ("bf16", "fp32", "fp16") if p in setting.precisions]:
        for order, op in itertools.product(ORDERS, bench_kernels.OPS):
            if precision == "fp32" or op in FEATURES:
                one_op(step, (op, order, precision), there, inputs)


def one_op(step: Step, key: tuple[str, str, str], there: dict, inputs: Inputs) -> None:
    """Add a row per backend."""
    op, order, precision = key
    setting, limits, reference_ms = step.setting, step.result["ceilings"], None
    for name, why in reversed(there.items()):
        with step.row(op=op, order=order, precision=precision, backend=name) as row:
            step.require_time()
            if why is not None:
                raise Skip(why)
            try:
                row["error"], call = inputs.checked(op, order, precision, name)
            except pytest.skip.Exception as reason:
                raise Skip(str(reason)) from None
            require_error(row, TOLERANCE[precision])
            function, values = inputs.contestant(op, "large", precision, name)
            if not setting.dry:  # where the small graph is the large one
                call = ORDERS[order](function, values)
            start = time.perf_counter()
            with FlopCounterMode(display=False) as counter:
                out = call()
            first = {name: 1e3 * (time.perf_counter() - start)}
            row["ms"] = median(milliseconds({name: call}, setting, seconds=0.2, flush=True, first=first)[name])
            gbytes = 1e-9 * sum(x.nbytes for x in (*values, *out) if x is not None)
            row.update(rate_and_shares(1e-12 * counter.get_total_flops(), row["ms"], precision, limits))
            row["gbytes_per_s"] = gbytes / (1e-3 * row["ms"])
            row["copy_share"] = row["gbytes_per_s"] / limits["copy_gbytes_per_s"]
            reference_ms = row["ms"] if name == "reference" else reference_ms
            if reference_ms is not None:
                row["x of reference"] = reference_ms / row["ms"]


def run_chain(setting: Setting) -> None:
    """Time residual layers in a row on (32768, 1024): what comes after the products, beside the bare products."""
    rows, width, layers = (64 if setting.dry else 32768), setting.config.emb_size_edge, (1 if setting.dry else 5)
    limits = ceilings(setting, rows)
    step = Step("chain", setting, ceilings=limits, rows_of_x=rows, width=width, products=2 * layers)
    torch.manual_seed(0)
    chain = torch.nn.Sequential(*(Residual(width) for _ in range(layers))).to(setting.device)
    x = torch.randn(rows, width, device=setting.device)
    with torch.no_grad():
        exact = copy.deepcopy(chain).double()(x[:256].double())
        for precision in setting.precisions:
            calls, left_out = chain_calls(setting, chain, x, precision)
            found: list[dict] = []
            for name, call in list(calls.items()):
                row: dict = {"precision": precision, "contestant": name}
                found.append(row)
                with reasons(row):
                    step.require_time()
                    if name != "products":
                        row["error"] = error_of(call()[:256], exact)
                        require_error(row, TOLERANCE.get(precision, TOLERANCE["fp16"]))
                if "skipped" in row or "failed" in row:
                    del calls[name]
            found += [{"precision": precision, "contestant": n, "skipped": why} for n, why in left_out.items()]
            times = milliseconds_or_why(calls, setting, found, seconds=1.0)
            tflop = 2e-12 * rows * width * width * 2 * layers
            for about in found:
                with step.row(**about) as row:
                    samples = times.get(row["contestant"])
                    if samples is not None:
                        row.update(rate_and_shares(tflop, median(samples), precision, limits) | {"ms": median(samples)})
                        row["of_products"] = median_ratio(times["products"], samples)


def chain_calls(setting: Setting, chain: torch.nn.Sequential, x: torch.Tensor, precision: str) -> tuple[dict, dict]:
    """Return the contestants by name, and the reasons of those that cannot run; "products" does nothing else."""
    low = LOW_PRECISION.get(precision, torch.float32)
    weights = [[d.linear.weight.to(low) for d in layer.dense_mlp] for layer in chain]
    same = copy.deepcopy(chain).to(low)
    y = x.to(low)

    def products():
        out = y
        for pair in weights:
            for weight in pair:
                out = torch.nn.functional.linear(out, weight)
        return out

    def fused(backend):
        out = y
        for first, second in weights:
            middle = linear_activate(out, first, backend=backend)
            out = linear_activate(middle, second, add=out, scale=INV_SQRT_2, add_scale=INV_SQRT_2, backend=backend)
        return out

    def within(call):
        def run(*arguments):
            with products_at(precision), torch.no_grad():
                return call(*arguments)

        return run

    compiled = torch.compile(same, backend="aot_eager" if setting.dry else "inductor")
    calls = {"products": products, "eager": lambda: same(y), "torch.compile": lambda: compiled(y)}
    left_out = {}
    for backend in ("native", "triton"):
        why = backends(setting)[backend] or why_unavailable(backend, setting.device.type, low)
        if why is None:
            calls[backend] = functools.partial(fused, backend)
        else:
            left_out[backend] = why
    calls |= second_products(calls, y)
    return {name: within(call) for name, call in calls.items()}, left_out


def second_products(calls: dict[str, Callable], y: torch.Tensor) -> dict[str, Callable]:
    """Return Triton's call again with the second kernel for products, which is for 16 bits and sm_90."""
    if "triton" not in calls or y.dtype == torch.float32:
        return {}
    from ejmp_kernels.triton_kernels import launch  # only where Triton is

    def call() -> torch.Tensor:
        with launch.overriding("linear_activate", {"SPECIALIZED": True}):
            return calls["triton"]()

    return {"triton, warps with different tasks": call} if launch.config("linear_activate", y)["TMA"] else {}
