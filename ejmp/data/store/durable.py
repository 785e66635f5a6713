"""Files that exist either completely or not at all, even after a crash."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"
"""Ending of the names of files that are still being written."""
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)
"""Errors of a disk that is full, damaged or not to be written."""
_HASH_BYTES = 8


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to; if the block ends without an error, sync the file and rename it to `path`.

    Raises:
        OSError: if the disk is full or cannot be written, saying that what was finished before stays.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        temporary.unlink(missing_ok=True)
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if error.errno not in CANNOT_WRITE:
            raise
        text = f"{os.strerror(error.errno)}; what was finished before stays, and the same command goes on from there"
        raise OSError(error.errno, text, str(path)) from error


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON, which is there completely or not at all."""
    with written(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


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
