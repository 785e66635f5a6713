"""The folder in which ejmp keeps what it has measured or made between runs."""

import os
from pathlib import Path


def cache_root() -> Path:
    """Return the folder of everything ejmp keeps between runs: $XDG_CACHE_HOME/ejmp, or else ~/.cache/ejmp."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ejmp"
