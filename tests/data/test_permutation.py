"""The computed permutation is a bijection of every length with random access and the statistics of a random order."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from ejmp.data.sampling.permutation import permute


def standard_deviations(counts, expected):
    """Return how many standard deviations chi squared is above its mean for uniform counts."""
    degrees = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 11])
def test_every_small_length_is_permuted(seed):
    for n in range(1, 300):
        assert sorted(permute(np.arange(n), n, seed, 3)) == list(range(n))


@pytest.mark.parametrize("n", [4095, 4096, 4097, 65521, 100_000])
def test_larger_lengths_are_permuted(n):
    np.testing.assert_array_equal(np.sort(permute(np.arange(n), n, 7)), np.arange(n))


@pytest.mark.parametrize("n", [120_000_000, 2**32, 2**32 + 1, 10**12, 2**62])
def test_large_lengths_have_no_collision(n):
    for first in (0, n // 2, n - 300_000):
        found = permute(np.arange(first, first + 300_000), n, 5)
        assert found.min() >= 0
        assert found.max() < n
        assert len(np.unique(found)) == 300_000
        assert found.max() > 0.999 * n
        assert found.min() < 0.001 * n


def test_any_place_can_be_asked_for():
    n = 100_000
    order = permute(np.arange(n), n, 1, 2)
    chosen = np.array([99_999, 5, 5, 0, 17_384, 16_383])
    np.testing.assert_array_equal(permute(chosen, n, 1, 2), order[chosen])
    np.testing.assert_array_equal(permute(chosen.astype(np.uint32), n, 1, 2), order[chosen])
    assert len(permute(np.arange(0), n, 1)) == 0


def test_the_order_never_changes():
    """These numbers must never change, or an old checkpoint would go on in another order than it began in."""
    assert permute(np.arange(6), 1000, 0).tolist() == [131, 93, 114, 32, 672, 429]
    assert permute(np.arange(3), 120_000_000, 42, 1, 2).tolist() == [113619763, 49232964, 73370191]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_every_order_of_few_things_is_as_frequent(n):
    trials = 10 * max(math.factorial(n), 100)
    found = Counter(tuple(permute(np.arange(n), n, seed, 0)) for seed in range(trials))
    counts = np.array([found[order] for order in itertools.permutations(range(n))])
    assert abs(standard_deviations(counts, trials / len(counts))) < 4


def test_places_are_uniform():
    n, m = 120_000_000, 1_000_000
    found = permute(np.arange(m), n, 11)
    assert abs(standard_deviations(np.bincount(found * 1000 // n), m / 1000)) < 4
    for modulus in (2, 7, 256):
        table = np.zeros((modulus, modulus))
        np.add.at(table, (np.arange(m) % modulus, found % modulus), 1)
        assert abs(standard_deviations(table, m / modulus**2)) < 4


def test_neighbours_and_streams_are_uncorrelated():
    n, m = 120_000_000, 1_000_000
    found = permute(np.arange(m), n, 11)
    steps = np.diff(found) % n
    assert abs(standard_deviations(np.bincount(steps * 1000 // n), m / 1000)) < 4
    others = [permute(np.arange(m), n, 12), permute(np.arange(m), n, 11, 0), permute(np.arange(m), n, 11, 1)]
    for a, b in itertools.combinations([found, *others], 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(m)


def test_fixed_points_are_as_many_as_they_should_be():
    """The number of fixed points of random permutations has mean one and variance one."""
    n, trials = 1000, 1000
    fixed = sum(int((permute(np.arange(n), n, seed) == np.arange(n)).sum()) for seed in range(trials))
    assert abs(fixed - trials) < 4 * math.sqrt(trials)


@pytest.mark.parametrize(
    ("index", "n", "message"),
    [
        ([0], 0, "n: expected 1..2^62, got 0"),
        ([0], 2**62 + 1, "n: expected"),
        ([5], 5, "index: expected 0..4, got 5..5"),
        ([-1], 5, "index: expected 0..4, got -1"),
        ([0.5], 5, "index: expected integers"),
        ([[1]], 5, "index: expected integers"),
    ],
)
def test_impossible_requests_are_refused(index, n, message):
    with pytest.raises(ValueError, match=message.replace("^", r"\^")):
        permute(np.array(index), n, 0)
