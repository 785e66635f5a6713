"""Datasets: readers, one record store, and how a mix of them is sampled.

The public names are imported when they are first used, so that `ejmp data --help` need not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ejmp.data.embedded import DEMO_DOWNSTREAM, DEMO_MIX, demo
    from ejmp.data.info import Dataset, DatasetInfo, LabelRow, Statistics
    from ejmp.data.readers.by_name import FORMATS, read
    from ejmp.data.readers.format import Format, Part
    from ejmp.data.readers.options import ReadOptions
    from ejmp.data.readers.validation import checking
    from ejmp.data.sampling.batch import Batch, make_batch
    from ejmp.data.sampling.loader import Loader
    from ejmp.data.sampling.mix import InOrder, MixSampler
    from ejmp.data.store.conversion import convert
    from ejmp.data.store.dataset import Store, open_store, verify
    from ejmp.data.store.record import DamagedRecord
    from ejmp.graph.structure import Structure
    from ejmp.limits import Limits, limiting

__all__ = [
    "DEMO_DOWNSTREAM",
    "DEMO_MIX",
    "FORMATS",
    "Batch",
    "DamagedRecord",
    "Dataset",
    "DatasetInfo",
    "Format",
    "InOrder",
    "LabelRow",
    "Limits",
    "Loader",
    "MixSampler",
    "Part",
    "ReadOptions",
    "Statistics",
    "Store",
    "Structure",
    "checking",
    "convert",
    "demo",
    "limiting",
    "make_batch",
    "open_store",
    "read",
    "verify",
]
_MODULES = {
    "data.embedded": ("DEMO_DOWNSTREAM", "DEMO_MIX", "demo"),
    "data.info": ("Dataset", "DatasetInfo", "LabelRow", "Statistics"),
    "data.readers.by_name": ("FORMATS", "read"),
    "data.readers.format": ("Format", "Part"),
    "data.readers.options": ("ReadOptions",),
    "data.readers.validation": ("checking",),
    "data.sampling.batch": ("Batch", "make_batch"),
    "data.sampling.loader": ("Loader",),
    "data.sampling.mix": ("InOrder", "MixSampler"),
    "data.store.conversion": ("convert",),
    "data.store.dataset": ("Store", "open_store", "verify"),
    "data.store.record": ("DamagedRecord",),
    "graph.structure": ("Structure",),
    "limits": ("Limits", "limiting"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ejmp.data' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ejmp.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
