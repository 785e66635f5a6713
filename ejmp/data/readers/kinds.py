"""What a file is, by its first bytes: the name decides only where they do not. And what is in compressed files."""

import bz2
import gzip
import io
import lzma
import os
import re
import sqlite3
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

from ejmp.data.readers.files import SourceError
from ejmp.limits import check_limit, check_regular, check_unpacked, current_limits, open_regular

HEAD = 1 << 14
"""Most bytes of a file that are looked at."""
_MAGIC = (
    (b"- of Ulm", "traj"),
    (b"PickleTrajectory", "pickle"),
    (b"SQLite format 3\0", "db"),
    (b"\x89HDF\r\n\x1a\n", "hdf5"),
    (b"PK\x03\x04", "zip"),
    (b"\x80", "pickle"),
)
_PACKED = ((b"\x1f\x8b", gzip.open), (b"\xfd7zXZ\0", lzma.open), (b"BZh", bz2.open))
_BY_NAME = (
    (("*.xyz", "*.extxyz"), "xyz"),
    (("*.cif",), "cif"),
    (("*.vasp", "*.poscar", "*.contcar", "poscar*", "contcar*"), "vasp"),
    (("*.traj",), "traj"),
    (("*.db",), "db"),
    (("*.json",), "json"),
)
MOST_TABLES = 1000
"""Most tables and indices of a database; one of ASE has some twenty."""
PACKED_ENDINGS = (".xz", ".gz", ".bz2")
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eEdD][-+]?\d+)?"
_LINE_OF_THREE = re.compile(rf"\s*{NUMBER}\s+{NUMBER}\s+{NUMBER}\s*$")
_SCALE = re.compile(rf"\s*{NUMBER}(?:\s+{NUMBER}\s+{NUMBER})?\s*$")
_ATOM = re.compile(r"\s*[A-Za-z]|\s*\d+\s")


class _Unpacked(io.RawIOBase):
    """The contents of a compressed file, which end with an error where its limits do."""

    def __init__(self, file: Path, packed: IO[bytes], opener: Callable[..., Any]) -> None:
        self._path, self._packed = file, packed
        self._bytes = os.fstat(packed.fileno()).st_size
        self._contents = opener(packed)
        self._unpacked = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        found = self._contents.read(len(view))
        self._unpacked += len(found)
        check_unpacked(self._path, self._unpacked, self._bytes)
        view[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._packed.close()
        super().close()


def open_plain(file: Path) -> IO[bytes]:
    """Open a regular file, decompressing it if its first bytes say that it is compressed.

    Reading more than its limits allow raises LimitError.
    """
    raw = open_regular(file)
    opener = _opener(raw)
    raw.seek(0)
    return raw if opener is None else io.BufferedReader(_Unpacked(file, raw, opener), 1 << 17)


def read_plain(file: Path) -> bytes:
    """Return the contents of a file, decompressed.

    Raises:
        LimitError: if it is larger than its limits allow, before more than that is read.
    """
    most, pieces, size = current_limits().unpacked_bytes, [], 0
    with open_plain(file) as contents:
        check_limit(file, "read_bytes", file.stat().st_size, "bytes")
        while piece := contents.read(min(1 << 20, most + 1 - size)):
            size += len(piece)
            check_limit(file, "unpacked_bytes", size, "bytes or more")
            pieces.append(piece)
    return b"".join(pieces)


class _Header(tarfile.TarInfo):
    """A header of a tar file, which may be of any length, as may what it says of the next one."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type not in tarfile.REGULAR_TYPES:
            check_limit(str(archive.name), "record_bytes", self.size, "bytes in one header")
        return super()._proc_member(archive)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def open_tar(file: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar file that may be compressed, to be read once from its start to its end.

    Raises:
        LimitError: while it is read, if it unpacks to more than its limits allow, or a header is too long.
    """
    with open_plain(file) as contents, tarfile.open(str(file), "r|", contents, tarinfo=_Header) as archive:
        yield archive


def check_zip(file: Path | io.BytesIO, name: Path) -> None:
    """Refuse a zip file, such as an npz, whose members are larger than limits allow, before any is unpacked.

    Args:
        file: what is read.
        name: what to call it in messages.

    Raises:
        LimitError: naming the member.
        BadZipFile: if it is damaged.
    """
    contents = open_regular(file) if isinstance(file, Path) else io.BytesIO(file.getbuffer())
    with contents, zipfile.ZipFile(contents) as archive:
        total = 0
        for member in archive.infolist():
            check_unpacked(name, member.file_size, member.compress_size, f"member {member.filename[:100]}")
            total += member.file_size
        contents.seek(0, io.SEEK_END)
        check_unpacked(name, total, contents.tell())
        check_limit(name, "unpacked_bytes", total, "bytes unpacked")


def check_tables(file: Path) -> None:
    """Refuse an ASE database whose tables are not plain ones: a view or a computed column can be endless.

    Raises:
        ValueError: naming what there is instead of a table.
    """
    check_regular(file)
    with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT name, type, sql FROM sqlite_master").fetchmany(MOST_TABLES)
        if len(rows) == MOST_TABLES:
            raise ValueError(f"expected the tables of an ASE database, got {MOST_TABLES} or more")
        for name, kind, text in rows:
            # SQLite believes the text, whatever it says beside it
            if text is not None and not re.match(r"\s*CREATE\s+(TABLE|INDEX|UNIQUE\s+INDEX)\s", text, re.IGNORECASE):
                raise ValueError(f"expected the tables of an ASE database, got {' '.join(text.split())[:60]}")
            columns = database.execute("SELECT name, hidden FROM pragma_table_xinfo(?)", (name,)).fetchall()
            computed = [column for column, hidden in columns if hidden]
            if kind == "table" and computed:
                raise ValueError(f"expected a plain table {name[:100]}, but its column {computed[0][:100]} is computed")
        if "systems" not in {name for name, kind, _ in rows if kind == "table"}:
            raise ValueError("expected an ASE database, got one without a table systems")


def is_packed(file: Path) -> bool:
    """Return whether a file is compressed by xz, gzip or bzip2, by its first bytes."""
    with open_regular(file) as raw:
        return _opener(raw) is not None


def _opener(raw: IO[bytes]) -> Callable[..., Any] | None:
    """Return what opens a compressed file; None if it is not one."""
    start = raw.read(8)
    return next((opener for magic, opener in _PACKED if start.startswith(magic)), None)


def head_of(file: Path) -> bytes:
    """Return the first bytes of a file, decompressed.

    Raises:
        SourceError: if it is compressed and damaged.
    """
    try:
        with open_plain(file) as contents:
            return contents.read(HEAD)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise SourceError(file, "", f"cannot be read: {error}") from error


def plain_name(file: Path) -> str:
    """Return a file's name in small letters without the ending of a compression."""
    name = file.name.lower()
    return next((name.removesuffix(ending) for ending in PACKED_ENDINGS if name.endswith(ending)), name)


def kind_of(file: Path) -> str | None:
    """Return what a file is: xyz, cif, vasp, traj, db, json, hdf5, zip, lmdb, tar, pickle, or None for anything else.

    Raises:
        SourceError: if it is compressed and damaged.
    """
    head = head_of(file)
    kind = next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)
    if kind is None and len(head) >= 32 and head[16:20] == b"\xde\xc0\xef\xbe":
        kind = "lmdb"
    if kind is None and head[257:262] == b"ustar":
        kind = "tar"
    return kind or _kind_of_text(head.decode(errors="replace")) or name_kind(file)


def name_kind(file: Path) -> str | None:
    """Return what a file is by its name alone; None if the name does not say."""
    name = Path(plain_name(file))
    return next((kind for patterns, kind in _BY_NAME if any(name.match(pattern) for pattern in patterns)), None)


def _kind_of_text(text: str) -> str | None:
    lines = text.splitlines()
    if text.lstrip()[:1] in ("{", "["):
        return "json"
    starts = [line.lstrip() for line in lines]
    if any(line.startswith("data_") for line in starts) and any(
        line.startswith(("_cell_", "_atom_site", "loop_")) for line in starts
    ):
        return "cif"
    if len(lines) >= 7 and _SCALE.match(lines[1]) and all(_LINE_OF_THREE.match(line) for line in lines[2:5]):
        return "vasp"
    if len(lines) >= 3 and lines[0].strip().isdigit() and _ATOM.match(lines[2]) and len(lines[2].split()) >= 4:
        return "xyz"
    return None
