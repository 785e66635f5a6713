"""Steps of the GPU campaign beyond the forward pass: training, distillation, and where the time goes."""

import itertools
import time

import torch
from gpu_common import (
    Setting,
    Skip,
    Step,
    backends,
    by_turns_or_why,
    ceilings,
    gate,
    make_model,
    median,
    on_backend,
    rates,
    ratio,
    reasons,
)
from gpu_models import Exact, peak_mib
from torch.utils.flop_counter import FlopCounterMode

import ejmp
from ejmp.compress.config import DistillConfig
from ejmp.data.sampling.batch import Batch
from ejmp.measure import profile, profile_report
from ejmp.train.objective import Distillation
from ejmp.train.task import Task, Tasks

LOSS_TOLERANCE = {"fp32": 1e-3, "tf32": 5e-2, "fp16": 5e-2, "bf16": 2e-1}


def run_train(setting: Setting) -> None:
    """Steps of training on energies and gradient forces, and of distillation, on every backend by turns."""
    structures = 1 if setting.dry else 8
    graph, sizes = setting.graph(structures), setting.sizes(structures)
    wanted = ["fp32"] if setting.dry else [p for p in ("bf16", "tf32", "fp32") if p in setting.precisions]
    limits = ceilings(setting, graph.main.num_edges, wanted)
    step = Step(
        "train",
        setting,
        model=setting.model_name,
        ceilings=limits,
        blocks=f"{4 if not setting.dry else 1}; distilled from {6 if not setting.dry else 2}, with force branch",
        structures=structures,
        edges=sizes.edges,
        error_means="of the loss against the reference backend in fp32",
        work_means="as the fused ops count it, forward, backward and second backward",
    )
    most, fewer = (2, 1) if setting.dry else (6, 4)
    scalar = ejmp.prune(make_model(setting, most), blocks=fewer)
    teacher = make_model(setting, most, forces=True)
    makers = {
        "energy and gradient forces": (training_step, scalar, scalar),
        "distillation": (distillation_step, ejmp.prune(teacher, blocks=fewer), teacher),
    }
    for (kind, (make, student, model)), precision in itertools.product(makers.items(), wanted):
        train_one(step, (kind, precision), make, (student, model, graph))


def train_one(step: Step, key: tuple[str, str], make, parts: tuple) -> None:
    """Add a row per backend, all timed by turns."""
    setting, (kind, precision), (student, model, graph) = step.setting, key, parts
    expected, calls, rows, first = None, {}, [], {}
    for backend, why in backends(setting).items():
        found: dict = {"kind": kind, "precision": precision, "backend": backend}
        rows.append(found)
        with reasons(found):
            step.check()
            if why is not None:
                raise Skip(why)
            if expected is None:
                expected = make(setting, on_backend(student, "reference"), on_backend(model, "reference"), graph)()
            call = make(setting, *(on_backend(m, backend, precision) for m in (student, model)), graph)
            start = time.perf_counter()
            with FlopCounterMode(display=False) as counter:
                loss = call()
            first[backend] = 1e3 * (time.perf_counter() - start)
            found["run_tflop"] = 1e-12 * counter.get_total_flops()
            found["error"] = abs(loss - expected) / abs(expected)
            gate(found, LOSS_TOLERANCE[precision])
            found["peak_mib"] = peak_mib(setting, call)
            calls[backend] = call
    times = by_turns_or_why(calls, setting, rows, seconds=3.0, first=first)
    for found in rows:
        with step.row(**found) as row:
            mine = times.get(row["backend"])
            if mine is None:
                continue
            row["ms"] = median(mine)
            row.update(rates(row["run_tflop"], row["ms"], precision, step.result["ceilings"]))
            row["structures_per_s"] = graph.num_structures / (1e-3 * row["ms"])
            if "reference" in times:
                row["x of reference"] = ratio(times["reference"], mine)


def training_step(_setting: Setting, student: ejmp.JMP, _teacher: ejmp.JMP, graph):
    """Loss on energies and gradient forces of the smaller model, and its gradients."""

    def call():
        student.zero_grad(set_to_none=True)
        positions = graph.positions.clone().requires_grad_()
        energy = student(graph.with_positions(positions)).energy[:, 0]
        (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
        loss = (energy**2).mean() + (gradient**2).sum()
        loss.backward()
        return loss.item()

    return call


def distillation_step(setting: Setting, student: ejmp.JMP, teacher: ejmp.JMP, graph):
    """Distil the larger model into the smaller one: the teacher's forward, the student's forward and backward."""
    B, N = graph.num_structures, graph.num_atoms
    batch = Batch(
        graph=graph,
        energy=torch.zeros(B, dtype=torch.float64, device=setting.device),
        forces=torch.zeros(N, 3, device=setting.device),
        fixed=torch.zeros(N, dtype=torch.bool, device=setting.device),
        targets={},
        dataset=torch.zeros(B, dtype=torch.int64, device=setting.device),
        ids=("",) * B,
        position=0,
    )
    objective = Distillation(student, teacher, Tasks([Task(name="rocksalt")]), DistillConfig())

    def call():
        student.zero_grad(set_to_none=True)
        loss = objective(batch).total
        loss.backward()
        return loss.item()

    return call


def run_profile(setting: Setting) -> None:
    """Where the time goes: `ejmp profile` on every backend, without fvcore's table."""
    structures = 1 if setting.dry else 17
    graph = setting.graph(structures)
    step = Step("profile", setting, model=setting.model_name, structures=structures)
    model = make_model(setting, 1 if setting.dry else 4)
    precision = next(p for p in ("bf16", "fp16", "fp32") if p in setting.precisions)
    exact = Exact(setting, model)
    for backend, why in backends(setting).items():
        with step.row(backend=backend, precision=precision) as row:
            step.check()
            if why is not None:
                raise Skip(why)
            own = on_backend(model, backend, precision)
            with torch.no_grad():
                row["error"] = exact.error(own(graph).energy)
            found = profile.profile_model(own, graph, rounds=1 if setting.dry else 10)
            row.update({name: found["totals"][name] for name in ("ms", "tflops", "gemm_share", "mfu")})
            row["profile"] = found
            text = {"model": f"{setting.model_name}, {model.config.blocks} blocks", "workload": "rocksalt"}
            row["text"] = profile_report.text(found | text)
