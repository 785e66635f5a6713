"""The tuner of launch settings: what it keeps, what it refuses, and that every kernel with settings is timed."""

import json

import pytest
import torch

from ejmp_kernels import registry

pytest.importorskip("triton")


registry.load_backend("triton")
from ejmp_kernels.triton_kernels import gemm, launch, tune  # noqa: E402 - defines ops, which the line above registers

TABLES = json.loads(tune.COMMITTED.read_text())
X = torch.zeros(1)
KERNEL = "activate"
BLOCK = launch.config(KERNEL, X)["BLOCK"]


@pytest.fixture
def timed(monkeypatch):
    """Larger blocks take less time, by the table."""
    monkeypatch.setattr(tune, "seconds", lambda call, dry: 1 / launch.config(KERNEL, X)["BLOCK"])


@pytest.mark.usefixtures("timed")
def test_the_fastest_settings_are_kept():
    assert tune.tune(KERNEL, [lambda: X], X, dry=False) == ({"BLOCK": 2 * BLOCK}, pytest.approx(0.5))
    assert not launch.OVERRIDES


@pytest.mark.usefixtures("timed")
def test_settings_with_other_results_are_refused():
    def call():
        return torch.full((3,), float(launch.config(KERNEL, X)["BLOCK"] <= BLOCK))

    assert tune.tune(KERNEL, [call], X, dry=False) == ({}, 1.0)


@pytest.mark.usefixtures("timed")
def test_settings_that_do_not_fit_are_left_out():
    def call():
        if launch.config(KERNEL, X)["BLOCK"] > BLOCK:
            raise RuntimeError("out of shared memory")
        return X

    assert tune.tune(KERNEL, [call], X, dry=False) == ({}, 1.0)
    assert not launch.OVERRIDES


@pytest.mark.usefixtures("timed")
def test_nothing_more_is_tried_after_the_time_is_over():
    assert tune.tune(KERNEL, [lambda: X], X, dry=False, until=0.0) == ({}, 1.0)


def test_a_gain_within_noise_changes_nothing(monkeypatch):
    monkeypatch.setattr(tune, "seconds", lambda call, dry: 1 - 1e-5 * launch.config(KERNEL, X)["BLOCK"])
    assert tune.tune(KERNEL, [lambda: X], X, dry=False) == ({}, 1.0)


def test_not_a_number_is_not_the_same_result():
    assert not tune.agree(torch.tensor([torch.nan]), torch.ones(1), torch.float32)
    assert tune.agree((torch.ones(2), torch.ones(0)), (torch.ones(2), torch.ones(0)), torch.float32)


def test_the_vendors_product_is_a_candidate():
    settings = launch.config("linear_activate", torch.zeros(1, dtype=torch.float16))
    assert {"fused": False} in list(tune.candidates("linear_activate", settings))


def test_a_dry_run_writes_a_table(tmp_path):
    products = ("linear_activate", "linear_activate_middle", "linear_activate_small")
    output, kernels = tmp_path / "configs.json", {*products, "linear_swap_add", "pair", "pair_backward"}
    tune.main(["--dry", "--types", "float16", "--kernels", "linear", "pair", "--output", str(output)])
    written = json.loads(output.read_text())
    section = written.pop(f"{launch.architecture(torch.device('cpu'))} float16")
    assert set(section) == kernels
    assert written == TABLES


def test_every_kernel_with_settings_has_a_call(monkeypatch):
    sizes = tune.Sizes(rows=16, wide=16, atoms=2, degree=2, channels=16)
    asked, config, kernels_of = [], launch.config, {}
    monkeypatch.setattr(launch, "config", lambda name, x: asked.append(name) or config(name, x))
    for kernel, calls in tune.calls_by_kernel(TABLES["default"], sizes, torch.float16, X.device).items():
        if calls[0] not in kernels_of:
            asked.clear()
            gemm._prepared.cache_clear()
            calls[0]()
            kernels_of[calls[0]] = set(asked)
        assert kernel in kernels_of[calls[0]]


def test_no_section_of_the_committed_table_stands_twice():
    def unique(pairs):
        assert len({name for name, _ in pairs}) == len(pairs), [name for name, _ in pairs]
        return dict(pairs)

    json.loads(tune.COMMITTED.read_text(), object_pairs_hook=unique)


def test_the_committed_table_has_the_layout_that_the_tuner_writes(tmp_path):
    tune.write(tmp_path / "same.json", "", {})
    assert (tmp_path / "same.json").read_text() == tune.COMMITTED.read_text()
