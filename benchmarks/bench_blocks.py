"""One forward pass by number of blocks. Graph building is timed on its own, below.

    pytest benchmarks/ --benchmark-only [--structures PATH] [--small] [--benchmark-json FILE]

`make bench` runs the same measurement with all block counts interleaved, which a noisy machine needs for ratios.
"""

import pytest
import torch

from ejmp import bench
from ejmp import machine as machine_of
from ejmp.flops import count_macs, graph_sizes
from ejmp.model import gradient_forces


@pytest.mark.parametrize("blocks", [6, 5, 4, 3, 2])
def bench_forward(benchmark, provenance, models, workload, machine, blocks):
    device, precision = machine
    if blocks not in models:
        pytest.skip(f"the model has {max(models)} blocks")
    model = models[blocks].to(device)
    graph = bench.workload_graph(workload, device=device)
    errors = bench.check_model(model, (precision,), models[max(models)].to(device))
    gemm = max(machine_of.gemm_rates(graph.main.num_edges, (precision,), graph.device).values())
    benchmark.pedantic(bench.time_forward, (model, graph, precision), rounds=3, warmup_rounds=1)
    median = benchmark.stats.stats.median
    gmac = sum(count_macs(model.config, graph_sizes(graph)).values()) * 1e-9
    provenance |= machine_of.provenance(graph.device) | {
        "structures_per_s": graph.num_structures / median,
        "atoms_per_s": graph.num_atoms / median,
        "edges_per_s": graph.main.num_edges / median,
        "gmac": gmac,
        "gflop": 2 * gmac,
        "gemm_share": 2 * gmac / median / gemm,
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_memory_mib": bench.peak_memory(model, graph, precision) / 2**20,
        "error_vs_float64": errors[precision],
        "convention": bench.FLOP_CONVENTION,
    }
    for used in (model, models[max(models)]):
        used.to("cpu")


@pytest.mark.parametrize("blocks", [4])
def bench_gradient_forces(benchmark, provenance, models, workload, blocks):
    """Energy and its gradient, as fine-tuned models are used in molecular dynamics; fp32 on the CPU."""
    graph = bench.workload_graph(workload)
    forces = gradient_forces(models[blocks], graph)
    assert torch.isfinite(forces).all()
    assert forces.sum(0).abs().max() <= 1e-3 * forces.abs().max() * graph.num_atoms**0.5
    benchmark.pedantic(gradient_forces, (models[blocks], graph), rounds=2)
    provenance["atoms_per_s"] = graph.num_atoms / benchmark.stats.stats.median
