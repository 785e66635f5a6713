"""Datasets: readers, one record store, and how a mix of them is sampled."""

from ejmp.data.embedded import DEMO_DOWNSTREAM, DEMO_MIX, demo
from ejmp.data.info import Dataset, DatasetInfo, Statistics
from ejmp.data.readers.by_name import FORMATS, read
from ejmp.data.readers.format import Format, Part
from ejmp.data.sampling.batch import Batch, make_batch
from ejmp.data.sampling.loader import Loader
from ejmp.data.sampling.mix import InOrder, MixSampler
from ejmp.data.store.conversion import convert
from ejmp.data.store.dataset import Store, open_store, verify
from ejmp.data.store.record import DamagedRecord
from ejmp.graph.structure import Structure

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
