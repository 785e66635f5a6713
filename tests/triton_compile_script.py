"""Compile every Triton kernel of the package for GPUs that are not here, through the code that launches them.

python tests/triton_compile_script.py [--json FILE] [--architectures 80 90] [--types float32 ...]

Each op of torch.ops.ejmp_triton is called with JMP-L's widths on CPU tensors, while Triton believes in a GPU and only
compiles what it would launch. Prints shared memory, registers, stack (spilled registers), instructions of each kernel.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

import ejmp
from ejmp.model.precision import tf32_products
from ejmp.provenance import provenance
from ejmp_kernels import registry

registry.load_backend("triton")
from ejmp_kernels.triton_kernels import gemm, launch  # noqa: E402 - defines ops, which the line above registers

PROCESSORS = {80: 108, 90: 132}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = ("float32", "bfloat16", "float16", "float64")
ALPHA = 1 / 0.6


class Driver:
    """Stands for a GPU; its number is its compute capability, so that Triton keeps the kernels of each apart."""

    capability = 80

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, _device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


class Compiler:
    """The ops by name, none of which launches anything: they compile, and what came of it is noted."""

    def __init__(self):
        self.driver, self.dtype, self.op, self.called, self.rows = Driver(), None, "", set(), []
        self._seen = set()
        triton.runtime.driver.set_active(self.driver)
        run = JITFunction.run

        def compile_only(function, *args, grid, **settings):
            settings.pop("warmup")
            kernel = run(function, *args, grid=grid, warmup=True, **settings)
            if kernel.hash not in self._seen:
                self._seen.add(kernel.hash)
                self.rows.append(self._note(function, kernel, settings))
            return kernel

        JITFunction.run = compile_only
        launch.architecture = lambda device: f"sm_{self.driver.capability}"
        launch.processors = lambda device: PROCESSORS[self.driver.capability]
        gemm.fuses = lambda x: True

    def __getattr__(self, name):
        self.op = name
        self.called.add(name)
        return getattr(torch.ops.ejmp_triton, name)

    def features(self, *shape):
        return torch.zeros(*shape, dtype=self.dtype)

    def wide(self, *shape):
        """Return zeros in the type of geometry and bases."""
        return torch.zeros(*shape, dtype=real(self.dtype))

    def _note(self, function, kernel, settings):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [CUOBJDUMP, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            command = [CUOBJDUMP.with_name("nvdisasm"), "--print-code", file.name]
            code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
        return {
            "architecture": f"sm_{self.driver.capability}",
            "dtype": str(self.dtype).removeprefix("torch."),
            "op": self.op,
            "kernel": f"{function.__module__.rpartition('.')[2]}.{function.__name__}",
            "settings": {key: x if isinstance(x, int | str) else str(x) for key, x in settings.items()},
            "shared": kernel.metadata.shared,
            "registers": registers,
            "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/ +(?!NOP)\S", code)),
            "stack": stack,
            "tensor_cores": next((name for name in ("wgmma", "mma.sync") if name in kernel.asm["ptx"]), None),
        }


def real(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_graph(dtype):
    """Four atoms: enough for quadruplets."""
    positions = [[0, 0, 0], [1.2, 0.1, 0.2], [-0.6, 0.9, 0.3], [-0.5, -0.8, 1.0]]
    return ejmp.build_graph([ejmp.Structure(numbers=[6, 8, 1, 7], positions=positions)], 5.0, 30, dtype=real(dtype))


def triplet(ops, graph, out="main", into="main", *, to_atoms=False):
    out, into = getattr(graph, out), getattr(graph, into)
    ids = (out.ptr, out.source, out.image, into.ptr, into.source, into.image)
    inputs = (ops.features(into.num_edges, 64), ops.wide(out.num_edges, 16, 7), out.vector, into.vector)
    grad = ops.triplet(*inputs, *ids, to_atoms)
    ops.triplet_backward(grad, *inputs, *ids, to_atoms)
    ops.triplet_double(*inputs, grad, *inputs, *ids, to_atoms)


def triplet_to_atoms(ops, graph):
    triplet(ops, graph, "atom_edges", "main", to_atoms=True)


def quadruplet(ops, graph):
    main, middle = graph.main, graph.quad_edges
    weight, filters = ops.wide(main.num_edges, 64, 49), ops.wide(middle.num_edges, 7, 64)
    inputs = (ops.features(main.num_edges, 64), filters, weight, main.vector, middle.vector)
    ids = (main.ptr, main.source, main.image, middle.ptr, middle.source, middle.image, 1e-4, main.max_degree)
    grad = ops.quadruplet(*inputs, *ids)
    ops.quadruplet(*inputs[:2], weight.to(ops.dtype), *inputs[3:], *ids)
    ops.quadruplet_backward(grad, *inputs, *ids)
    ops.quadruplet_double(*inputs, grad, *inputs, *ids)


def pair(ops, graph):
    edges = graph.atom_pairs
    inputs = (ops.features(graph.num_atoms, 64), ops.wide(edges.num_edges, 32), edges.ptr, edges.source)
    ops.pair_backward(ops.pair(*inputs), *inputs)


def radial(ops, graph):
    distance, centres = graph.main.distance, ops.wide(128)
    for width, order in ((32, 0), (384, 0), (384, 1), (384, 2)):
        ops.radial(distance, centres, centres, ops.features(128, width), 12.0, 5, order)
        ops.radial_transposed(distance, centres, centres, ops.features(len(distance), width), 12.0, 5, order)


def activate(ops, graph):
    x = ops.features(graph.main.num_edges, 1024)
    for factor in (None, x):
        for add in (None, x):
            ops.activate(x, factor, add, ALPHA, 1.0)
            ops.activate_(x.clone(), factor, add, ALPHA, 1.0)
        ops.activate_backward(x, x, factor, ALPHA)
        ops.activate_double(x, factor, x, x, factor, ALPHA)


def swap_add(ops, graph):
    x, swap = ops.features(graph.main.num_edges, 2048), graph.main.swap
    grad = ops.swap_add(x, swap, None, ALPHA)
    ops.swap_add(x, swap, grad, ALPHA)
    ops.swap_add_backward(grad, x, swap, ALPHA)
    ops.swap_add_double(x, grad, x, swap, ALPHA)


def sums(ops, graph):
    main, m, rows = graph.main, ops.features(graph.main.num_edges, 1024), ops.wide(graph.num_atoms, 1024)
    for x in (m, None):
        ops.gather_add(x, rows, rows, main.source, main.swap, main.ptr)
    for order in (None, main.swap):
        ops.edge_sum(m, order, main.ptr)
    ops.atom_sum_filtered(m, ops.features(len(m), 32), ops.features(1024, 32), main.ptr)
    ops.atom_sum_backward(ops.atom_sum(m, m, main.ptr), m, m, main.ptr)


def linear_swap_add(ops, graph):
    x, weight, swap = ops.features(graph.main.num_edges, 64), ops.features(2048, 64), graph.main.swap
    for add in (None, ops.features(graph.main.num_edges, 1024)):
        with tf32_products():
            ops.linear_swap_add(x, weight, swap, add, ALPHA)


def linear_fused(ops, _graph):
    """Products of each size of tile, rows that are not aligned, and what the steps of a block ask for after them.

    Those of float32 are the vendor's without TF32.
    """
    n, r, atoms, none = 1024, 16, ops.wide(4, 1024), (None, None)

    def call(m, n, k, *, factor=False, add=False, more=False, basis=False, rows=False, filter_sum=False, sums=False):
        x, weight, out = ops.features(m, k), ops.features(n, k), ops.features(m, n)
        filters = (ops.features(m, r), ops.features(n, r)) if basis else none
        who = torch.zeros(m, dtype=torch.long)
        residual = out.to(real(ops.dtype)) if sums else out  # as that of atoms
        wide = (residual if given else None for given in (add, more))
        ops.linear_fused(
            x, weight, out if factor else None, *filters, *wide, *((atoms, who) * 2 if rows else none * 2),
            ALPHA, 1.0, 1.0, filter_sum,
        )  # fmt: skip

    with tf32_products():
        call(8192, n, n)
        for m in (8192, 2048, 64):
            call(m, n, n, factor=True, add=True)
        call(64, 30, 41, factor=True, add=True)
        call(8192, n, n, basis=True)
        call(8192, n, n, add=True, more=True)
        call(8192, n, n, add=True, basis=True, filter_sum=True)
        call(8192, n, n, rows=True)
        for m in (8192, 64):
            call(m, n, 256, add=True, sums=True)
        if ops.driver.capability >= 90 and ops.dtype in launch.LOW:
            with launch.overriding("linear_activate", {"SPECIALIZED": True}):
                call(8192, n, n)
                call(8192, n, n, factor=True, add=True, more=True)


CASES = (
    triplet, triplet_to_atoms, quadruplet, pair, radial, activate, swap_add, sums, linear_fused,
    linear_swap_add,
)  # fmt: skip


def compile_all(architectures, types):
    """Return a row per kernel; an op that no case calls is an error."""
    ops = Compiler()
    for ops.driver.capability in architectures:
        for ops.dtype in [getattr(torch, name) for name in types]:
            graph = make_graph(ops.dtype)
            for case in CASES:
                case(ops, graph)
    prefix = "ejmp_triton::"
    there = {name.removeprefix(prefix) for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}
    if missing := there - ops.called:
        raise SystemExit(f"no case compiles {', '.join(sorted(missing))}")
    return ops.rows


def table(rows):
    lines = [
        f"{'GPU':6} {'type':9} {'op':21} {'kernel':34} shared registers stack instructions warps stages tensor cores"
    ]
    for row in rows:
        warps, stages = (row["settings"].get(name, default) for name, default in (("num_warps", 4), ("num_stages", 3)))
        lines.append(
            f"{row['architecture']:6} {row['dtype']:9} {row['op']:21} {row['kernel']:34} {row['shared']:6} "
            f"{row['registers']:9} {row['stack']:5} {row['instructions']:12} {warps:5} {stages:6} "
            f"{row['tensor_cores'] or '-'}"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90], choices=PROCESSORS)
    parser.add_argument("--types", nargs="+", default=TYPES, choices=TYPES)
    arguments = parser.parse_args()
    with torch.no_grad():
        rows = compile_all(arguments.architectures, arguments.types)
    sys.stdout.write(table(rows))
    if arguments.json:
        made = provenance(torch.device("cpu")) | {"triton": triton.__version__}
        arguments.json.write_text(json.dumps({"provenance": made, "kernels": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
