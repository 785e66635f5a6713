"""Run the compiled kernels of a device once, forward, backward and second backward: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python3 benchmarks/gpu_native.py [--device cuda] [--tiny]

Results are compared with the specification in float64, so that a run proves that the kernels ran and were right.
"""

import argparse
import sys
from pathlib import Path

import bench_kernels
import pytest
import torch
from gpu_ops import ORDERS, Inputs
from gpu_setting import Setting
from gpu_timing import error_of

from ejmp.measure import bench, workloads
from ejmp_kernels import availability, registry


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes of the dry run instead of JMP-L's")
    options = parser.parse_args()
    device = torch.device(options.device)
    reason = availability.why_unavailable(device.type)
    if reason is not None:
        print(reason)
        return 3
    registry.load_backend("native")
    setting = Setting(device=device, dry=options.tiny, out=Path(), seconds=0)
    graph = setting.graph(1) if options.tiny else bench.workload_graph(workloads.rocksalt(repeats=1), device=device)
    host = (
        setting.graph(1, backend="reference") if options.tiny else bench.workload_graph(workloads.rocksalt(repeats=1))
    )
    assert error_of(graph.main.distance.cpu(), host.main.distance.cpu()) < 1e-5
    inputs, worst = Inputs(setting, small=graph, double=graph.to(dtype=torch.float64)), 0.0
    for op in bench_kernels.OPS:
        for order in ORDERS:
            try:
                worst = max(worst, inputs.checked(op, order, "fp32", "native")[0])
            except pytest.skip.Exception:  # linear: no second derivative
                continue
    print(f"largest error {worst:.1e}")
    return 0 if worst < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
