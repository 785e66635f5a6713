"""Datasets: readers, one record store, and how a mix of them is sampled."""

from ejmp.data.convert import convert
from ejmp.data.formats import Format, Part
from ejmp.data.info import Dataset, DatasetInfo, Statistics
from ejmp.data.record import DamagedRecord
from ejmp.data.store import Store, open_store, verify
from ejmp.structure import Structure

__all__ = [
    "DamagedRecord",
    "Dataset",
    "DatasetInfo",
    "Format",
    "Part",
    "Statistics",
    "Store",
    "Structure",
    "convert",
    "open_store",
    "verify",
]
