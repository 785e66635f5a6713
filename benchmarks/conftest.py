"""Options and shared models of the benchmark suites; provenance and a record go into every JSON they write.

Without `--full` only the suite in bench_quick.py runs: every op and every number of blocks, at small sizes.
"""

import contextlib
from pathlib import Path

import pytest
import torch

from ejmp.measure import bench, workloads
from ejmp.measure.rates import precisions_of
from ejmp.provenance import provenance as describe_machine
from ejmp.track import machine as track_machine
from ejmp.track.schema import of_measured
from ejmp_kernels.allocator import keep_freed_memory

QUICK = "bench_quick"
"""The suite that runs without `--full`."""
LEFT_OUT = pytest.StashKey[int]()
"""Number of benchmarks that were left out for want of `--full`."""


def pytest_addoption(parser):
    group = parser.getgroup("ejmp")
    group.addoption("--structures", type=Path, help="measure on these instead of the built-in workloads")
    group.addoption("--select", default="*", help="files of a folder or zip archive to take")
    group.addoption("--batch", type=int, default=1, help="how many structures to read")
    group.addoption("--scale-factors", type=Path, help="fitted scale factors by module name (JSON) for bench_precision")
    group.addoption("--full", action="store_true", help="all suites (hours), not only bench_quick.py (2 minutes)")
    group.addoption("--small", action="store_true", help="JMP-S instead of JMP-L")


def pytest_configure():
    keep_freed_memory()  # as the commands do


def pytest_collection_modifyitems(config, items):
    if not config.getoption("full"):
        ours = Path(__file__).parent
        left_out = [item for item in items if item.path.parent == ours and item.path.stem != QUICK]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
        config.stash[LEFT_OUT] = len(left_out)


def pytest_report_collectionfinish(config):
    count = config.stash.get(LEFT_OUT, 0)
    return f"ejmp: {count} benchmarks at full size were left out; --full runs them" if count else []


def machines():
    """Return every device there is, with each precision worth measuring on it."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [(device, precision) for device in devices for precision in precisions_of(torch.device(device))]


def pytest_generate_tests(metafunc):
    if "workload" in metafunc.fixturenames:
        given = metafunc.config.getoption("structures")
        names = list(workloads.BUILT_IN) if given is None else [given.name]
        metafunc.parametrize("workload", names, indirect=True, scope="session")
    if "machine" in metafunc.fixturenames:
        metafunc.parametrize("machine", machines(), ids="-".join, scope="session")


@pytest.fixture(scope="session")
def workload(request):
    option = request.config.getoption
    if option("structures") is None:
        return workloads.BUILT_IN[request.param]()
    return workloads.from_files(option("structures"), select=option("select"), most=option("batch"))


@pytest.fixture(scope="session")
def models(request):
    """A scalar model with random weights and its prunings, by number of blocks."""
    small = request.config.getoption("small")
    blocks = (4, 3, 2) if small else (6, 5, 4, 3, 2)
    return bench.make_models(blocks, bench.random_model(max(blocks), small=small))


@pytest.fixture
def provenance(benchmark, request):
    """A benchmark's extra_info with where it runs; the benchmark adds what it measured, and a record is made of it."""
    device = request.getfixturevalue("machine")[0] if "machine" in request.fixturenames else "cpu"
    info = benchmark.extra_info
    info.update(describe_machine(torch.device(device)))
    yield info
    if "record" not in info and benchmark.stats is not None:
        with contextlib.suppress(ValueError):  # a time of 0, which some clocks give
            info["record"] = of_measured(
                suite=request.path.stem.removeprefix("bench_"),
                name=request.node.name,
                seconds=benchmark.stats.stats.data,
                info=info,
                machine=track_machine.describe(device),
            ).to_dict()
