"""Every native op beside its plain-torch specification, by turns in one run, against the machine's ceilings.

    pytest benchmarks/bench_kernels.py --benchmark-only [--structures PATH] [--select GLOB] [--benchmark-json FILE]

Sizes are JMP-L's. `speedup` is the median over rounds of reference time / native time, for the same inputs. The
reference model makes its tables of neighbours and spherical functions once for all blocks; `speedup_over_shared` is
against that: the specification gets its tables ready-made and its gradients stop at them, while the native op evaluates
the angles itself and its gradients go on to the vectors.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ejmp
from ejmp.measure import bench
from ejmp.measure.memory import peak_memory
from ejmp.measure.rates import copy_rate, gemm_rates
from ejmp.measure.timing import Rounds, by_turns, median_ratio
from ejmp_kernels import specification
from ejmp_kernels.activation import activate, swap_add
from ejmp_kernels.atom_sum import atom_sum
from ejmp_kernels.edge_embedding import gather_add
from ejmp_kernels.linear import linear
from ejmp_kernels.pair import pair
from ejmp_kernels.quadruplet import quadruplet
from ejmp_kernels.radial import radial
from ejmp_kernels.triplet import triplet

CPU = torch.device("cpu")
SIZES = ejmp.jmp_l()


@dataclasses.dataclass
class Case:
    """One op: its inputs, the call with a backend, the specification, and the latter on ready-made tables."""

    inputs: list
    call: Callable
    spec: Callable
    shared: Callable | None = None
    shared_inputs: list | None = None

    @property
    def native(self):
        return functools.partial(self.call, backend="native")


DEVICE = CPU
"""Where inputs are made; the GPU campaign sets it, and SIZES in its dry run."""


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(sum(shape)), device=DEVICE)


def make_triplet(out, into, *, to_atoms=False):
    def make(graph):
        a, b = getattr(graph, out), getattr(graph, into)
        x = randn(b.num_edges, SIZES.emb_size_trip_in)
        w = randn(a.num_edges, SIZES.emb_size_cbf, SIZES.num_spherical)
        found = specification.triplets(a, b, SIZES.num_spherical)

        def call(function):
            def run(x, w, v_out, v_in, **backend):
                edges = [dataclasses.replace(e, vector=v) for e, v in ((a, v_out), (b, v_in))]
                return function(x, w, *edges, to_atoms=to_atoms, **backend)

            return run

        def shared(x, w, angular):
            summed = specification.triplet_sum(x, w, found.table, angular)
            return specification.segment_sum(summed, a.target, graph.num_atoms) if to_atoms else summed

        inputs = [x, w, a.vector, b.vector]
        return Case(inputs, call(triplet), call(specification.triplet), shared, [x, w, found.angular])

    return make


def make_quadruplet(graph):
    main, middle, S = graph.main, graph.quad_edges, SIZES.num_spherical
    x, filters = randn(main.num_edges, SIZES.emb_size_quad_in), randn(middle.num_edges, S, SIZES.emb_size_quad_in)
    w = randn(main.num_edges, SIZES.emb_size_sbf, S**2)
    found = specification.quadruplets(main, middle, S)

    def call(function):
        def run(x, filters, w, v, v_middle, **backend):
            edges = [dataclasses.replace(e, vector=u) for e, u in ((main, v), (middle, v_middle))]
            return function(x, filters, w, *edges, **backend)

        return run

    def shared(x, filters, w, circular, angular):
        values = specification.gather(x, found.inputs) * (circular.mT @ filters) * found.inputs_valid[..., None]
        return specification.quadruplet_sum(values, w, found.middles, angular)

    inputs = [x, filters, w, main.vector, middle.vector]
    ready = [x, filters, w, found.circular.contiguous(), found.angular]
    return Case(inputs, call(quadruplet), call(specification.quadruplet), shared, ready)


def make_pair(graph):
    edges = graph.atom_pairs
    inputs = [randn(graph.num_atoms, SIZES.emb_size_pair_in), randn(edges.num_edges, SIZES.emb_size_rbf)]
    table = specification.neighbor_table(
        torch.arange(graph.num_atoms, device=edges.ptr.device), edges.ptr, edges.max_degree
    )
    return Case(
        inputs,
        lambda h, r, backend: pair(h, r, edges.ptr, edges.source, backend=backend),
        lambda h, r: specification.pair_sum(h, r, edges.source, table),
    )


def make_radial(graph):
    """The radial basis of pairs, projected."""
    R = SIZES.num_radial
    offset = torch.linspace(0, 1, R).to(graph.device, graph.dtype)
    temps = torch.full_like(offset, 0.5 * (R - 1) ** 2)
    return Case(
        [graph.atom_pairs.distance, randn(R, SIZES.emb_size_rbf)],
        lambda d, w, backend: radial(d, offset, temps, w, 12.0, 5, backend=backend),
        lambda d, w: specification.gaussian_basis(d, offset, temps, 12.0, 5) @ w,
    )


def make_pair_from_distances(graph):
    """Sum over pairs with the radial basis on the fly."""
    sums, basis = make_pair(graph), make_radial(graph)
    return Case(
        [sums.inputs[0], *basis.inputs],
        lambda h, d, w, backend: sums.call(h, basis.call(d, w, backend=backend), backend=backend),
        lambda h, d, w: sums.spec(h, basis.spec(d, w)),
    )


def make_atom_sum(graph):
    edges, M = graph.main, SIZES.emb_size_edge
    return Case(
        [randn(edges.num_edges, M), randn(edges.num_edges, M)],
        lambda m, f, backend: atom_sum(m, f, edges.ptr, backend=backend),
        lambda m, f: specification.atom_sum(m, f, edges.target, graph.num_atoms),
    )


def make_gather_add(graph):
    edges, M = graph.main, SIZES.emb_size_edge
    return Case(
        [randn(edges.num_edges, M), randn(graph.num_atoms, M), randn(graph.num_atoms, M)],
        lambda x, a, b, backend: gather_add(x, a, b, edges.source, edges.swap, edges.ptr, backend=backend),
        lambda x, a, b: specification.gather_add(x, a, b, edges.source, edges.target),
    )


def make_activate(graph):
    """The end of a residual layer."""
    shape = (graph.main.num_edges, SIZES.emb_size_edge)
    return Case(
        [randn(*shape), randn(*shape)],
        lambda x, r, backend: activate(x, add=r, scale=0.7, add_scale=0.7, backend=backend),
        lambda x, r: specification.activate(x, add=r, scale=0.7, add_scale=0.7),
    )


def make_swap_add(graph):
    edges, M = graph.main, SIZES.emb_size_edge
    return Case(
        [randn(edges.num_edges, 2 * M), randn(edges.num_edges, M)],
        lambda x, a, backend: swap_add(x, edges.swap, a, backend=backend),
        lambda x, a: specification.swap_add(x, edges.swap, a),
    )


def make_linear(graph):
    M = SIZES.emb_size_edge
    return Case([randn(graph.main.num_edges, M), randn(M, M)], linear, torch.nn.functional.linear)


OPS = {
    "edge_to_edge": make_triplet("main", "main"),
    "atom_to_edge": make_triplet("main", "atom_edges"),
    "edge_to_atom": make_triplet("atom_edges", "main", to_atoms=True),
    "quadruplet": make_quadruplet,
    "pair": make_pair,
    "radial": make_radial,
    "pair_from_distances": make_pair_from_distances,
    "atom_sum": make_atom_sum,
    "gather_add": make_gather_add,
    "activate": make_activate,
    "swap_add": make_swap_add,
    "linear": make_linear,
}


def forward(function, inputs):
    """Return a call without gradients, and nothing to keep."""

    def call():
        with torch.no_grad():
            return [function(*inputs)]

    return call


def backward(function, inputs):
    """Return a call of the gradients alone."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    grad = randn(*out.shape).to(out)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def second(function, inputs):
    """Return a call of the gradients' gradients alone."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    grad = randn(*out.shape).to(out).requires_grad_()
    first = torch.autograd.grad(out, inputs, grad, create_graph=True)
    along = [randn(*g.shape).to(g) for g in first]
    connected = [(g, u) for g, u in zip(first, along, strict=True) if g.requires_grad]
    if not connected:
        pytest.skip("the op is linear: there is no second derivative")
    gs, us = zip(*connected, strict=True)
    return lambda: torch.autograd.grad(gs, [grad, *inputs], us, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("order", [forward, backward, second], ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", OPS)
def bench_op(benchmark, provenance, workload, op, order):
    graph = bench.workload_graph(workload)
    case = OPS[op](graph)
    with torch.no_grad():
        value, expected = case.native(*case.inputs), case.spec(*case.inputs)
    assert (value - expected).abs().max() <= 1e-4 * expected.abs().max()
    native, spec = order(case.native, case.inputs), order(case.spec, case.inputs)
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
    if case.shared is not None:
        ready = compare(order(case.shared, case.shared_inputs), native)
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


def grow_edge_to_edge(graph):
    main = graph.main
    x, w = randn(main.num_edges, SIZES.emb_size_trip_in), randn(main.num_edges, SIZES.emb_size_cbf, SIZES.num_spherical)
    return lambda: triplet(x, w, main, main)


def grow_quadruplet(graph):
    """With an eighth of the basis, which keeps 5,000 atoms in memory."""
    main, middle, C, S = graph.main, graph.quad_edges, SIZES.emb_size_quad_in, SIZES.num_spherical
    x, filters = randn(main.num_edges, C), randn(middle.num_edges, S, C)
    w = randn(main.num_edges, SIZES.emb_size_sbf // 8, S**2)
    return lambda: quadruplet(x, filters, w, main, middle)


def grow_pair(graph):
    edges = graph.atom_pairs
    h, r = randn(graph.num_atoms, SIZES.emb_size_pair_in), randn(edges.num_edges, SIZES.emb_size_rbf)
    return lambda: pair(h, r, edges.ptr, edges.source)


@pytest.mark.parametrize("num_atoms", [100, 200, 500, 1000, 2000, 5000])
@pytest.mark.parametrize("make", [grow_edge_to_edge, grow_quadruplet, grow_pair], ids=lambda f: f.__name__)
def bench_growth(benchmark, provenance, make, num_atoms):
    """Cost per atom at constant density."""
    from bench_graph import sodium_chloride

    graph = ejmp.build_graph(sodium_chloride(num_atoms), 12.0, 30)
    benchmark.pedantic(make(graph), rounds=5, warmup_rounds=1)
    microseconds = 1e6 * benchmark.stats.stats.median
    provenance |= {"op": make.__name__, "atoms": graph.num_atoms, "us_per_atom": microseconds / graph.num_atoms}
