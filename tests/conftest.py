"""Shared inputs: the golden outputs and real data beside the project."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported; a run on a GPU sets it to 0

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import ejmp
from ejmp_kernels import extension, library

SHARED = (
    next((p for p in Path(__file__).parents[2:0:-1] if (p / "shared").is_dir()), Path(__file__).parents[2]) / "shared"
)
BACKENDS = ("native", "reference")
TRITON_DEVICE = "cpu" if extension.interpreted() else "cuda"
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


@pytest.fixture(scope="session")
def shared():
    return shared_file


@dataclass(frozen=True)
class Golden:
    """One npz of golden outputs and the structures they belong to."""

    values: dict
    structures: list

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


@pytest.fixture(params=GOLDEN_CASES)
def golden(request):
    return load_golden(request.param)


@pytest.fixture(scope="session")
def tiny_weights():
    from safetensors.torch import load_file

    return load_file(shared_file("golden/tiny.safetensors"))


@pytest.fixture(scope="session")
def tiny_config():
    return ejmp.JMPConfig.from_upstream(json.loads(shared_file("golden/tiny.json").read_text()))


@pytest.fixture(scope="session")
def tiny(tiny_config, tiny_weights):
    """The golden model in float64."""
    model = ejmp.JMP(tiny_config)
    model.load_state_dict(tiny_weights)
    return model.double()


def require_native():
    reason = extension.unavailable()
    if reason is not None:
        if os.environ.get("CI") == "true" and any(map(shutil.which, ("c++", "g++", "clang++"))):
            pytest.fail(f"there is a compiler, but {reason}")
        pytest.skip(reason)


def require_triton():
    reason = library.unavailable("triton", TRITON_DEVICE)
    if reason is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    library.load("triton")


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "native":
        require_native()
    return request.param


@pytest.fixture
def poisoned_memory():
    """Fill every new tensor with NaN: what an op forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
