"""Options and shared models of the benchmark suites; provenance goes into every JSON they write."""

from pathlib import Path

import pytest
import torch

import ejmp
from ejmp import bench, workloads


def pytest_addoption(parser):
    group = parser.getgroup("ejmp")
    group.addoption("--structures", type=Path, help="measure on these instead of the built-in workloads")
    group.addoption("--select", default="*", help="files of a folder or zip archive to take")
    group.addoption("--batch", type=int, default=1, help="how many structures to read")
    group.addoption("--small", action="store_true", help="JMP-S instead of JMP-L")


def devices():
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def precisions(device):
    return ["fp32", "tf32", "bf16", "fp16"] if device == "cuda" else ["fp32", "bf16"]


def pytest_generate_tests(metafunc):
    if "workload" in metafunc.fixturenames:
        given = metafunc.config.getoption("structures")
        names = list(workloads.BUILT_IN) if given is None else [given.name]
        metafunc.parametrize("workload", names, indirect=True, scope="session")
    if "machine" in metafunc.fixturenames:
        pairs = [(device, precision) for device in devices() for precision in precisions(device)]
        metafunc.parametrize("machine", pairs, ids="-".join, scope="session")


@pytest.fixture(scope="session")
def workload(request):
    option = request.config.getoption
    if option("structures") is None:
        return workloads.BUILT_IN[request.param]()
    return workloads.from_files(option("structures"), select=option("select"), most=option("batch"))


@pytest.fixture(scope="session")
def models(request):
    """One model, and its first 5, 4, 3, 2 blocks."""
    torch.manual_seed(0)
    small = request.config.getoption("small")
    full = (ejmp.jmp_s if small else ejmp.jmp_l)(scalar=True, blocks=4 if small else 6)
    model = ejmp.JMP(full).eval()
    return {b: ejmp.prune(model, blocks=b) for b in range(full.blocks, 1, -1)}


@pytest.fixture
def provenance(benchmark):
    """Fill a benchmark's extra_info; the test adds what it measured on."""
    benchmark.extra_info.update(bench.provenance(torch.device("cpu")))
    return benchmark.extra_info
