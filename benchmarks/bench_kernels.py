"""Every native op beside its plain-torch specification, by turns in one run, against the machine's ceilings.

    pytest benchmarks/bench_kernels.py --full --benchmark-only [--structures PATH] [--select GLOB]
        [--benchmark-json FILE]

Sizes are JMP-L's. `speedup` is the median over rounds of reference time / native time, for the same inputs. The
reference model makes its tables of neighbours and spherical functions once for all blocks; `speedup_over_shared` is
against that: the specification gets its tables ready-made and its gradients stop at them, while the native op evaluates
the angles itself and its gradients go on to the vectors.
"""

import dataclasses
import functools
import statistics

import op_cases
import pytest
import torch
from op_cases import CASES, TRIPLETS, LinearOpError, backward, forward, model_sizes
from torch.utils.flop_counter import FlopCounterMode

import ejmp
from ejmp.measure import bench
from ejmp.measure.memory import peak_memory
from ejmp.measure.rates import copy_rate, gemm_rates
from ejmp.measure.timing import Rounds, by_turns, median_ratio
from ejmp_kernels import specification

CPU = torch.device("cpu")
SIZES = model_sizes(ejmp.jmp_l())
OPS = {
    "edge_to_edge": "edge_to_edge",
    "atom_to_edge": "atom_to_edge",
    "edge_to_atom": "edge_to_atom",
    "quadruplet": "quadruplet",
    "pair": "pair",
    "radial": "radial",
    "pair_from_distances": "pair_from_distances",
    "atom_sum": "atom_sum",
    "gather_add": "gather_add",
    "activate": "activate_residual",
    "swap_add": "swap_add_to",
    "linear": "linear",
}
"""Names of the cases in `op_cases.CASES` that are measured, by the name of the op in results."""


def make_case(op, graph, sizes=SIZES):
    """Make the case of an op in float32, or in float64 if the graph is."""
    return CASES[OPS[op]](graph, sizes, graph.dtype)


def on_shared_tables(op, graph, case):
    """Return the specification on ready-made tables and its inputs, or None for an op without tables."""
    if op in TRIPLETS:
        *sets, to_atoms = TRIPLETS[op]
        out, into = (getattr(graph, name) for name in sets)
        x, w, *_ = case.inputs
        found = specification.triplets(out, into, w.shape[2])

        def triplets(x, w, angular):
            summed = specification.triplet_sum(x, w, found.table, angular)
            return specification.segment_sum(summed, out.target, graph.num_atoms) if to_atoms else summed

        return triplets, [x, w, found.angular]
    if op == "quadruplet":
        x, filters, w, *_ = case.inputs
        found = specification.quadruplets(graph.main, graph.quad_edges, filters.shape[1])

        def quadruplets(x, filters, w, circular, angular):
            values = specification.gather(x, found.inputs) * (circular.mT @ filters) * found.inputs_valid[..., None]
            return specification.quadruplet_sum(values, w, found.middles, angular)

        return quadruplets, [x, filters, w, found.circular.contiguous(), found.angular]
    return None


def second(function, inputs):
    """Return a call of the gradients' gradients alone; an op without them is skipped."""
    try:
        return op_cases.second(function, inputs)
    except LinearOpError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("order", [forward, backward, second], ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", OPS)
def bench_op(benchmark, provenance, workload, op, order):
    graph = bench.workload_graph(workload)
    case = make_case(op, graph)
    call = functools.partial(case.call, backend="native")
    with torch.no_grad():
        value, expected = call(*case.inputs), case.spec(*case.inputs)
    assert (value - expected).abs().max() <= 1e-4 * expected.abs().max()
    native, spec = order(call, case.inputs), order(case.spec, case.inputs)
    with FlopCounterMode(display=False) as counter:
        out = native()
    found = compare(spec, native)
    seconds = found["ms"] / 1e3
    gflop = 1e-9 * counter.get_total_flops()
    gbytes = 1e-9 * sum(x.nbytes for x in (*case.inputs, *out) if x is not None)
    provenance |= found | {
        "op": op,
        "edges": graph.main.num_edges,
        "gflops": gflop / seconds,
        "gbytes_per_s": gbytes / seconds,
        "share_of_gemm_rate": gflop / seconds / max(gemm_rates(graph.main.num_edges, ["fp32"], CPU).values()),
        "share_of_copy_rate": gbytes / seconds / copy_rate(CPU),
        "peak_mib": peak_memory(native, CPU, case.inputs) / 2**20,
        "reference_peak_mib": peak_memory(spec, CPU, case.inputs) / 2**20,
    }
    shared = on_shared_tables(op, graph, case)
    if shared is not None:
        ready = compare(order(*shared), native)
        provenance |= {"speedup_over_shared": ready["speedup"], "shared_reference_ms": ready["reference_ms"]}
    benchmark.pedantic(native, rounds=5)


def compare(spec, native):
    """Time an op and its specification by turns; return the milliseconds of both and their ratio."""
    seconds = by_turns({"reference": spec, "native": native}, CPU, Rounds(least=7))
    return {
        "ms": 1e3 * statistics.median(seconds["native"]),
        "reference_ms": 1e3 * statistics.median(seconds["reference"]),
        "speedup": median_ratio(seconds["reference"], seconds["native"]),
    }


EIGHTH = dataclasses.replace(SIZES, quadruplet=(SIZES.quadruplet[0], SIZES.quadruplet[1] // 8, SIZES.quadruplet[2]))
GROWING = {"edge_to_edge": SIZES, "quadruplet": EIGHTH, "pair": SIZES}
"""Ops whose cost per atom is measured, and sizes: an eighth of the quadruplets' basis keeps 5,000 atoms in memory."""


@pytest.mark.parametrize("num_atoms", [100, 200, 500, 1000, 2000, 5000])
@pytest.mark.parametrize("op", GROWING)
def bench_growth(benchmark, provenance, op, num_atoms):
    """Measure the cost per atom at constant density."""
    from bench_graph import sodium_chloride

    graph = ejmp.build_graph(sodium_chloride(num_atoms), 12.0, 30)
    case = make_case(op, graph, GROWING[op])
    benchmark.pedantic(functools.partial(case.call, *case.inputs, backend="native"), rounds=5, warmup_rounds=1)
    microseconds = 1e6 * benchmark.stats.stats.median
    provenance |= {"op": f"grow_{op}", "atoms": graph.num_atoms, "us_per_atom": microseconds / graph.num_atoms}
