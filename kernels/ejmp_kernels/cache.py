"""The folder in which ejmp keeps what it has measured or made between runs."""

import os
import tempfile
from pathlib import Path


def cache_root() -> Path:
    """Return the folder of everything ejmp keeps between runs: $XDG_CACHE_HOME/ejmp, or else ~/.cache/ejmp.

    A user without a home, as in containers that give processes numbers of their own, has one among temporary files.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ejmp"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"ejmp-{os.getuid()}"
