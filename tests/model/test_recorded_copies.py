"""Weights in 16 bits under a CUDA graph: cast once, read in place by every replay, and brought up to date before it.

On the CPU a tape stands for a CUDA graph: it keeps the operations of a call with the memory they read and wrote, and
replays these operations on that memory, and nothing else of the call.
"""

import pytest
import torch
from ase.build import molecule
from support.inputs import require_native
from support.tolerances import relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ejmp
from ejmp.graph.padding import Buckets, GraphShape
from ejmp.model.compiled import WARM_UP, Compiled


class Tape(TorchDispatchMode):
    """Records operations; called as `CudaGraphs` is, once per function."""

    def __init__(self):
        super().__init__()
        self.entries = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.entries.append((func, args, kwargs or {}, out))
        return out

    def __call__(self, function):
        for _ in range(WARM_UP):
            function()
        self.entries = []
        with self:
            result = function()
        entries = self.entries

        def launch():
            for func, args, kwargs, out in entries:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    same = isinstance(old, torch.Tensor) and old.data_ptr() == new.data_ptr()
                    if isinstance(old, torch.Tensor) and not same:
                        old.copy_(new)

        return result, launch


@pytest.fixture
def recorded(tiny_config, tiny_weights):
    """A model in bfloat16 with heads and forces, its tape, and a graph."""
    require_native()
    model = ejmp.JMP(tiny_config, "native", "bf16")
    model.load_state_dict(tiny_weights)
    model.eval()
    graph = ejmp.build_graph([molecule("CH3OH")], 8.0)
    tape = Tape()
    compiled = Compiled(model, "throughput", Buckets([GraphShape.holding(GraphShape.of(graph))], growth=None), None)
    compiled.record = tape
    model._compiled_call_impl = compiled
    return model, tape, graph


def casts_of_weights(tape, model):
    """How many operations of a tape cast the memory of a parameter to bfloat16."""
    places = {p.untyped_storage().data_ptr() for p in model.parameters() if p.ndim == 2}
    return sum(
        func is torch.ops.aten._to_copy.default
        and kwargs.get("dtype") == torch.bfloat16
        and args[0].untyped_storage().data_ptr() in places
        for func, args, kwargs, _out in tape.entries
    )


def differences(model, graph):
    """Relative differences of what is replayed, energies and gradient forces, from the model as it is."""
    found, forces = model(graph), ejmp.gradient_forces(model, graph)
    plain = model.on()
    return relative_error(found.energy, plain(graph).energy), relative_error(forces, ejmp.gradient_forces(plain, graph))


@torch.no_grad()
def test_replays_cast_no_weight(recorded):
    model, tape, graph = recorded
    model(graph)
    assert len(tape.entries) > 500
    assert casts_of_weights(tape, model) == 0
    ejmp.gradient_forces(model, graph)
    assert casts_of_weights(tape, model) == 0


@torch.no_grad()
def test_without_copies_each_weight_is_cast(recorded):
    """In training mode, where nothing is held: the count counts."""
    model, tape, graph = recorded
    model.train()
    model(graph)
    assert casts_of_weights(tape, model) > 60


@torch.no_grad()
def test_weights_that_change(recorded):
    """In place, by a state dict, by one that replaces them, and through views that no version counts."""
    model, _tape, graph = recorded
    assert max(differences(model, graph)) <= 0.05
    energy = model(graph).energy
    for parameter in model.parameters():
        parameter.mul_(1.03)
    assert max(differences(model, graph)) <= 0.05
    assert relative_error(model(graph).energy, energy) > 0.1
    state = {name: 0.97 * value for name, value in model.state_dict().items()}
    for assign in (False, True):
        model.load_state_dict(state, assign=assign)
        assert max(differences(model, graph)) <= 0.05
    for parameter in model.parameters():
        parameter.data.mul_(1.03)
    model.train()
    model.eval()
    assert max(differences(model, graph)) <= 0.05


@torch.no_grad()
def test_other_structures(recorded):
    model, _tape, graph = recorded
    model(graph)
    assert max(differences(model, ejmp.build_graph([molecule("CH4")], 8.0))) <= 0.05
