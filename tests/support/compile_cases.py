"""What the tests of `JMP.compile` share: small models, devices without values."""

import contextlib
import dataclasses

import torch
from ase.build import molecule

import ejmp
from support.inputs import require_native, require_triton
from support.tolerances import relative_error


def allow_meta(monkeypatch, backend):
    """Let models of a backend run on the "meta" device, whose tensors have no values and whose ops do nothing."""
    monkeypatch.setattr("ejmp.model.jmp.resolve", lambda *_: backend)
    monkeypatch.setattr("ejmp.model.jmp.check_precision", lambda *_: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def make_model(config, backend="reference", precision="fp32", **sizes):
    if backend == "native":
        require_native()
    if backend == "triton":
        require_triton()
    torch.manual_seed(0)
    sizes = {"blocks": 1, "num_tasks": 2, **sizes}
    model = ejmp.JMP(dataclasses.replace(config, **sizes), backend=backend, precision=precision)
    return model.double() if precision == "fp32" else model


def graph_of(model, *names):
    return ejmp.build_graph([molecule(name) for name in names], 8.0, dtype=model.dtype)


def assert_equal_outputs(out, expected, allowed=1e-12):
    assert relative_error(out.energy.detach(), expected.energy.detach()) < allowed
    assert relative_error(out.forces.detach(), expected.forces.detach()) < allowed
