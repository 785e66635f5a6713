"""LMDB files, read page by page as ordinary files.

The lmdb package maps a file into memory: a truncated or damaged one ends the process (SIGBUS, SIGSEGV), and opening a
file twice is an error. Here a damaged file is a ValueError, and reading needs no lock and no package. The layout is
that of lmdb's mdb.c (little-endian, 64-bit, format version 1), for files without sub-directory and duplicate keys.
"""

import os
import struct
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from ejmp.limits import check_limit, open_regular

MAGIC, VERSION = 0xBEEFC0DE, 1
BRANCH, LEAF, OVERFLOW, META = 1, 2, 4, 8
BIG_DATA = 1
"""Node flag: the value is on overflow pages."""
HEADER = struct.Struct("<QHHHH")  # page number, padding, flags, and the ends of the free space
META_BODY = struct.Struct("<IIQQ IHHQQQQQ IHHQQQQQ QQ")
NODE = struct.Struct("<HHHH")  # two halves of a size, flags, key length
EMPTY = (1 << 64) - 1
MAX_DEPTH = 32


class LmdbFile:
    """The last commit of an LMDB file, read-only; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            ValueError: if it is not an LMDB file, or not a regular one, or shorter than its last commit says.
        """
        with open_regular(path) as file:
            self._fd = os.dup(file.fileno())
        self._path = path
        try:
            self._size = os.fstat(self._fd).st_size
            self._read_meta()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def get(self, key: bytes) -> bytes | None:
        """Return the value of a key, or None if there is no such key.

        Raises:
            ValueError: if a page on the way is damaged.
        """
        number = self._root
        if number == EMPTY:
            return None
        for _ in range(MAX_DEPTH):
            page = self._page(number)
            flags, count = self._shape(page, number)
            if flags & LEAF:
                return self._leaf_value(page, count, key)
            at = bisect_right(range(1, count), key, key=_key_of(page))
            low, high, top, _ = NODE.unpack_from(page, _node(page, at))
            number = low | high << 16 | top << 32
        raise ValueError(f"damaged LMDB file: more than {MAX_DEPTH} levels")

    def _read_meta(self) -> None:
        first = self._meta(0, 0)
        if first is None:
            raise ValueError("not an LMDB file of version 1")
        if first[4] not in [1 << k for k in range(9, 17)]:
            raise ValueError(f"damaged LMDB file: pages of {first[4]} bytes")
        second = self._meta(1, first[4])
        last = second if second is not None and second[-1] > first[-1] else first
        self._page_size: int = first[4]
        flags, self.entries, self._root, last_page = last[13], last[18], last[19], last[20]
        if flags:
            raise ValueError(f"an LMDB file with flags {flags:#x} is not read here")
        if (last_page + 1) * self._page_size > self._size:
            raise ValueError(
                f"truncated LMDB file: {self._size} bytes of {(last_page + 1) * self._page_size} are there"
            )
        if self.entries * NODE.size > self._size:
            raise ValueError(f"damaged LMDB file: {self.entries} entries in {self._size} bytes")
        check_limit(self._path, "frames", self.entries, "records")

    def _meta(self, number: int, at: int) -> tuple[int, ...] | None:
        raw = os.pread(self._fd, HEADER.size + META_BODY.size, at)
        if len(raw) < HEADER.size + META_BODY.size:
            return None
        page, _, flags, _, _ = HEADER.unpack_from(raw)
        body = META_BODY.unpack_from(raw, HEADER.size)
        right = page == number and flags & META and body[:2] == (MAGIC, VERSION)
        return body if right else None

    def _page(self, number: int, count: int = 1) -> bytes:
        """Read pages that follow one another, from a page's number on.

        Raises:
            ValueError: if they are beyond the end of the file.
        """
        if (number + count) * self._page_size > self._size:
            raise ValueError(f"damaged LMDB file: page {number} is beyond its end")
        raw = os.pread(self._fd, count * self._page_size, number * self._page_size)
        if len(raw) < count * self._page_size or HEADER.unpack_from(raw)[0] != number:
            raise ValueError(f"damaged LMDB file: page {number} is not where it should be")
        return raw

    def _shape(self, page: bytes, number: int) -> tuple[int, int]:
        """Return flags and number of nodes of a page of keys."""
        _, _, flags, lower, _ = HEADER.unpack_from(page)
        count = (lower - HEADER.size) // 2
        if flags & (BRANCH | LEAF) not in (BRANCH, LEAF) or count < 1 or lower > self._page_size:
            raise ValueError(f"damaged LMDB file: page {number} is no page of keys")
        return flags, count

    def _leaf_value(self, page: bytes, count: int, key: bytes) -> bytes | None:
        at = bisect_right(range(count), key, key=_key_of(page)) - 1
        if at < 0 or _key_of(page)(at) != key:
            return None
        start = _node(page, at)
        low, high, flags, key_length = NODE.unpack_from(page, start)
        size, start = low | high << 16, start + NODE.size + key_length
        if flags & ~BIG_DATA:
            raise ValueError(f"an LMDB node with flags {flags:#x} is not read here")
        if not flags:
            return _piece(page, start, size)
        check_limit(self._path, "record_bytes", size, f"bytes of record {key.decode(errors='replace')}")
        number = struct.unpack("<Q", _piece(page, start, 8))[0]
        value = self._page(number, -(-(HEADER.size + size) // self._page_size))
        if not HEADER.unpack_from(value)[2] & OVERFLOW:
            raise ValueError(f"damaged LMDB file: page {number} holds no value")
        return value[HEADER.size : HEADER.size + size]


def _node(page: bytes, at: int) -> int:
    """Return the byte at which a node of a page starts."""
    start = struct.unpack_from("<H", page, HEADER.size + 2 * at)[0]
    if start + NODE.size > len(page):
        raise ValueError("damaged LMDB file: a node beyond its page")
    return start


def _key_of(page: bytes) -> Callable[[int], bytes]:
    """Return a function from the number of a node on a page to the node's key."""

    def key(at: int) -> bytes:
        start = _node(page, at)
        return _piece(page, start + NODE.size, NODE.unpack_from(page, start)[3])

    return key


def _piece(page: bytes, start: int, size: int) -> bytes:
    if start + size > len(page):
        raise ValueError("damaged LMDB file: a node beyond its page")
    return page[start : start + size]
