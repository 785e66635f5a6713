"""How much memory a call needs beyond what was there before it."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ejmp.graph.graph import EDGE_SETS, AtomGraph
from ejmp.measure.timing import synchronize
from ejmp.model.jmp import JMP


class StoragePeak(TorchDispatchMode):
    """Follow the bytes of all tensors made inside the context; scratch memory inside an operation is not seen.

    Args:
        known: tensors that were there before and do not count; what is no tensor is passed over.
    """

    def __init__(self, known: Iterable[Any]) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.seen = {value.untyped_storage()._cdata for value in known if isinstance(value, Tensor)}  # noqa: SLF001

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note the storages it made."""
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.seen:  # noqa: SLF001
                    self.seen.add(storage._cdata)  # noqa: SLF001
                    self.held += storage.nbytes()
                    self.peak = max(self.peak, self.held)
                    weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())  # noqa: SLF001
        return out

    def _release(self, storage: int, size: int) -> None:
        self.seen.discard(storage)
        self.held -= size


def peak_memory(call: Callable[[], Any], device: torch.device, known: Iterable[Any]) -> int:
    """Return the most bytes that a call holds beyond what was there before it.

    Args:
        call: what to run, once.
        device: where it works; on CUDA torch's allocator is asked, on a CPU new tensors are followed.
        known: tensors that were there before; only a CPU's meter needs them.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with StoragePeak(known) as memory:
        call()
    return memory.peak


def tensors_of(model: JMP, graph: AtomGraph) -> list[Any]:
    """Return the tensors of a model and a batch, to be passed as `known`."""
    owners = (graph, *(getattr(graph, name) for name in EDGE_SETS))
    return [*(value for owner in owners for value in vars(owner).values()), *model.state_dict().values()]
