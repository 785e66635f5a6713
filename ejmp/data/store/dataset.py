"""A dataset of shards: read any structure by its number, from any number of processes, and detect damage."""

import errno
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal

import numpy as np

from ejmp.data.readers.impossible import check_possible
from ejmp.data.readers.validation import current_checks
from ejmp.data.store.durable import hash_file
from ejmp.data.store.manifest import FILE_NAME, read_manifest
from ejmp.data.store.record import DamagedRecord, decode
from ejmp.data.store.shard import PLACE, Shard, estimate_edges, key_of
from ejmp.graph.structure import Structure
from ejmp.limits import RefusedFileError, check_regular, open_regular

INDEX_FILES = {"num_atoms": np.dtype("<i4"), "num_edges": np.dtype("<i4"), "places": PLACE}
"""Type of the array in each index file `<name>.npy`; it holds one value per structure of all shards."""
MOST_HEADER = 4096
"""Most bytes that an index file has besides its array."""
OPEN_SHARDS = 64
"""Most shards a store keeps open: 120 million structures have thousands, more than a process may open."""


def open_store(path: str | Path, *, on_error: Literal["raise", "skip"] = "raise") -> "Store":
    """Open one split of a dataset for reading.

    Args:
        path: the folder that holds `dataset.json`.
        on_error: what iterating over the store does about a structure that cannot be read: raise, or leave it out
            and note it in `Store.skipped`. Reading it by its number raises `DamagedRecord` in any case, because no
            other structure has that number.

    Raises:
        ValueError: if there is no dataset, or `dataset.json` or the index is damaged.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error: expected "raise" or "skip", got {on_error!r}')
    return Store(Path(path), on_error)


class Store:
    """The structures of one split, read from its shards when they are asked for.

    A store can be pickled, forked, and used by several threads.
    """

    def __init__(self, path: Path, on_error: Literal["raise", "skip"]) -> None:
        self.path = path
        self.on_error: Literal["raise", "skip"] = on_error
        self.manifest = read_manifest(path)
        self.info = self.manifest.info
        self._ends = np.cumsum([shard.count for shard in self.manifest.shards])
        if len(self._ends) == 0 or self._ends[-1] != self.info.count:
            raise ValueError(f"{path / FILE_NAME}: expected {self.info.count} structures in the shard table")
        self.num_atoms, self.num_edges, self._places = (self._map(name) for name in INDEX_FILES)
        self._files: dict[int, _File] = {}
        self.skipped: dict[int, str] = {}
        """Why structures were left out, by their numbers."""

    def __len__(self) -> int:
        return self.info.count

    def __getitem__(self, index: int) -> Structure:
        """Read the structure of a number; negative numbers count from the end.

        Raises:
            IndexError: if there is no structure of that number.
            DamagedRecord: naming shard and key, if it is missing or not what was written.
        """
        number = operator.index(index)
        number += len(self) if number < 0 else 0
        if not 0 <= number < len(self):
            raise IndexError(f"index: expected {-len(self)} to {len(self) - 1}, got {index}")
        which = int(np.searchsorted(self._ends, number, side="right"))
        try:
            return decode(self._open(which).read(self._places[number]), number)
        except (DamagedRecord, RefusedFileError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.EIO):
                raise  # too many open files or no permission is no damage, and not to be skipped
            name = self.path / self.manifest.shards[which].name
            raise DamagedRecord(f"{name}, key {key_of(number)}: {error}") from error

    def __iter__(self) -> Iterator[Structure]:
        for number in range(len(self)):
            try:
                structure = self[number]
            except DamagedRecord as error:
                if self.on_error == "raise":
                    raise
                self.skipped[number] = str(error)
                continue
            yield structure

    def __getstate__(self) -> tuple[Path, Literal["raise", "skip"]]:
        return self.path, self.on_error

    def __setstate__(self, state: tuple[Path, Literal["raise", "skip"]]) -> None:
        self.__init__(*state)

    def _open(self, which: int) -> "_File":
        file = self._files.get(which)
        if file is None:
            shard = self.manifest.shards[which]
            file = self._files[which] = _File(self.path / shard.name, shard)
            if len(self._files) > OPEN_SHARDS:
                self._files.pop(next(iter(self._files)), None)
        return file

    def _map(self, name: str) -> np.ndarray[Any, Any]:
        path, dtype = self.path / f"{name}.npy", INDEX_FILES[name]
        try:
            size, expected = check_regular(path).st_size, self.info.count * dtype.itemsize
            if not expected < size <= expected + MOST_HEADER:
                raise ValueError(f"expected {expected} bytes and a header, got {size}")  # noqa: TRY301
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except RefusedFileError:
            raise
        except (ValueError, OSError, EOFError, SyntaxError, TokenError) as error:
            raise ValueError(f"{path}: missing or damaged: {error}") from error
        if array.dtype != dtype or array.shape != (self.info.count,):
            raise ValueError(f"{path}: expected {dtype} [{self.info.count}], got {array.dtype} {list(array.shape)}")
        return array


class _File:
    """A shard that is open for reading; it is closed when nothing uses it any more, so that threads need no lock."""

    def __init__(self, path: Path, shard: Shard) -> None:
        self.descriptor = -1
        with open_regular(path) as file:
            self.descriptor = os.dup(file.fileno())
        self.bytes = os.fstat(self.descriptor).st_size
        if self.bytes != shard.bytes:
            raise DamagedRecord(f"expected a shard of {shard.bytes} bytes, got {self.bytes}: cut off or overwritten")

    def read(self, place: Any) -> bytes:
        offset, size = int(place["offset"]), int(place["size"])
        if offset + size > self.bytes:
            raise DamagedRecord(f"the index says byte {offset} to {offset + size} of a shard of {self.bytes}")
        return os.pread(self.descriptor, size, offset)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def verify(path: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Check every byte of a dataset: index and shards against their hashes, and that every record decodes.

    Structures that no conversion lets through, with atoms on top of each other or a flat cell, are problems as well.

    Yields:
        The name of each file when it is done, and what is wrong with it.

    Raises:
        ValueError: if there is no dataset, or `dataset.json` is damaged, or the index cannot be used.
    """
    store = open_store(path)
    for name in INDEX_FILES:
        file = store.path / f"{name}.npy"
        right = hash_file(file) == store.manifest.index.get(file.name)
        yield file.name, [] if right else [f"{file}: its hash is not that in {FILE_NAME}"]
    first = 0
    for shard in store.manifest.shards:
        yield shard.name, _verify_shard(store, shard, range(first, first + shard.count))
        first += shard.count


def _verify_shard(store: Store, shard: Shard, numbers: range) -> list[str]:
    path, problems = store.path / shard.name, []
    if not path.is_file() or path.stat().st_size != shard.bytes:
        return [f"{path}: missing, or not of {shard.bytes} bytes"]
    if hash_file(path) != shard.hash:
        problems.append(f"{path}: its hash is not that in {FILE_NAME}")
    for number in numbers:
        try:
            structure = store[number]
        except DamagedRecord as error:
            problems.append(str(error))
            continue
        try:
            check_possible(structure, allow_close=current_checks().allow_close)
        except ValueError as error:
            problems.append(f"{path}, key {key_of(number)}, structure {structure.id}: {error}")
        known = (store.num_atoms[number], store.num_edges[number])
        if (len(structure.numbers), estimate_edges(structure)) != known:
            problems.append(f"{path}, key {key_of(number)}: the index says {known[0]} atoms, {known[1]} edges")
    return problems
