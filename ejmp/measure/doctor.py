"""Say which implementation serves each op on each device and type, and why."""

import importlib
import platform
from typing import get_args

import torch

from ejmp import cores
from ejmp.model.backend import Kernels, candidates, why_unavailable
from ejmp_kernels import availability, gemm, quantized

OPS = (
    ("neighbour search", "find_neighbors"),
    ("triplets", "triplet"),
    ("quadruplets", "quadruplet"),
    ("pairs", "pair"),
    ("radial bases", "radial"),
    ("atom sums", "atom_sum"),
    ("edge embedding", "gather_add"),
    ("activation, filter, residual", "activate"),
    ("swap and add", "swap_add"),
    ("matrix products", "matmul"),
)
"""Titles and names of the ops in the report."""
STORED = ("atom_sum", "gather_add", "activate", "swap_add", "matmul")
"""Names of the ops that also exist in bfloat16; in a bfloat16 model the others run in float32."""
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Types in the order of the report's columns."""


def examine() -> str:
    """Return a report for people: what this installation has, and which implementation it takes."""
    reason = availability.why_unavailable()
    eight_bits = quantized.why_unavailable() or reason
    lines = [
        f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads",
        f"native ops: {'not there: ' + reason if reason else 'compiled, kernels for ' + torch.ops.ejmp.isa()}",
        load_line(cores.busy_elsewhere()),
        f'precision="int8": {eight_bits or "on this CPU"}',
        f"CUDA: {_cuda()}",
        f"triton backend: {_triton()}",
        "",
        'backend="auto" takes:',
    ]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    lines += [f"  {device:4} {_name(dtype):8} {_choice(device, dtype)}" for device in devices for dtype in TYPES]
    lines += ["", "backends:"]
    for backend in get_args(Kernels):
        lines += [f"  {backend:10} {device:4} {why_unavailable(backend, device) or 'yes'}" for device in devices]
    lines += ["", f"{'op on the CPU':30} {'float32':10} {'float64':10} {'bfloat16':22} float16"]
    for title, op in OPS:
        lines.append(
            f"{title:30} " + " ".join(f"{_serves(op, d):{w}}" for d, w in zip(TYPES, (10, 10, 22, 0), strict=True))
        )
    return "\n".join([*lines, "", *_products(reason)])


def load_line(busy: float | None) -> str:
    """Say how much of the machine is left."""
    number = len(cores.available())
    if busy is None:
        return f"{number} cores; what else runs on them is not known here"
    line = f"{number} cores, of which other work keeps {busy:.1f} busy"
    if busy <= cores.LOADED:
        return line
    suggestion = f"OMP_NUM_THREADS={cores.free(busy)} may be faster than {torch.get_num_threads()}"
    return f"{line}: timings mean little now, and {suggestion}"


def _choice(device: str, dtype: torch.dtype) -> str:
    """Name the backend that "auto" takes, and say why it does not take those that come before it."""
    reasons = {backend: why_unavailable(backend, device, dtype) for backend in candidates("auto", device)}
    chosen = next(backend for backend, reason in reasons.items() if reason is None)
    before = [f"{backend}: {reason}" for backend, reason in reasons.items() if reason is not None]
    return "; ".join([chosen, *before])


def _triton() -> str:
    """Say which Triton there is and where it runs, or why it does not."""
    reason = why_unavailable("triton")
    if reason:
        return f"not there: {reason}"
    version = importlib.import_module("triton").__version__
    if availability.interpreted():
        return f"Triton {version} in its interpreter, for tests (TRITON_INTERPRET=1)"
    if torch.cuda.is_available():
        reason = why_unavailable("triton", "cuda")
        return f"Triton {version}, " + (f"not on this GPU: {reason}" if reason else "compiles for this GPU")
    return f"Triton {version}, unused: torch finds no CUDA device"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no device"
    reason = availability.why_unavailable("cuda")
    served = (
        reason or "compiled kernels for graph building, triplets, quadruplets, pairs, sums; the rest in plain torch"
    )
    return f"{torch.cuda.get_device_name()}: {served}"


def _serves(op: str, dtype: torch.dtype) -> str:
    """Name the implementation that serves an op for a type on the CPU."""
    if op == "find_neighbors":
        return "-" if dtype != torch.float64 else "torch" if availability.why_unavailable() else "native"
    if why_unavailable("native", "cpu", dtype):
        return "torch"
    if dtype == torch.bfloat16 and op not in STORED:
        return "native, in float32"
    return "see below" if op == "matmul" else f"native {torch.ops.ejmp.isa()}"


def _products(reason: str | None) -> list[str]:
    if reason:
        return ["matrix products: torch"]
    lines = [f"matrix products (EJMP_GEMM={gemm.pinned()}; choices kept in {gemm.cache_file()}):"]
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (512, 4096):
            x, w = torch.ones(rows, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
            products = {"forward": (x, w.mT), "gradient of x": (x, w), "gradient of weight": (x.mT, x)}
            chosen = ", ".join(f"{name} {gemm.choose(a, b)}" for name, (a, b) in products.items())
            lines.append(f"  {_name(dtype):8} ({rows}, 1024, 1024): {chosen}")
    return [*lines, "  float64, float16 and small products: torch"]
