"""What a distillation step costs beside its parts: a student's forward and backward, and its teacher's forward.

    pytest benchmarks/bench_distill.py --benchmark-only [--benchmark-json FILE]

Student and teacher share the graph. The parts and the step are timed by turns; JMP-L's widths on built-in molecules,
or the demo model with --small.
"""

import statistics

import pytest
import torch

import ejmp
from ejmp.compress.config import DistillConfig
from ejmp.data.sampling.batch import Batch
from ejmp.measure import workloads
from ejmp.measure.bench import workload_graph
from ejmp.measure.instruments import time_call
from ejmp.train.demo import demo_config
from ejmp.train.objective import Distillation
from ejmp.train.task import Task, Tasks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batch():
    graph = workload_graph(workloads.molecules())
    B, N = graph.num_structures, graph.num_atoms
    return Batch(
        graph=graph,
        energy=torch.zeros(B, dtype=torch.float64),
        forces=torch.zeros(N, 3),
        fixed=torch.zeros(N, dtype=torch.bool),
        targets={},
        dataset=torch.zeros(B, dtype=torch.int64),
        ids=("",) * B,
        position=0,
    )


@pytest.mark.parametrize("blocks", [4])
def bench_distillation_step(benchmark, provenance, request, batch, blocks):
    config = demo_config() if request.config.getoption("small") else ejmp.jmp_l()
    teacher = ejmp.JMP(config)
    student = ejmp.prune(teacher, blocks=blocks)
    objective = Distillation(student, teacher, Tasks([Task(name="molecules")]), DistillConfig())

    def of_student():
        student.zero_grad()
        features = student.features(batch.graph)
        out = student.heads(features, batch.graph)
        (out.forces.sum() + sum(x.sum() for x in (*features.mlp_E, *features.mlp_F))).backward()

    def of_teacher():
        with torch.no_grad():
            teacher(batch.graph)

    def step():
        student.zero_grad()
        objective(batch).total.backward()

    step()
    assert all(p.grad is None for p in teacher.parameters())
    parts = {"student": of_student, "teacher": of_teacher, "step": step}
    seconds = {name: [] for name in parts}
    for _ in range(5):
        for name, part in parts.items():
            seconds[name].append(time_call(part, CPU))
    rounds = zip(*seconds.values(), strict=True)
    ratio = statistics.median(s / (a + b) for a, b, s in rounds)
    provenance |= {
        "blocks": blocks,
        "edges": batch.graph.main.num_edges,
        "parameters": sum(p.numel() for p in teacher.parameters()),
        "seconds": {name: statistics.median(samples) for name, samples in seconds.items()},
        "step_over_parts": ratio,
    }
    print(f"\nstep / (student + teacher) = {ratio:.3f}: {provenance['seconds']}")
    benchmark.pedantic(step, rounds=2)
