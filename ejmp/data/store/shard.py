"""A shard: one LMDB file of records, and the place of each record in the file.

LMDB trusts its own pages: a flipped bit in them can make it read outside the file's map, as does a file cut short, and
then the process dies. Hashing a whole shard before LMDB opens it would prevent that, and would also have every worker
of a training run read the whole dataset before it trains. So the place of every record is written beside the shard, and
reading a record is one `pread` there, which needs neither LMDB's pages nor LMDB: what is read is the record, and the
record's hash covers all of it. The file stays an ordinary LMDB, which any LMDB library reads.
"""

import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ejmp.data.store.durable import CANNOT_WRITE, hash_file, written
from ejmp.data.store.record import encode
from ejmp.graph.structure import Structure

MAX_NEIGHBORS = 30
"""Neighbours per atom at which edges are estimated."""
PLACE = np.dtype([("offset", "<u8"), ("size", "<u4")])
"""Place of a record in its shard: first byte and number of bytes."""
_PAGE = 4096


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One line of the shard table in `dataset.json`."""

    name: str
    """Name of the file."""
    count: int
    """Number of structures in it."""
    bytes: int
    """Size of the file."""
    hash: str
    """Hash of the whole file; `ejmp data verify` compares it."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """What is known of each structure of a shard without reading its record."""

    num_atoms: np.ndarray[Any, Any]
    """Number of atoms, [len] int32."""
    num_edges: np.ndarray[Any, Any]
    """Estimated main edges, [len] int32, from `estimate_edges`."""
    places: np.ndarray[Any, Any]
    """Places of the records in the shard, [len] PLACE."""


def key_of(number: int) -> str:
    """Return the LMDB key of a structure's record: its number in the dataset, 12 digits."""
    return f"{number:012d}"


def estimate_edges(structure: Structure) -> int:
    """Return about how many main edges a structure has at 30 neighbours, assuming that the cutoff reaches all of them.

    Every atom of a molecule has all others as neighbours, up to 30; in a crystal or slab it always has 30. At 12 A this
    is exact for molecules of at most 31 atoms, and within 12% of the graph's edges on the slabs, oxides and frameworks
    it was compared with; the estimate ignores the edges that closing the edge set under swapping adds or drops.
    """
    n = len(structure.numbers)
    return n * (MAX_NEIGHBORS if np.any(structure.pbc) else min(MAX_NEIGHBORS, n - 1))


def write_shard(path: Path, structures: Iterable[Structure], first: int = 0) -> tuple[Shard, Index]:
    """Write structures to a new shard, which appears under its name when it is complete and on disk.

    Args:
        path: the file to write; an existing one is replaced.
        structures: at least one structure; their records are held in memory until they are written.
        first: the number of the first of them in its dataset.

    Raises:
        ValueError: if there is no structure, or one cannot be encoded.
    """
    records, num_atoms, num_edges = [], [], []
    for number, structure in enumerate(structures, first):
        records.append(encode(structure, number))
        num_atoms.append(len(structure.numbers))
        num_edges.append(estimate_edges(structure))
    if not records:
        raise ValueError(f"{path}: structures: expected at least one, got none")
    with written(path) as temporary:
        places = _write_records(temporary, records, first)
        size, digest = temporary.stat().st_size, hash_file(temporary)
    shard = Shard(name=path.name, count=len(records), bytes=size, hash=digest)
    atoms, edges = np.array(num_atoms, np.int32), np.array(num_edges, np.int32)
    return shard, Index(num_atoms=atoms, num_edges=edges, places=places)


def _write_records(path: Path, records: Sequence[bytes], first: int) -> np.ndarray:
    """Write an LMDB file in one transaction, which leaves no free pages in it; return the PLACE of each record."""
    import lmdb  # noqa: PLC0415

    # A record with its key and its share of the tree takes less than two pages more than its bytes. The map is address
    # space, not disk.
    map_size = sum(map(len, records)) + (2 * len(records) + 64) * _PAGE
    environment = None
    try:
        environment = lmdb.open(str(path), subdir=False, lock=False, map_size=map_size, sync=False, readahead=False)
        with environment.begin(write=True) as transaction:
            for number, record in enumerate(records, first):
                transaction.put(key_of(number).encode(), record, append=True)
        environment.sync(True)  # noqa: FBT003 - lmdb 1.4 takes no keyword here
        with environment.begin(buffers=True) as transaction:
            # The values are views of the file's map: their addresses differ as their places in the file do.
            addresses = [np.frombuffer(value, np.uint8).ctypes.data for _, value in transaction.cursor()]
    except lmdb.Error as error:
        # The number of the system's error is in the text only.
        number = next((n for n in CANNOT_WRITE if os.strerror(n) in str(error)), errno.ENOSPC)
        raise OSError(number, f"LMDB: {error}", str(path)) from error
    finally:
        if environment is not None:
            environment.close()
    return _places(path, records, np.array(addresses, np.int64))


def _places(path: Path, records: Sequence[bytes], addresses: np.ndarray) -> np.ndarray:
    contents = np.memmap(path, np.uint8, "r")
    places = np.empty(len(records), PLACE)
    places["size"] = [len(record) for record in records]
    places["offset"] = addresses - addresses[0] + contents.tobytes().find(records[0])
    for place, record in zip(places, records, strict=True):
        offset = int(place["offset"])
        if contents[offset : offset + len(record)].tobytes() != record:
            raise RuntimeError(f"{path}: a record is not where LMDB put it")
    return places
