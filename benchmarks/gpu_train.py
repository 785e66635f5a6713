"""Steps of the GPU campaign beyond the forward pass: training, distillation, and where the time goes."""

import functools
import itertools
import time
from statistics import median

import torch
from gpu_models import Exact
from gpu_setting import Setting, make_model
from gpu_step import Skip, Step, reasons, require_error
from gpu_timing import backends, ceilings, milliseconds_or_why, peak_mib, rate_and_shares
from torch.utils.flop_counter import FlopCounterMode
from training_steps import train_on_gradient_forces, zero_labels

import ejmp
from ejmp.compress.config import DistillConfig
from ejmp.measure import profile, profile_report
from ejmp.measure.timing import median_ratio
from ejmp.model.precision import LOW_PRECISION
from ejmp.train.objective import Distillation
from ejmp.train.task import Task, Tasks

TUNED = (
    "linear_activate", "linear_activate_middle", "linear_activate_small", "quadruplet", "quadruplet_values", "triplet",
    "linear_swap_add", "atom_sum_filtered", "activate", "swap_add", "edge_sum", "pair",
)  # fmt: skip
"""Kernels to tune, those that take most of a forward pass first."""
LOSS_TOLERANCE = {"fp32": 1e-3, "tf32": 5e-2, "fp16": 5e-2, "bf16": 2e-1}
"""Largest allowed difference of a loss from that of the reference backend in fp32, over it."""


def run_train(setting: Setting) -> None:
    """Time steps of training on energies and gradient forces, and of distillation, on every backend by turns."""
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
    setting, (kind, precision), (*models, graph) = step.setting, key, parts
    expected, calls, rows, first = None, {}, [], {}
    for backend, why in backends(setting).items():
        found: dict = {"kind": kind, "precision": precision, "backend": backend}
        rows.append(found)
        with reasons(found):
            step.require_time()
            if why is not None:
                raise Skip(why)
            if expected is None:
                expected = make(*(m.on(backend="reference", precision="fp32") for m in models), graph)()
            call = make(*(m.on(backend=backend, precision=precision) for m in models), graph)
            start = time.perf_counter()
            with FlopCounterMode(display=False) as counter:
                loss = call()
            first[backend] = 1e3 * (time.perf_counter() - start)
            found["run_tflop"] = 1e-12 * counter.get_total_flops()
            found["error"] = abs(loss - expected) / abs(expected)
            require_error(found, LOSS_TOLERANCE[precision])
            found["peak_mib"] = peak_mib(setting, call)
            calls[backend] = call
    times = milliseconds_or_why(calls, setting, rows, seconds=3.0, first=first)
    for found in rows:
        with step.row(**found) as row:
            samples = times.get(row["backend"])
            if samples is None:
                continue
            row["ms"] = median(samples)
            row.update(rate_and_shares(row["run_tflop"], row["ms"], precision, step.result["ceilings"]))
            row["structures_per_s"] = graph.num_structures / (1e-3 * row["ms"])
            if "reference" in times:
                row["x of reference"] = median_ratio(times["reference"], samples)


def training_step(student: ejmp.JMP, _teacher: ejmp.JMP, graph: ejmp.AtomGraph):
    """Return a step that trains the smaller model on energies and gradient forces; it returns the loss."""
    return functools.partial(train_on_gradient_forces, student, graph)


def distillation_step(student: ejmp.JMP, teacher: ejmp.JMP, graph: ejmp.AtomGraph):
    """Return a step that distils the larger model into the smaller one; it returns the loss."""
    batch = zero_labels(graph)
    objective = Distillation(student, teacher, Tasks([Task(name="rocksalt")]), DistillConfig())

    def call():
        student.zero_grad(set_to_none=True)
        loss = objective(batch).total
        loss.backward()
        return loss.item()

    return call


def run_tune(setting: Setting) -> None:
    """Try other launch settings of Triton's kernels; the faster ones go to a configs.json beside the results."""
    step = Step("tune", setting)
    why = backends(setting).get("triton", "there is no Triton")
    if why is not None:
        step.add({"what": "all", "skipped": why})
        return
    from ejmp_kernels.triton_kernels import launch, tune
    from ejmp_kernels.triton_kernels.tune_calls import DRY, Sizes, calls_by_kernel

    sizes = DRY if setting.dry else Sizes()
    precision = next(p for p in ("bf16", "fp16", "fp32") if p in setting.precisions)
    x = torch.empty(0, dtype=LOW_PRECISION.get(precision, torch.float32), device=setting.device)
    end = time.perf_counter() + setting.seconds
    for kernel in TUNED:
        with step.row(what=kernel, precision=precision) as row, torch.no_grad():
            step.require_time()
            start = time.perf_counter()
            calls = calls_by_kernel([kernel], sizes, x.dtype, setting.device)[kernel]
            row["settings"], row["ratio"] = tune.tune(kernel, calls, x, dry=setting.dry, until=end)
            row["ms"] = 1e3 * (time.perf_counter() - start)
            section = f"{launch.architecture(setting.device)} {str(x.dtype).removeprefix('torch.')}"
            tune.write(setting.out / "configs.json", section, {kernel: row["settings"]})


def run_profile(setting: Setting) -> None:
    """Say where the time goes: `ejmp profile` on every backend, without fvcore's table."""
    structures = 1 if setting.dry else 17
    graph = setting.graph(structures)
    step = Step("profile", setting, model=setting.model_name, structures=structures)
    model = make_model(setting, 1 if setting.dry else 4)
    precision = next(p for p in ("bf16", "fp16", "fp32") if p in setting.precisions)
    exact = Exact(setting, model)
    for backend, why in backends(setting).items():
        with step.row(backend=backend, precision=precision) as row:
            step.require_time()
            if why is not None:
                raise Skip(why)
            measured = model.on(backend=backend, precision=precision)
            with torch.no_grad():
                row["error"] = exact.error(measured(graph).energy)
            found = profile.profile_model(measured, graph, rounds=1 if setting.dry else 10)
            row.update({name: found["totals"][name] for name in ("ms", "tflops", "gemm_share", "mfu")})
            row["profile"] = found
            text = {"model": f"{setting.model_name}, {model.config.blocks} blocks", "workload": "rocksalt"}
            row["text"] = profile_report.text(found | text)
