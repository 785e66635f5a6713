"""Datasets: readers, one record store, and how a mix of them is sampled."""

from ejmp.data.formats import Format, Part
from ejmp.data.info import Dataset, DatasetInfo, Statistics
from ejmp.data.read import FORMATS, read
from ejmp.structure import Structure

__all__ = ["FORMATS", "Dataset", "DatasetInfo", "Format", "Part", "Statistics", "Structure", "read"]
