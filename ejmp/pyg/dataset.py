"""A record store as a PyG dataset."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ejmp.data.info import Dataset as RecordDataset
from ejmp.data.store.dataset import open_store
from ejmp.graph.structure import Structure
from ejmp.pyg.exchange import import_pyg

pyg = import_pyg()


class StoreDataset(pyg.data.Dataset):
    """A record store, or another dataset of `ejmp.data`, as a PyG dataset of `Data`.

    Each has z, tags and fixed [n] (whether an atom is held in place), pos [n, 3] (A), cell [1, 3, 3] (A; zero for a
    molecule), pbc [1, 3], natoms, id, and what the record has of energy [1] (eV; also as y), forces [n, 3] (eV/A), and
    targets, a mapping of tensors [1]. PyG makes batches of records that have the same labels.
    """

    def __init__(
        self,
        store: RecordDataset | str | Path,
        transform: Callable[[Any], Any] | None = None,
        *,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        """Open a dataset.

        Args:
            store: the folder of one split, or a dataset that is open.
            transform: called with each `Data` when it is read.
            dtype: type of positions, cells and labels.

        Raises:
            ValueError: if there is no dataset, or it is damaged.
            ImportError: if torch_geometric is not installed.
        """
        super().__init__(root=None, transform=transform)
        self.store = open_store(store) if isinstance(store, str | Path) else store
        self.dtype = dtype

    def len(self) -> int:
        """Return the number of structures."""
        return len(self.store)

    def get(self, idx: int) -> Any:
        """Read the structure of a number."""
        return to_labelled_data(self.store[idx], self.dtype)


def to_labelled_data(structure: Structure, dtype: torch.dtype) -> Any:
    """Return a structure with its labels as a `Data`.

    Args:
        structure: a structure as arrays, as readers and stores yield it.
        dtype: type of positions, cell and labels.
    """

    def tensor(value: Any, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.from_numpy(np.array(value)).to(kind)  # a copy, because a record cannot be written to

    n = len(structure.numbers)
    fields: dict[str, Any] = {
        "z": tensor(structure.numbers, torch.int64),
        "pos": tensor(structure.positions),
        "cell": tensor(np.zeros((3, 3)) if structure.cell is None else structure.cell)[None],
        "pbc": tensor(np.broadcast_to(structure.pbc, 3), torch.bool)[None],
        "tags": tensor(np.full(n, 2) if structure.tags is None else structure.tags, torch.int64),
        "fixed": tensor(np.zeros(n) if structure.fixed is None else structure.fixed, torch.bool),
        "natoms": n,
        "id": structure.id,
    }
    if structure.energy is not None:
        fields["energy"] = fields["y"] = tensor([structure.energy])
    if structure.forces is not None:
        fields["forces"] = tensor(structure.forces)
    if structure.targets:
        fields["targets"] = {name: tensor([value]) for name, value in structure.targets.items()}
    return pyg.data.Data(**fields)
