"""Datasets: readers, one record store, and how a mix of them is sampled."""

from ejmp.data.embedded import DEMO_DOWNSTREAM, DEMO_MIX, demo
from ejmp.data.formats import Format, Part
from ejmp.data.info import Dataset, DatasetInfo, Statistics
from ejmp.structure import Structure

__all__ = ["DEMO_DOWNSTREAM", "DEMO_MIX", "Dataset", "DatasetInfo", "Format", "Part", "Statistics", "Structure", "demo"]
