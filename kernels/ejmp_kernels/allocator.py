"""How much freed memory a process keeps for what it allocates next."""

import ctypes
import os

KEPT_BYTES = 512 << 20
"""What `keep_freed_memory` keeps unless it is told another size."""
TRAINING_BYTES = (1 << 31) - 1
"""What training commands keep, the most there can be: a step's memory is what the next one takes."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, from malloc.h."""
_OLD_LIMIT = 32 << 20
"""The largest threshold of `_MMAP_THRESHOLD` that glibc before 2.35 takes."""


def keep_freed_memory(size: int = KEPT_BYTES) -> bool:
    """Let glibc's malloc keep freed memory instead of giving it back to the system and asking for it again.

    A forward pass allocates and frees hundreds of tensors of some megabytes. By default malloc takes many of them from
    the system anew, page by page, which was measured to take 7% of the time of a pass in bfloat16. The setting is of
    the whole process, which is why `import ejmp` does not make it; the commands do.

    Args:
        size: the most bytes to keep, and of one allocation that is served from what was kept (32 MiB, or less, where
            glibc is older than 2.35).

    Returns:
        Whether the setting was made: not without glibc, nor where the environment has settings of malloc's
        (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES), which stay.

    Raises:
        ValueError: for a size that is not from 0 to 2^31 - 1.
    """
    if not 0 <= size <= TRAINING_BYTES:
        raise ValueError(f"keep_freed_memory: size must be from 0 to 2^31 - 1, got {size}")
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False
    served = mallopt(_MMAP_THRESHOLD, size) or mallopt(_MMAP_THRESHOLD, _OLD_LIMIT)
    return bool(served and mallopt(_TRIM_THRESHOLD, size))
