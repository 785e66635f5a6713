"""Samplers: the contents of an epoch, its division among ranks, and going on with another number of ranks."""

import dataclasses
import itertools
import json
import math
from collections import Counter

import mix_sizes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ejmp.data.sampling.balance import assign_ranks
from ejmp.data.sampling.mix import InOrder, MixSampler, sample_counts

SIZES = (57_455, 4_600, 1_150, 5_745)
"""Sizes of a mix in JMP's proportions with about 100,000 samples per epoch."""


def make(sizes=SIZES, **options):
    return MixSampler(**{"sizes": sizes, "seed": 3, "batch_size": 8} | options)


def costs_of(sizes):
    rng = np.random.default_rng(0)
    return [rng.integers(1, 6000, size).astype(np.uint16) for size in sizes]


def counted(pairs, sizes):
    """Count how often each structure of each dataset comes."""
    return [np.bincount(pairs[pairs[:, 0] == d, 1], minlength=size) for d, size in enumerate(sizes)]


def run_steps(sampler, position, steps):
    """Return the samples of all ranks in some steps, and the position after them."""
    seen = []
    for _ in range(steps):
        for rank in range(sampler.world_size):
            seen.append(dataclasses.replace(sampler, rank=rank).batch(position))
            assert len(seen[-1]) == sampler.batch_size
        position += sampler.step_size
    return np.concatenate(seen), position


def in_some_order(pairs):
    return pairs[np.lexsort(pairs.T)]


def test_counts_are_those_of_jmp():
    sizes = [100_000_000, 8_000_000, 2_000_000, 10_000_000]
    counts = sample_counts(sizes)
    assert counts == [100_000_000, 28_284_272, 14_142_136, 31_622_777]
    ratios = np.array(counts) / sum(counts)
    np.testing.assert_allclose(ratios, [0.57455, 0.16251, 0.08125, 0.18169], atol=5e-6)


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=9), st.floats(1, 100))
def test_no_dataset_is_sampled_below_its_size(sizes, temperature):
    counts = sample_counts(sizes, temperature)
    assert max(counts) == max(sizes)
    assert all(size <= count <= max(sizes) for size, count in zip(sizes, counts, strict=True))
    assert sample_counts(sizes, 1.0) == sizes
    assert sample_counts(sizes, math.inf) == [max(sizes)] * len(sizes)


@pytest.mark.parametrize("sizes", [SIZES, (1,), (3, 1), (5, 5, 2), (1, 1000)])
def test_an_epoch_holds_every_structure_floor_or_ceil_times(sizes):
    sampler = make(sizes)
    for epoch in range(3):
        start = epoch * sampler.epoch_size
        pairs = sampler.samples(start, start + sampler.epoch_size)
        for count, size, times in zip(sampler.counts, sizes, counted(pairs, sizes), strict=True):
            assert len(times) == size
            assert times.sum() == count
            assert times.min() == count // size
            assert times.max() == -(-count // size)


def test_the_order_is_random():
    sampler = make()
    pairs = sampler.samples(0, 2 * sampler.epoch_size)
    first, second = np.split(pairs, 2)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, make(seed=4).samples(0, sampler.epoch_size))
    twice = [times.argsort(kind="stable")[-1000:] for times in (counted(half, SIZES)[1] for half in (first, second))]
    assert len(np.intersect1d(*twice)) < 900  # other structures come once more in the second epoch
    shares = np.array(sampler.counts) / sampler.epoch_size
    for part in np.array_split(first, 10):
        found = np.bincount(part[:, 0], minlength=4)
        assert (np.abs(found - shares * len(part)) < 4 * np.sqrt(shares * len(part))).all()


def test_any_stretch_can_be_asked_for():
    sampler = make((50, 20))
    line = sampler.samples(0, 1000)
    for start, stop in [(0, 0), (7, 8), (79, 84), (163, 777), (999, 1000)]:
        np.testing.assert_array_equal(sampler.samples(start, stop), line[start:stop])


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("worlds", [(1, 2, 1), (8, 3), (3, 8, 5), (16, 1)])
def test_nothing_is_lost_or_repeated_when_ranks_change(worlds, balanced):
    """An epoch of 100,000 samples and some more, run in parts on different numbers of ranks, has every sample once."""
    costs = costs_of(SIZES) if balanced else None
    sampler = make(costs=costs)
    position, seen = 0, []
    for world_size in worlds:
        part = dataclasses.replace(sampler, world_size=world_size, batch_size=640 // world_size)
        position = part.resume(json.loads(json.dumps(part.state(position))))
        steps = -(-sampler.epoch_size // len(worlds) // part.step_size)
        pairs, position = run_steps(part, position, steps)
        seen.append(pairs)
    assert position >= sampler.epoch_size
    seen = np.concatenate(seen)
    np.testing.assert_array_equal(in_some_order(seen), in_some_order(sampler.samples(0, position)))
    whole = seen[: sampler.epoch_size - 640]
    for count, size, times in zip(sampler.counts, SIZES, counted(whole, SIZES), strict=True):
        assert times.max() <= -(-count // size)


def test_a_slice_of_the_whole_mix():
    """A slice of an epoch of 120 million structures; benchmarks/bench_data.py counts a whole one."""
    sampler = make(mix_sizes.SIZES)
    assert sampler.epoch_size == 174_049_185
    pairs = sampler.samples(sampler.epoch_size - 400_000, sampler.epoch_size)
    shares = np.array(sampler.counts) / sampler.epoch_size
    for d, (size, count) in enumerate(zip(sampler.sizes, sampler.counts, strict=True)):
        own = pairs[pairs[:, 0] == d, 1]
        assert abs(len(own) - shares[d] * len(pairs)) < 4 * math.sqrt(shares[d] * len(pairs))
        assert np.unique(own, return_counts=True)[1].max() <= -(-count // size)
        assert own.max() < size
        assert abs(own.mean() / size - 0.5) < 4 / math.sqrt(12 * len(own))


def test_a_step_larger_than_an_epoch_is_full():
    sampler = make((2, 1), batch_size=5, world_size=3)
    pairs, position = run_steps(sampler, 0, 4)
    assert position == 60
    assert Counter(map(tuple, pairs.tolist())) == {(0, 0): 15, (0, 1): 15, (1, 0): 30}


def test_a_checkpoint_of_another_mix_is_refused():
    sampler = make()
    state = sampler.state(640)
    assert len(json.dumps(state)) < 200
    assert sampler.resume(state) == 640
    for change in ({"seed": 4}, {"temperature": 1.0}, {"sizes": [*SIZES[:3], 1]}):
        with pytest.raises(ValueError, match=f"state: expected {next(iter(change))}"):
            sampler.resume(state | change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": ()}, "sizes: expected at least one dataset"),
        ({"sizes": (4, 0)}, "none empty"),
        ({"temperature": 0.5}, "temperature: expected at least 1, got 0.5"),
        ({"temperature": math.nan}, "temperature"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"world_size": 0}, "world_size: expected at least 1, got 0"),
        ({"world_size": 2, "rank": 2}, "rank: expected 0..1, got 2"),
        ({"seed": -1}, "seed"),
        ({"costs": [np.ones(3, int)]}, "costs: expected"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
    if not options.keys() & {"temperature", "seed", "costs", "sizes"}:
        with pytest.raises(ValueError, match=message):
            InOrder(**{"sizes": SIZES, "batch_size": 8} | options)


def test_positions_before_the_beginning_are_refused():
    with pytest.raises(ValueError, match="start"):
        make().batch(-64)


def test_a_damaged_checkpoint_is_refused():
    for position in (None, -1, 0.5, "7"):
        with pytest.raises(ValueError, match="state: expected a position from 0 on"):
            make().resume(make().state(0) | {"position": position})


def test_the_order_never_changes():
    """These numbers must never change, or an old checkpoint would go on in another order than it began in."""
    assert make().samples(0, 6).tolist() == [[0, 54456], [0, 49515], [0, 32379], [0, 25236], [0, 14420], [0, 45460]]
    assert make().samples(10**9, 10**9 + 2).tolist() == [[0, 39793], [0, 26316]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
def test_in_order_everything_comes_once(world_size):
    sizes = (17, 1, 40)
    seen, most = [], []
    for rank in range(world_size):
        sampler = InOrder(sizes=sizes, batch_size=4, world_size=world_size, rank=rank)
        for position in range(0, sampler.epoch_size, sampler.step_size):
            seen.append(sampler.batch(position))
            most.append(len(seen[-1]))
    assert max(most) <= 4
    expected = [(d, i) for d, size in enumerate(sizes) for i in range(size)]
    assert sorted(map(tuple, np.concatenate(seen).tolist())) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=6, max_size=6), st.sampled_from([1, 2, 3, 6]))
def test_balance_is_near_the_best_there_is(costs, world_size):
    """The largest load is at most 4/3 of that of the best assignment, Graham's bound for the rule without room."""
    ranks = assign_ranks(np.array(costs), world_size)
    room = [6 // world_size] * world_size
    assert np.bincount(ranks).tolist() == room
    best = min(max(np.bincount(way, weights=costs)) for way in set(itertools.permutations(ranks.tolist())))
    assert np.bincount(ranks, weights=costs).max() <= 4 / 3 * best + 1e-9


def test_balance_refuses_what_it_cannot_balance():
    with pytest.raises(ValueError, match="costs: expected integers"):
        assign_ranks([0.5], 2)
    with pytest.raises(ValueError, match="costs: expected integers"):
        assign_ranks([-1], 2)
    for world_size in (0, 2):
        with pytest.raises(ValueError, match="world_size: expected a divisor of the 3 structures"):
            assign_ranks([1, 2, 3], world_size)


@pytest.mark.parametrize(("world_size", "steps"), [(8, 200), (64, 50), (512, 10)])
def test_ranks_take_equally_long(world_size, steps):
    """With eight structures of JMP's mix per rank, the slowest rank of any step takes at most 1.10 of the mean."""
    rng = np.random.default_rng(0)
    edges = [mix_sizes.draw_edges(d, size, rng) for d, size in enumerate(SIZES)]
    sampler = make(world_size=world_size, costs=edges)
    for step in range(steps):
        position = step * sampler.step_size
        pairs = sampler.samples(position, position + sampler.step_size)
        costs = np.array([edges[d][i] for d, i in pairs], dtype=float)
        ranks = assign_ranks(costs.astype(int), world_size)
        loads = np.bincount(ranks, weights=costs)
        assert loads.max() <= 1.10 * loads.mean()
    own = sampler.batch(position)
    np.testing.assert_array_equal(own, pairs[ranks == 0])


def test_costs_are_read_from_files(tmp_path):
    paths = mix_sizes.write_index(tmp_path, SIZES)
    mapped = [np.load(path, mmap_mode="r") for path in paths]
    assert mapped[0].dtype == np.uint16
    for rank in range(4):
        options = {"world_size": 4, "rank": rank}
        for position in (0, 320):
            expected = make(costs=list(map(np.array, mapped)), **options).batch(position)
            np.testing.assert_array_equal(make(costs=mapped, **options).batch(position), expected)


def test_costs_changed_in_memory_are_kept(tmp_path):
    """Pages of copy-on-write maps are kept, because letting them go would lose changes."""
    np.save(tmp_path / "edges.npy", np.ones(100_000, np.int64))
    costs = np.load(tmp_path / "edges.npy", mmap_mode="c")
    costs[:] = 7
    make((100_000,), costs=[costs], world_size=2).batch(0)
    assert (costs == 7).all()
