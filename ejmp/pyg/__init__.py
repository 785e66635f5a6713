"""PyTorch Geometric: graphs from and to its `Data`, our stores as its datasets, its datasets as our stores.

`torch_geometric` is an extra (`pip install ejmp[pyg]`), imported by what needs it when that is called.
"""

from typing import TYPE_CHECKING, Any

from ejmp.pyg.conversion import MD17, QM9, Labels, convert, structures
from ejmp.pyg.exchange import from_data, to_data

if TYPE_CHECKING:
    from ejmp.pyg.dataset import StoreDataset

__all__ = ["MD17", "QM9", "Labels", "StoreDataset", "convert", "from_data", "structures", "to_data"]


def __getattr__(name: str) -> Any:
    if name != "StoreDataset":
        raise AttributeError(f"module 'ejmp.pyg' has no attribute {name!r}")
    from ejmp.pyg.dataset import StoreDataset  # noqa: PLC0415, it needs torch_geometric

    return StoreDataset
