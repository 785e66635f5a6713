"""What the tests of `JMP.compile` share: small models, devices without values."""

import contextlib
import dataclasses
import re

import numpy as np
import torch

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


NUMBERS = {"H": 1, "C": 6, "N": 7, "O": 8, "S": 16}


def molecule(formula):
    """Atoms of a formula, each 1.2 A from one before it and not nearer to others; machines with a GPU have no ase."""
    counted = re.findall(r"([A-Z])(\d*)", formula)
    numbers = [NUMBERS[symbol] for symbol, count in counted for _ in range(int(count or 1))]
    random, positions = np.random.default_rng(0), [np.zeros(3)]
    while len(positions) < len(numbers):
        step = random.normal(size=3)
        place = positions[random.integers(len(positions))] + 1.2 * step / np.linalg.norm(step)
        if min(np.linalg.norm(place - other) for other in positions) > 1.1:
            positions.append(place)
    return ejmp.Structure(numbers=numbers, positions=positions)


def graph_of(model, *names):
    return ejmp.build_graph([molecule(name) for name in names], 8.0, dtype=model.dtype)


def assert_equal_outputs(out, expected, allowed=1e-12):
    assert relative_error(out.energy.detach(), expected.energy.detach()) < allowed
    assert relative_error(out.forces.detach(), expected.forces.detach()) < allowed
