"""One forward pass by number of blocks. Graph building is timed on its own, below.

    pytest benchmarks/ --full --benchmark-only [--structures PATH] [--small] [--benchmark-json FILE]

`make bench` runs the same measurement with all block counts interleaved, which a noisy machine needs for ratios.
"""

import functools

import pytest
import torch

from ejmp.measure import bench
from ejmp.measure.flops import graph_sizes
from ejmp.measure.memory import peak_memory, tensors_of
from ejmp.measure.rates import gemm_rates
from ejmp.model.jmp import gradient_forces


@pytest.mark.parametrize("blocks", [6, 5, 4, 3, 2])
def bench_forward(benchmark, provenance, models, workload, machine, blocks):
    device, precision = machine
    if blocks not in models:
        pytest.skip(f"the model has {max(models)} blocks")
    model = models[blocks].to(device).on(precision=precision)
    graph = bench.workload_graph(workload, device=device)
    errors = bench.check_model(model, (precision,), models[max(models)].to(device))
    gemm = max(gemm_rates(graph.main.num_edges, (precision,), graph.device).values())
    call = functools.partial(bench.forward_pass, model, graph)
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
    seconds = benchmark.stats.stats.data
    provenance |= bench.make_row(model, graph, graph_sizes(graph), seconds, gemm) | {
        "peak_memory_mib": peak_memory(call, graph.device, tensors_of(model, graph)) / 2**20,
        "error_vs_float64": errors[precision],
        "convention": bench.FLOP_CONVENTION,
    }
    for used in (model, models[max(models)]):
        used.to("cpu")


@pytest.mark.parametrize("blocks", [4])
def bench_gradient_forces(benchmark, provenance, models, workload, blocks):
    """Time the energy and its gradient, as molecular dynamics uses fine-tuned models; fp32 on the CPU."""
    graph = bench.workload_graph(workload)
    forces = gradient_forces(models[blocks], graph)
    assert torch.isfinite(forces).all()
    assert forces.sum(0).abs().max() <= 1e-3 * forces.abs().max() * graph.num_atoms**0.5
    benchmark.pedantic(gradient_forces, (models[blocks], graph), rounds=2)
    provenance["atoms_per_s"] = graph.num_atoms / benchmark.stats.stats.median
