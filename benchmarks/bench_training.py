"""A training step on gradient forces (every op differentiated twice), and what each precision costs in accuracy.

    pytest benchmarks/bench_training.py --benchmark-only [--structures rmd17_aspirin.npz --batch 2]
        [--scale-factors jmp_l_scale_factors.json] [--benchmark-json FILE]

The step is timed on both backends by turns. Structures in rMD17's format get its settings: 7 A, 100 neighbours.
"""

import copy
import itertools
import json
import statistics

import numpy as np
import pytest
import torch
from ase.build import molecule

import ejmp
from ejmp.graph.graph import EDGE_SETS
from ejmp.measure import bench, workloads
from ejmp.measure.instruments import StoragePeak, gemm_rates, precisions_of, time_call

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def frames(request):
    """A graph of molecules: of the first frames of an rMD17 file, or of the built-in molecules."""
    path = request.config.getoption("structures")
    if path is None or path.suffix != ".npz":
        return bench.workload_graph(workloads.molecules())
    with np.load(path) as file:
        numbers, positions = file["nuclear_charges"], file["coords"][: request.config.getoption("batch")]
    return ejmp.build_graph([ejmp.Structure(numbers=numbers, positions=r) for r in positions], 7.0, 100)


def step(model, graph):
    """Loss on energies and gradient forces, and its gradients."""
    model.zero_grad(set_to_none=True)
    positions = graph.positions.clone().requires_grad_()
    energy = model(graph.with_positions(positions)).energy[:, 0]
    (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
    loss = (energy**2).mean() + (gradient**2).sum()
    loss.backward()
    return loss.item()


def peak(model, graph):
    known = [vars(owner).values() for owner in (graph, *(getattr(graph, name) for name in EDGE_SETS))]
    with StoragePeak(itertools.chain.from_iterable([*known, model.state_dict().values()])) as memory:
        step(model, graph)
    return memory.peak / 2**20


@pytest.mark.parametrize("blocks", [6])
def bench_training_step(benchmark, provenance, models, frames, blocks):
    model = models[blocks]
    seconds, losses, memory = {"reference": [], "native": []}, {}, {}
    rates = []
    for backend in seconds:
        model.requested_backend = backend
        memory[backend], losses[backend] = peak(model, frames), step(model, frames)
    assert losses["native"] == pytest.approx(losses["reference"], rel=1e-4)
    for _ in range(4):
        rates.append(max(gemm_rates(frames.main.num_edges, ["fp32"], CPU).values()))
        for backend, samples in seconds.items():
            model.requested_backend = backend
            samples.append(time_call(lambda: step(model, frames), CPU))
    provenance |= {
        "blocks": blocks,
        "structures": frames.num_structures,
        "edges": frames.main.num_edges,
        "seconds": {name: statistics.median(samples) for name, samples in seconds.items()},
        "samples_s": seconds,
        "speedup": statistics.median(r / n for r, n in zip(*seconds.values(), strict=True)),
        "peak_mib": memory,
        "memory_ratio": memory["native"] / memory["reference"],
        "gemm_gflops": statistics.median(rates),
    }
    benchmark.pedantic(step, (model, frames), rounds=1)
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def bench_precision(benchmark, provenance, request, models, precision):
    """Errors against float64 of energies and of gradient forces, relative to the largest value."""
    if precision not in precisions_of(CPU):
        pytest.skip(f"the CPU has no {precision}")
    model = copy.deepcopy(models[6])
    model.requested_backend = "auto"
    factors = request.config.getoption("scale_factors")
    if factors is not None:
        state = model.state_dict()
        for name, value in json.loads(factors.read_text()).items():
            if f"backbone.{name}.scale_factor" in state:  # a scalar model has no factors of forces
                state[f"backbone.{name}.scale_factor"].fill_(value)
    # no three atoms on a line (as in benzene): there each type of number has its own limit for dihedral angles
    graph = ejmp.build_graph([molecule("CH3CH2OH"), molecule("CH3CONH2"), molecule("CH3COOH")], 12.0, 30)
    exact = copy.deepcopy(model).double()
    in_double = graph.to(dtype=torch.float64)
    expected = exact(in_double).energy.detach(), ejmp.gradient_forces(exact, in_double)
    model.precision = precision

    def errors():
        values = model(graph).energy.detach(), ejmp.gradient_forces(model, graph)
        return [((v - e).abs().max() / e.abs().max()).item() for v, e in zip(values, expected, strict=True)]

    energy, forces = benchmark.pedantic(errors, rounds=1)
    provenance |= {
        "precision": precision,
        "scale_factors": None if factors is None else factors.name,
        "energy_error": energy,
        "gradient_force_error": forces,
    }
    assert energy < bench.GATE[precision]
