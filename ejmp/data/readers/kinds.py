"""What a file is, by its first bytes: the name decides only where they do not."""

import bz2
import gzip
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ejmp.data.readers.files import SourceError

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
PACKED_ENDINGS = (".xz", ".gz", ".bz2")
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eEdD][-+]?\d+)?"
_LINE_OF_THREE = re.compile(rf"\s*{NUMBER}\s+{NUMBER}\s+{NUMBER}\s*$")
_SCALE = re.compile(rf"\s*{NUMBER}(?:\s+{NUMBER}\s+{NUMBER})?\s*$")
_ATOM = re.compile(r"\s*[A-Za-z]|\s*\d+\s")


def open_plain(file: Path) -> IO[bytes]:
    """Open a file, decompressing it if its first bytes say that it is compressed."""
    opener = _opener(file)
    return file.open("rb") if opener is None else opener(file, "rb")


def is_packed(file: Path) -> bool:
    """Return whether a file is compressed by xz, gzip or bzip2, by its first bytes."""
    return _opener(file) is not None


def _opener(file: Path) -> Callable[..., Any] | None:
    """Return what opens a compressed file; None if it is not one."""
    with file.open("rb") as raw:
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
    except (OSError, EOFError, lzma.LZMAError) as error:
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
    if re.search(r"^\s*data_", text, re.MULTILINE) and re.search(r"^\s*(_cell_|_atom_site|loop_)", text, re.MULTILINE):
        return "cif"
    if len(lines) >= 7 and _SCALE.match(lines[1]) and all(_LINE_OF_THREE.match(line) for line in lines[2:5]):
        return "vasp"
    if len(lines) >= 3 and lines[0].strip().isdigit() and _ATOM.match(lines[2]) and len(lines[2].split()) >= 4:
        return "xyz"
    return None
