"""A training step on gradient forces (every op differentiated twice), and what each precision costs in accuracy.

    pytest benchmarks/bench_training.py --full --benchmark-only [--structures rmd17_aspirin.npz --batch 2]
        [--scale-factors jmp_l_scale_factors.json] [--benchmark-json FILE]

The step is timed on both backends by turns. Structures in rMD17's format get its settings: 7 A, 100 neighbours.
"""

import copy
import functools
import json
import statistics

import numpy as np
import pytest
import torch
from ase.build import molecule
from torch.utils.flop_counter import FlopCounterMode
from training_steps import train_on_gradient_forces

import ejmp
from ejmp.measure import bench, workloads
from ejmp.measure.memory import peak_memory, tensors_of
from ejmp.measure.rates import gemm_rates, precisions_of
from ejmp.measure.timing import Rounds, by_turns, median_ratio
from ejmp_kernels.allocator import TRAINING_BYTES, keep_freed_memory

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def frames(request):
    """The graph of the first frames of an rMD17 file, or of the built-in molecules."""
    path = request.config.getoption("structures")
    if path is None or path.suffix != ".npz":
        return bench.workload_graph(workloads.molecules())
    with np.load(path) as file:
        numbers, positions = file["nuclear_charges"], file["coords"][: request.config.getoption("batch")]
    return ejmp.build_graph([ejmp.Structure(numbers=numbers, positions=r) for r in positions], 7.0, 100)


@pytest.mark.parametrize("blocks", [6])
def bench_training_step(benchmark, provenance, models, frames, blocks):
    keep_freed_memory(TRAINING_BYTES)  # as the commands do
    model = models[blocks]
    steps = {
        name: functools.partial(train_on_gradient_forces, model.on(backend=name), frames)
        for name in ("reference", "native")
    }
    memory = {name: peak_memory(call, CPU, tensors_of(model, frames)) / 2**20 for name, call in steps.items()}
    losses = {name: call() for name, call in steps.items()}
    assert losses["native"] == pytest.approx(losses["reference"], rel=1e-4)
    with FlopCounterMode(display=False) as counter:
        steps["native"]()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if str(op).endswith(("matmul", "mm")))
    rates = []

    def after_round(_number, _seconds):
        rates.append(max(gemm_rates(frames.main.num_edges, ["fp32"], CPU).values()))

    seconds = by_turns(steps, CPU, Rounds(least=6, warm_ups=0), after_round=after_round)
    floor = [1e-9 * products / rate for rate in rates]
    provenance |= {
        "blocks": blocks,
        "structures": frames.num_structures,
        "edges": frames.main.num_edges,
        "seconds": {name: statistics.median(samples) for name, samples in seconds.items()},
        "samples_s": seconds,
        "speedup": median_ratio(seconds["reference"], seconds["native"]),
        "peak_mib": memory,
        "memory_ratio": memory["native"] / memory["reference"],
        "gemm_gflops": statistics.median(rates),
        "products_gflop": 1e-9 * products,
        "over_floor": median_ratio(seconds["native"], floor),
    }
    benchmark.pedantic(steps["native"], rounds=1)
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def bench_precision(benchmark, provenance, request, models, precision):
    """Measure errors of energies and gradient forces against float64, relative to the largest value."""
    if precision not in precisions_of(CPU):
        pytest.skip(f"the CPU has no {precision}")
    model = copy.deepcopy(models[6]).on(precision=precision)
    factors = request.config.getoption("scale_factors")
    if factors is not None:
        state = model.state_dict()
        for name, value in json.loads(factors.read_text()).items():
            if f"backbone.{name}.scale_factor" in state:  # a scalar model has no factors of forces
                state[f"backbone.{name}.scale_factor"].fill_(value)
    # no three atoms on a line (as in benzene): there each type of number has its own limit for dihedral angles
    graph = ejmp.build_graph([molecule("CH3CH2OH"), molecule("CH3CONH2"), molecule("CH3COOH")], 12.0, 30)
    exact = copy.deepcopy(model.on(precision="fp32")).double()
    in_double = graph.to(dtype=torch.float64)
    expected = exact(in_double).energy.detach(), ejmp.gradient_forces(exact, in_double)

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
