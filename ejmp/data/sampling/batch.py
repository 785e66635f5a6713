"""A batch: one graph with its labels, and the packing that moves it between processes in one piece."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ejmp.graph.build import build_graph
from ejmp.graph.graph import AtomGraph
from ejmp.graph.settings import GraphSettings
from ejmp.graph.structure import Structure

ALIGNMENT = 64
"""Every tensor of a packed batch begins at a multiple of this many bytes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """B structures with N atoms as one graph, and what is known of them.

    A label that is missing is NaN: a loss that forgets to leave it out is NaN and not quietly wrong.
    """

    graph: AtomGraph
    """Graph of all structures."""
    energy: Tensor
    """Total energies, [B] float64, eV; NaN where missing."""
    forces: Tensor
    """Forces, [N, 3] in the graph's dtype, eV/A; NaN where missing."""
    fixed: Tensor
    """Which atoms are held in place, [N] bool; metrics leave them out (losses do not, as upstream)."""
    targets: Mapping[str, Tensor]
    """Other labels by name, [B] float64 each; NaN where a structure has no label of that name."""
    dataset: Tensor
    """Number of the dataset that each structure comes from, [B] int64."""
    ids: tuple[str, ...]
    """Ids of the B structures, unique within a dataset."""
    position: int
    """Position at which the sampler goes on after this batch; checkpoints keep it."""

    @property
    def has_energy(self) -> Tensor:
        """Which structures have an energy, [B] bool."""
        return ~self.energy.isnan()

    @property
    def has_forces(self) -> Tensor:
        """Which atoms have all three components of their force, [N] bool."""
        return ~self.forces.isnan().any(1)

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on another device, in one copy."""
        return pack(self).to(device).unpack()


def make_batch(
    structures: Sequence[Structure],
    dataset: Sequence[int],
    *,
    settings: GraphSettings | Sequence[GraphSettings] | None = None,
    dtype: torch.dtype = torch.float32,
    position: int = 0,
) -> Batch:
    """Build the graph of some structures and collect their labels.

    Args:
        structures: B structures.
        dataset: number of each structure's dataset, [B].
        settings: how graphs are made, of all or of each structure; None: as `GraphSettings` does by default.
        dtype: type of distances, vectors and forces.
        position: position of the sampler after this batch.

    Raises:
        ValueError: for what `build_graph` refuses, and for labels whose shape does not fit the atoms.
    """
    graph = build_graph(structures, settings=settings or GraphSettings(), dtype=dtype)
    names = sorted({name for structure in structures for name in structure.targets})
    missing = float("nan")
    energies = [missing if s.energy is None else s.energy for s in structures]
    forces = [_per_atom(s, b, "forces", np.full((len(s.numbers), 3), missing)) for b, s in enumerate(structures)]
    fixed = [_per_atom(s, b, "fixed", np.zeros(len(s.numbers), bool)) for b, s in enumerate(structures)]
    return Batch(
        graph=graph,
        energy=torch.tensor(energies, dtype=torch.float64),
        forces=torch.from_numpy(np.concatenate(forces)).to(dtype),
        fixed=torch.from_numpy(np.concatenate(fixed)),
        targets={
            name: torch.tensor([s.targets.get(name, missing) for s in structures], dtype=torch.float64)
            for name in names
        },
        dataset=torch.tensor(dataset, dtype=torch.int64),
        ids=tuple(s.id for s in structures),
        position=position,
    )


def _per_atom(structure: Structure, b: int, name: str, default: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    value = getattr(structure, name)
    if value is None:
        return default
    array = np.asarray(value, dtype=default.dtype)
    if array.shape != default.shape:
        raise ValueError(f"structure {b}: {name}: expected {list(default.shape)}, got {list(array.shape)}")
    return array


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The place of a tensor in a buffer."""

    start: int
    """First byte of the tensor in the buffer."""
    dtype: torch.dtype
    """Type of the tensor."""
    shape: torch.Size
    """Shape of the tensor."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """A batch whose tensors lie in one buffer: one shared-memory segment, one pinned block, one copy to a device.

    Its forty tensors on their own would each cost a file descriptor and a message.
    """

    buffer: Tensor
    """All tensors one after the other, as bytes (uint8)."""
    template: Any = field(repr=False)
    """The batch with a `Slot` in place of each tensor."""

    def pin_memory(self) -> Self:
        """Return the packed batch in page-locked memory; torch's DataLoader calls this."""
        return dataclasses.replace(self, buffer=self.buffer.pin_memory())

    def to(self, device: torch.device | str) -> Self:
        """Return the packed batch on another device; from pinned memory the copy runs in the background."""
        return dataclasses.replace(self, buffer=self.buffer.to(device, non_blocking=self.buffer.is_pinned()))

    def unpack(self) -> Any:
        """Return the batch; its tensors share the buffer's memory.

        For autograd they are not views: one may be changed in place while another is saved for a backward pass.
        """

        def view(slot: Slot) -> Tensor:
            stop = slot.start + slot.shape.numel() * slot.dtype.itemsize
            return self.buffer[slot.start : stop].view(slot.dtype).view(slot.shape).data

        return _replace(self.template, Slot, view)


def pack(batch: Batch) -> Packed:
    """Copy all tensors of a batch into one buffer."""
    tensors: list[tuple[Slot, Tensor]] = []
    end = 0

    def place(tensor: Tensor) -> Slot:
        nonlocal end
        slot = Slot(start=end, dtype=tensor.dtype, shape=tensor.shape)
        tensors.append((slot, tensor))
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return slot

    template = _replace(batch, Tensor, place)
    packed = Packed(buffer=torch.empty(end, dtype=torch.uint8, device=batch.energy.device), template=template)
    for slot, tensor in tensors:
        packed.buffer[slot.start : slot.start + tensor.nbytes].view(slot.dtype).view(slot.shape).copy_(tensor)
    return packed


def _replace(value: Any, kind: type, new: Callable[[Any], Any]) -> Any:
    """Return a copy of a value in which everything of a kind, in its fields at any depth, is replaced."""
    if isinstance(value, kind):
        return new(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _replace(getattr(value, f.name), kind, new) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, dict):
        return {key: _replace(item, kind, new) for key, item in value.items()}
    return value
