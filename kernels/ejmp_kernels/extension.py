"""Load the compiled extension (csrc) if it was built, and say why not otherwise."""

import functools
from pathlib import Path

import torch


@functools.cache
def unavailable() -> str | None:
    """Load the extension once and return None, or return the reason why it cannot be used."""
    library = Path(__file__).with_name("_C.so")
    if not library.exists():
        return f"{library.name} was not built (no C++ compiler at install time, or installed with build isolation)"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load with torch {torch.__version__}: {error}"
    return None
