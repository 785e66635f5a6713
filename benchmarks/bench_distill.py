"""What a distillation step costs beside its parts: a student's forward and backward, and its teacher's forward.

    pytest benchmarks/bench_distill.py --full --benchmark-only [--benchmark-json FILE]

Student and teacher share the graph. The parts and the step are timed by turns; JMP-L's widths on built-in molecules,
or the demo model with --small.
"""

import statistics

import pytest
import torch
from training_steps import zero_labels

import ejmp
from ejmp.compress.config import DistillConfig
from ejmp.measure import workloads
from ejmp.measure.bench import workload_graph
from ejmp.measure.timing import Rounds, by_turns, median_ratio
from ejmp.train.demo import demo_config
from ejmp.train.objective import Distillation
from ejmp.train.task import Task, Tasks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batch():
    """The built-in molecules."""
    return zero_labels(workload_graph(workloads.molecules()))


@pytest.mark.parametrize("blocks", [4])
def bench_distillation_step(benchmark, provenance, request, batch, blocks):
    config = demo_config() if request.config.getoption("small") else ejmp.jmp_l()
    teacher = ejmp.JMP(config)
    student = ejmp.prune(teacher, blocks=blocks)
    objective = Distillation(student, teacher, Tasks([Task(name="molecules")]), DistillConfig())

    def student_alone():
        student.zero_grad()
        features = student.features(batch.graph)
        out = student.heads(features, batch.graph)
        (out.forces.sum() + sum(x.sum() for x in (*features.mlp_E, *features.mlp_F))).backward()

    def teacher_alone():
        with torch.no_grad():
            teacher(batch.graph)

    def step():
        student.zero_grad()
        objective(batch).total.backward()

    step()
    assert all(p.grad is None for p in teacher.parameters())
    parts = {"student": student_alone, "teacher": teacher_alone, "step": step}
    seconds = by_turns(parts, CPU, Rounds(least=5))
    both = [a + b for a, b in zip(seconds["student"], seconds["teacher"], strict=True)]
    ratio = median_ratio(seconds["step"], both)
    provenance |= {
        "blocks": blocks,
        "edges": batch.graph.main.num_edges,
        "parameters": sum(p.numel() for p in teacher.parameters()),
        "seconds": {name: statistics.median(samples) for name, samples in seconds.items()},
        "step_over_parts": ratio,
    }
    print(f"\nstep / (student + teacher) = {ratio:.3f}: {provenance['seconds']}")
    benchmark.pedantic(step, rounds=2)
