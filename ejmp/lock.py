"""Locks on files, so that two processes do not write the same folder."""

import contextlib
import errno
import fcntl
from collections.abc import Iterator
from pathlib import Path

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of a file system that has no locks, such as Lustre mounted without them."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock while the body runs; the system takes it from a process that ends, however it ends.

    Args:
        path: file of the lock, which stays there.
        wait: wait until no other process holds it.

    Yields:
        Whether the lock is held; always, if it was waited for, and on a file system without locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield True
