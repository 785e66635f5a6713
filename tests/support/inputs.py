"""What tests share: the golden outputs and real data beside the project, and which backends can run here."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import ejmp
import ejmp_kernels
from ejmp_kernels import availability, quantized, registry

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
SHARED = next((p for p in TESTS.parents if (p / "shared").is_dir()), ROOT) / "shared"
BACKENDS = ("native", "reference")
TRITON_DEVICE = "cpu" if availability.interpreted() else "cuda"
GOLDEN_CASES = ("ethanol", "oxide", "slab", "triclinic", "batch")


def shared_file(name):
    """A file of ../shared: required in CI, and a skip with the reason elsewhere."""
    path = SHARED / name
    if not path.exists():
        reason = f"{path} is missing"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@dataclass(frozen=True)
class Golden:
    """One npz of golden outputs and the structures they belong to."""

    values: dict
    structures: list

    @property
    def settings(self):
        pairs = zip(self.values["cutoff"].tolist(), self.values["max_neighbors"].tolist(), strict=True)
        return [ejmp.GraphSettings(cutoff=cutoff, max_neighbors=most) for cutoff, most in pairs]

    def graph(self, dtype=torch.float64, **options):
        cutoff, most = self.values["cutoff"].tolist(), self.values["max_neighbors"].tolist()
        return ejmp.build_graph(self.structures, cutoff, most, dtype=dtype, **options)


def load_golden(case):
    with np.load(shared_file(f"golden/{case}.npz")) as file:
        values = dict(file)
    structures = []
    for b in range(len(values["cell"])):
        atoms = values["batch"] == b
        structures.append(
            ejmp.Structure(
                numbers=values["numbers"][atoms],
                positions=values["positions"][atoms],
                cell=values["cell"][b],
                pbc=bool(values["pbc"][b]),
                tags=values["tags"][atoms],
            )
        )
    return Golden(values, structures)


def require_native():
    reason = availability.why_unavailable()
    if reason is not None:
        if os.environ.get("CI") == "true" and any(map(shutil.which, ("c++", "g++", "clang++"))):
            pytest.fail(f"there is a compiler, but {reason}")
        pytest.skip(reason)


def require_8_bits():
    require_native()
    if quantized.why_unavailable():
        pytest.skip(quantized.why_unavailable())


def require_triton():
    reason = registry.why_unavailable("triton", TRITON_DEVICE)
    if reason is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    registry.load_backend("triton")


def environment(**more):
    """Return the variables of a process that is to find this project, the tests and its environment's programs."""
    kernels = Path(ejmp_kernels.__file__).parents[1]  # those with sanitizers, where this process has them
    folders = [ROOT, kernels, TESTS, ROOT / "benchmarks", os.environ.get("PYTHONPATH", "")]
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    path = os.pathsep.join(str(folder) for folder in folders if str(folder))
    return os.environ | {"PYTHONPATH": path, "PATH": programs, "OMP_NUM_THREADS": "1"} | more
