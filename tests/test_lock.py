"""Locks on files between processes."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from ejmp import lock
from ejmp.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from ejmp.lock import locked
with locked(Path(sys.argv[1]), wait=True) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_process_goes_with_it(tmp_path):
    path = tmp_path / "folder" / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        with locked(path, wait=False) as mine:
            assert not mine
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    with locked(path, wait=False) as mine:
        assert mine


@pytest.mark.parametrize("number", lock.NO_LOCKS)
def test_file_systems_without_locks(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with locked(tmp_path / "lock", wait=False) as mine:
        assert mine
    number = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), locked(tmp_path / "lock", wait=True):
        pass
