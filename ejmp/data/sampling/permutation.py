"""A random permutation of 0..n-1 that is computed from a key, for any n, and never stored.

It is an unbalanced Feistel network on pairs (left, right) of Z_a x Z_b with a * b just above n, after Black and
Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002), methods "generalised Feistel" and "cycle walking": a
round adds a keyed hash of one half to the other, so it can be undone whatever the hash, and what lands at n or beyond
is sent through again until it is below n. With a = ceil(sqrt(n)) fewer than one place in sqrt(n) needs a second pass.

There are ROUNDS = 16 rounds. The hash is two multiplications by odd constants around a shift (the scheme of
splitmix64's finaliser), whose upper half is used. tests/data/test_permutation.py looks at the outcome: every order of 2
to 5 things is as frequent as every other, and places, steps between neighbours and two keys' permutations are uniform
and uncorrelated.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 16
MAX_LENGTH = 1 << 62
CHUNK = 1 << 14
"""Number of indices permuted at a time, so that all intermediate arrays stay in the cache."""
FIRST, SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
HALF = np.uint64(32)

Words = NDArray[np.uint64]


def permute(index: Any, n: int, seed: int, *stream: int) -> NDArray[np.int64]:
    """Return where a keyed permutation of 0..n-1 sends each index.

    Args:
        index: [m] integers in 0..n-1.
        n: length of the permutation, up to 2^62.
        seed: any integer from 0 on.
        stream: tells apart the permutations of one seed.

    Returns:
        The places, [m] int64. If index holds all of 0..n-1, each once, so do they.

    Raises:
        ValueError: if n is not positive or an index is not in 0..n-1.
    """
    given = np.asarray(index)
    if not 1 <= n <= MAX_LENGTH:
        raise ValueError(f"n: expected 1..2^62, got {n}")
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise ValueError(f"index: expected integers [m], got {given.dtype} {list(given.shape)}")
    if len(given) and not (given.min() >= 0 and given.max() < n):
        raise ValueError(f"index: expected 0..{n - 1}, got {given.min()}..{given.max()}")
    keys = np.random.SeedSequence(seed, spawn_key=stream).generate_state(ROUNDS, np.uint64).astype(np.uint64)
    out = np.empty(len(given), dtype=np.uint64)
    for start in range(0, len(given), CHUNK):
        piece = slice(start, start + CHUNK)
        out[piece] = _walk(given[piece].astype(np.uint64), n, keys)
    return out.view(np.int64)


def _walk(x: Words, n: int, keys: Words) -> Words:
    """Encrypt every number until the result is below n."""
    x = _encrypt(x, n, keys)
    outside = np.flatnonzero(x >= n)
    while len(outside):
        x[outside] = _encrypt(x[outside], n, keys)
        outside = outside[x[outside] >= n]
    return x


def _encrypt(x: Words, n: int, keys: Words) -> Words:
    """Permute 0..ab-1 once, where ab is at least n."""
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    left_size, right_size = np.uint64(a), np.uint64(b)
    left, right = np.divmod(x, right_size)
    for key in keys:
        left += _hash(right, key, left_size)
        left -= left_size * (left >= left_size)
        left, right = right, left
        left_size, right_size = right_size, left_size
    return left * right_size + right


def _hash(value: Words, key: np.uint64, size: np.uint64) -> Words:
    """Return numbers below size < 2^32 that depend on value and key."""
    x = (value ^ key) * FIRST
    x ^= x >> HALF
    x *= SECOND
    x >>= HALF
    x *= size
    x >>= HALF
    return x
