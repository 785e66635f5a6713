"""Files that exist either completely or not at all, even after a crash."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp"
"""Ending of the names of files that are still being written."""
_HASH_BYTES = 8


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to; if the block ends without an error, sync the file and rename it to `path`."""
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)
    yield temporary
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def hash_file(path: Path) -> str:
    """Return the BLAKE2b hash of a file's contents, 64 bits as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_HASH_BYTES)).hexdigest()


def hash_text(text: str) -> str:
    """Return the BLAKE2b hash of a text, 64 bits as hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=_HASH_BYTES).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
