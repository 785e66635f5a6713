"""What one more block of JMP-L asks of a GPU with Triton's kernels: calls and bytes, counted without one.

On the "meta" device nothing is computed, and every operation is seen with the shapes of what it reads and writes.
"""

import dataclasses

import pytest
import torch
from support.compile_cases import allow_meta, molecule
from support.inputs import ROOT, require_triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ejmp

WIDTH = 1024


class Count(TorchDispatchMode):
    """Counts operations, and how often an array of [edges, WIDTH] 16-bit numbers is read or written."""

    def __init__(self, num_edges):
        super().__init__()
        self.num_edges, self.operations, self.passes = num_edges, 0, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.overloadpacket.__name__.startswith(("empty", "new_empty", "detach")):
            return out
        self.operations += 1
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor) and x.ndim]
        of_edges = sum(x.numel() * x.itemsize for x in tensors if x.shape[0] == self.num_edges)
        self.passes += of_edges / (2 * WIDTH * self.num_edges)
        return out


def counted(blocks):
    """Return the counts of a forward pass with direct forces after the first one, which makes what is held."""
    with torch.device("meta"):
        model = ejmp.JMP(dataclasses.replace(ejmp.jmp_l(blocks=blocks), num_tasks=1), "triton", "bf16").eval()
    graph = ejmp.build_graph([molecule("C8H10N4O2")], 12.0).to("meta")
    with torch.no_grad():
        model(graph)
        with Count(graph.main.num_edges) as count:
            model(graph)
    return count


@pytest.fixture
def of_one_block(monkeypatch):
    require_triton()
    allow_meta(monkeypatch, "triton")
    two, three = counted(2), counted(3)
    return three.operations - two.operations, three.passes - two.passes


def test_one_more_block(of_one_block):
    """Before products took what follows them along, and what is made of weights was held: 158 and 135."""
    operations, passes = of_one_block
    page = " ".join((ROOT / "docs/backends.md").read_text().split())
    said = f"is {operations} operations, and reads or writes an array of all edges and channels {passes:.0f} times"
    assert operations <= 97
    assert passes <= 98
    assert said in page
