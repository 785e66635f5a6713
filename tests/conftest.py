"""Fixtures of all tests."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported; a run on a GPU sets it to 0

import json

import pytest
import torch
from support.inputs import BACKENDS, GOLDEN_CASES, load_golden, require_native, shared_file
from support.interpreter import patch_once

import ejmp

patch_once()
LONGEST = ("test_triton_compile", "test_gpu_campaign", "test_run", "test_cli", "test_distributed", "test_compile")
"""Files of tests that take longest. They start first, so that no core is idle at the end while another has one."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def shared():
    return shared_file


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


@pytest.fixture(scope="module")
def ranks():
    """This process as the only rank of a session."""
    from ejmp.train.faults import session

    with session("cpu") as ranks:
        yield ranks


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
