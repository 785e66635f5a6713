"""Every op, every number of blocks and graph building, at small sizes: the suite that runs without `--full`.

    pytest benchmarks/ --benchmark-only [--benchmark-json FILE]

A crystal of 64 atoms at JMP-S's sizes for ops, and one of 8 atoms for models of 64 atom and 128 edge channels. Times
are by turns with plain torch; each result is compared with float64 first. For JMP-L on real structures: `--full`.
"""

import copy
import dataclasses
import functools

import pytest
import torch
from op_cases import CASES, ORDERS, LinearOpError, model_sizes
from torch.utils.flop_counter import FlopCounterMode

import ejmp
from ejmp.compress.pruning import prune
from ejmp.measure import bench, workloads
from ejmp.measure.flops import count_macs, graph_sizes
from ejmp.measure.memory import peak_memory, tensors_of
from ejmp.measure.rates import copy_rate, gemm_rates
from ejmp.measure.timing import Rounds, by_turns
from ejmp.track import machine
from ejmp.track.schema import Record

CPU = torch.device("cpu")
ROUNDS = Rounds(least=5)
BLOCKS = (6, 5, 4, 3, 2)
ALLOWED = 1e-3
"""Largest error against float64, over the largest value."""


@pytest.fixture(scope="session")
def graphs():
    """The graph of a crystal in float32 and float64, by type."""
    structures = workloads.rocksalt().structures
    return {t: ejmp.build_graph(structures, 6.0, 20, dtype=t) for t in (torch.float32, torch.float64)}


@pytest.fixture(scope="session")
def product_gflops():
    return max(gemm_rates(1024, ["fp32"], CPU, sizes=(512, 512)).values())


@pytest.fixture(scope="session")
def models():
    torch.manual_seed(0)
    config = dataclasses.replace(ejmp.jmp_l(scalar=True), emb_size_atom=64, emb_size_edge=128)
    full = ejmp.JMP(config).eval()
    return {blocks: full if blocks == max(BLOCKS) else prune(full, blocks=blocks) for blocks in BLOCKS}


def largest_error(found, exact):
    """Return the largest difference of two lists of tensors, over the largest value of each pair."""
    pairs = [(f, e) for f, e in zip(found, exact, strict=True) if f is not None and e is not None]
    return max(((f.double() - e).abs().max() / e.abs().max().clamp(min=1e-300)).item() for f, e in pairs)


def note(benchmark, provenance, native, reference, **fields):
    """Time two calls by turns, and note the record of them."""
    seconds = by_turns({"native": native, "reference": reference}, CPU, ROUNDS)
    record = Record(
        suite="quick",
        seconds=tuple(seconds["native"]),
        reference_seconds=tuple(seconds["reference"]),
        machine=machine.describe(),
        commit=provenance["commit"].removesuffix("-dirty"),
        dirty=provenance["commit"].endswith("-dirty"),
        date=provenance["date"],
        backend="native",
        state=machine.state(),
        versions={name: provenance[name] for name in ("ejmp", "python")},
        **fields,
    )
    provenance |= {"speedup": record.speedup, "record": record.to_dict()}
    benchmark.pedantic(native, rounds=3)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("op", CASES)
def bench_op(benchmark, provenance, graphs, product_gflops, op, order):
    sizes, of_order = model_sizes(ejmp.jmp_s()), ORDERS[order]
    graph = graphs[torch.float32]
    case, exact = (CASES[op](graphs[dtype], sizes, dtype) for dtype in graphs)
    try:
        native = of_order(functools.partial(case.call, backend="native"), case.inputs)
    except LinearOpError as reason:
        pytest.skip(str(reason))
    error = largest_error(native(), of_order(exact.spec, [x.double() for x in case.inputs])())
    assert error <= ALLOWED
    with FlopCounterMode(display=False) as counter:
        out = native()
    traffic = sum(x.nbytes for x in (*case.inputs, *out) if x is not None)
    fields = {
        "name": f"{op}/{order}",
        "sizes": {"atoms": graph.num_atoms, "edges": graph.main.num_edges},
        "error": error,
        "gflop": 1e-9 * counter.get_total_flops(),
        "gbytes": 1e-9 * traffic,
        "copy_gbytes_per_s": copy_rate(CPU, traffic // 2, repeats=20),  # of as much, which may fit into a cache
        "product_gflops": product_gflops,
        "peak_bytes": peak_memory(native, CPU, case.inputs),
    }
    note(benchmark, provenance, native, of_order(case.spec, case.inputs), **fields)


@pytest.mark.parametrize("blocks", BLOCKS)
def bench_model(benchmark, provenance, models, product_gflops, blocks):
    model, graph = models[blocks], ejmp.build_graph(workloads.rocksalt(repeats=1).structures, 6.0, 20)
    reference = model.on(backend="reference")
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(graph.to(dtype=torch.float64)).energy
        error = largest_error([model(graph).energy], [exact])
    assert error <= ALLOWED
    call = functools.partial(bench.forward_pass, model, graph)
    fields = {
        "name": f"model/{blocks}-blocks",
        "sizes": {"blocks": blocks, "atoms": graph.num_atoms, "edges": graph.main.num_edges},
        "error": error,
        "gflop": 2e-9 * sum(count_macs(model.config, graph_sizes(graph)).values()),
        "product_gflops": product_gflops,
        "peak_bytes": peak_memory(call, CPU, tensors_of(model, graph)),
    }
    note(benchmark, provenance, call, functools.partial(bench.forward_pass, reference, graph), **fields)


def bench_graph(benchmark, provenance, product_gflops):
    structures = workloads.rocksalt().structures
    build = functools.partial(ejmp.build_graph, structures, 6.0, 20)
    reference = functools.partial(build, backend="reference")
    found, exact = build(), reference()
    assert torch.equal(found.main.source, exact.main.source)
    fields = {"name": "graph/build", "sizes": {"atoms": found.num_atoms}, "product_gflops": product_gflops}
    note(benchmark, provenance, build, reference, **fields)
