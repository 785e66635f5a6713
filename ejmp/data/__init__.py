"""Datasets: readers, one record store, and how a mix of them is sampled."""

from ejmp.data.batch import Batch, make_batch
from ejmp.data.convert import convert
from ejmp.data.embedded import DEMO_DOWNSTREAM, DEMO_MIX, demo
from ejmp.data.formats import Format, Part
from ejmp.data.info import Dataset, DatasetInfo, Statistics
from ejmp.data.loader import Loader
from ejmp.data.mix import InOrder, MixSampler
from ejmp.data.read import FORMATS, read
from ejmp.data.record import DamagedRecord
from ejmp.data.store import Store, open_store, verify
from ejmp.structure import Structure

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
    "Loader",
    "MixSampler",
    "Part",
    "Statistics",
    "Store",
    "Structure",
    "convert",
    "demo",
    "make_batch",
    "open_store",
    "read",
    "verify",
]
