"""Sampling 120 million structures of four datasets, the balance over ranks, and batches per second and core.

    pytest benchmarks/bench_data.py --full --benchmark-only [--benchmark-json FILE]

Each benchmark first checks its result. The index of 120 million structures (two bytes of edges each) is written to a
temporary folder, 240 MB.
"""

import json
import resource
import subprocess
import sys
import time

import mix_sizes
import numpy as np
import pytest
import torch
from ase.build import add_adsorbate, bulk, fcc111

from ejmp.data.info import DatasetInfo
from ejmp.data.sampling.balance import assign_ranks
from ejmp.data.sampling.batch import make_batch, pack
from ejmp.data.sampling.loader import Loader
from ejmp.data.sampling.mix import InOrder, MixSampler
from ejmp.data.sampling.permutation import permute
from ejmp.graph.structure import Structure

H200_TFLOPS = 0.45 * 989
"""Assumed rate of training on an H200, in TFLOP/s: 45% of its dense bf16 peak."""
GFLOP_PER_EDGE = 3 * 940 / 3100
"""Work of a training step of JMP-L per main edge: three times a forward pass, 0.94 TFLOP for 3,100 edges."""
READY = """
import json, re, sys, time
from pathlib import Path
import numpy as np
from ejmp.data.sampling.mix import MixSampler

def memory():
    found = re.findall("^(VmRSS|VmHWM|RssAnon|RssFile):\\\\s+(\\\\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return {name: int(kilobytes) / 1024 for name, kilobytes in found}

before, start = memory(), time.perf_counter()
costs = [np.load(path, mmap_mode="r") for path in sys.argv[2:]]
sampler = MixSampler(
    sizes=list(map(len, costs)), costs=costs, seed=0, batch_size=8, world_size=int(sys.argv[1]), rank=3
)
sampler.batch(0)
ready = time.perf_counter() - start
for step in range(200):
    sampler.batch(10**8 + step * sampler.step_size)
seconds = (time.perf_counter() - start - ready) / 200
print(json.dumps({"ready_s": ready, "ms_per_step": 1e3 * seconds, "before_mib": before, "mib": memory()}))
"""


@pytest.fixture(scope="session")
def index(tmp_path_factory):
    return mix_sizes.write_index(tmp_path_factory.mktemp("index"))


def bench_permutation(benchmark, provenance):
    n, m = mix_sizes.SIZES[0], 1_000_000
    assert np.array_equal(np.sort(permute(np.arange(100_000), 100_000, 1)), np.arange(100_000))
    benchmark.pedantic(permute, (np.arange(m), n, 1), rounds=5, warmup_rounds=1)
    provenance["million_per_s"] = 1e-6 * m / benchmark.stats.stats.median


def bench_epoch(benchmark, provenance):
    """Draw a whole epoch and count how often each structure comes, in one byte each."""
    sampler = MixSampler(sizes=mix_sizes.SIZES, seed=0, batch_size=8)
    times = [np.zeros(size, np.uint8) for size in sampler.sizes]
    hashed, chunk, seconds = 0, 1_000_000, 0.0
    for start in range(0, sampler.epoch_size, chunk):
        began = time.perf_counter()
        pairs = sampler.samples(start, min(start + chunk, sampler.epoch_size))
        seconds += time.perf_counter() - began
        for d, counts in enumerate(times):
            np.add.at(counts, pairs[pairs[:, 0] == d, 1], 1)
        hashed = (hashed + int(mixed(pairs[pairs[:, 0] == 0, 1]).sum(dtype=np.uint64))) % 2**64
    for d, counts in enumerate(times):
        assert counts.sum(dtype=np.int64) == sampler.counts[d]
        assert counts.min() == sampler.counts[d] // sampler.sizes[d]
        assert counts.max() == -(-sampler.counts[d] // sampler.sizes[d])
    pieces = (np.arange(start, start + chunk) for start in range(0, sampler.sizes[0], chunk))
    assert hashed == sum(int(mixed(piece).sum(dtype=np.uint64)) for piece in pieces) % 2**64
    benchmark.pedantic(sampler.samples, (10**8, 10**8 + chunk), rounds=5, warmup_rounds=1)
    provenance |= {
        "samples": sampler.counts,
        "million_per_s": 1e-6 * chunk / benchmark.stats.stats.median,
        "million_per_s_whole_epoch": 1e-6 * sampler.epoch_size / seconds,
    }


def mixed(values):
    """Return a hash of each number; the sum of hashes over a set tells sets apart."""
    x = (values.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(29)
    return x * np.uint64(0xD6E8FEB86659FD93)


@pytest.mark.parametrize("world_size", [8, 64, 512])
def bench_ready(benchmark, provenance, index, world_size):
    """Start one rank in a process of its own: time until its first batch, memory, and time per step."""
    command = [sys.executable, "-c", READY, str(world_size), *map(str, index)]

    def start():
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    found = benchmark.pedantic(start, rounds=1)
    provenance |= found | {"structures": sum(mix_sizes.SIZES), "index_bytes_per_structure": 2}
    assert found["ready_s"] <= 2
    assert found["mib"]["VmRSS"] <= 300


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("world_size", [8, 64, 512])
def bench_balance(benchmark, provenance, index, world_size, batch_size):
    """Measure the slowest rank's cost over the mean in steps of JMP's mix, also without balance and at its bound."""
    costs = [np.load(path, mmap_mode="r") for path in index]
    sampler = MixSampler(sizes=mix_sizes.SIZES, costs=costs, seed=0, batch_size=batch_size, world_size=world_size)
    balanced, in_order, bound = [], [], []
    for step in range(max(100, 16_000 // world_size)):
        pairs = sampler.samples(step * sampler.step_size, (step + 1) * sampler.step_size)
        edges = sampler.costs_of(pairs)
        mean = edges.sum() / world_size
        ranks = assign_ranks(edges, world_size)
        assert (np.bincount(ranks) == batch_size).all()
        balanced.append(np.bincount(ranks, weights=edges).max() / mean)
        in_order.append(edges.reshape(world_size, batch_size).sum(1).max() / mean)
        bound.append(max(edges.max() / mean, 1))
    if batch_size >= 8:
        assert max(balanced) <= 1.10
    benchmark.pedantic(assign_ranks, (edges, world_size), rounds=10, warmup_rounds=1)
    for name, values in (("balanced", balanced), ("in_order", in_order), ("largest_structure", bound)):
        provenance[name] = {"mean": np.mean(values), "p99": np.quantile(values, 0.99), "max": max(values)}
    provenance["steps"] = len(balanced)


class InMemory:
    """A dataset of structures in memory, so that graph building, packing and transfer are timed and reading is not."""

    def __init__(self, structures):
        self.info = DatasetInfo(name="made", format="", split="", count=len(structures), source="", licence="")
        self.structures = structures
        self.num_atoms = np.array([len(s.numbers) for s in structures])
        self.num_edges = self.num_atoms

    def __len__(self):
        return len(self.structures)

    def __getitem__(self, i):
        return self.structures[i]


def molecules(count=200):
    """Make structures of 20 atoms at the density of an organic molecule, cut from a diamond lattice, without a cell."""
    rng = np.random.default_rng(0)
    sites = bulk("C", "diamond", a=4.6, cubic=True).repeat(3).positions
    near = sites[np.argsort(np.linalg.norm(sites - sites.mean(0), axis=1))[:40]]
    chosen = (near[rng.permutation(40)[:20]] for _ in range(count))
    return [labelled(rng.choice([1, 6, 7, 8], 20), xyz, rng) for xyz in chosen]


def slabs(count=40):
    """Make slabs of 80 copper atoms in five layers and an oxygen atom, with OC20's tags."""
    rng = np.random.default_rng(0)
    atoms = fcc111("Cu", (4, 4, 5), vacuum=10.0, periodic=True)
    atoms.set_tags([1 if layer <= 2 else 0 for layer in atoms.get_tags()])
    add_adsorbate(atoms, "O", 1.5)
    tags = [*atoms.get_tags()[:-1], 2]
    cell = {"cell": atoms.cell.array, "pbc": True, "tags": tags}
    return [labelled(atoms.numbers, atoms.positions, rng, **cell) for _ in range(count)]


def labelled(numbers, positions, rng, **options):
    n = len(numbers)
    moved = positions + rng.normal(0, 0.05, (n, 3))
    labels = {"energy": 1.0, "forces": rng.normal(size=(n, 3)), "fixed": np.zeros(n, bool)}
    return Structure(numbers=numbers, positions=moved, **labels, **options)


@pytest.mark.parametrize("make", [molecules, slabs])
@pytest.mark.parametrize("batch_size", [1, 8, 32])
def bench_make_batch(benchmark, provenance, make, batch_size):
    """Time one core that builds graphs at 12 A and 30 neighbours and packs them with their labels."""
    structures = make()[:batch_size]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def one_batch():
        return pack(make_batch(structures, [0] * batch_size))

    batch = one_batch().unpack()
    assert torch.isfinite(batch.graph.main.distance).all()
    benchmark.pedantic(one_batch, rounds=15, warmup_rounds=2)
    began = time.process_time()
    for _ in range(10):
        one_batch()
    rate = 10 * batch_size / (time.process_time() - began)  # of CPU time: the machine may be shared
    torch.set_num_threads(threads)
    edges = batch.graph.main.num_edges / batch_size
    needed = 1e3 * H200_TFLOPS / (GFLOP_PER_EDGE * edges)
    provenance |= {
        "atoms": batch.graph.num_atoms / batch_size,
        "edges": edges,
        "pairs": batch.graph.atom_pairs.num_edges / batch_size,
        "mb_per_structure": 1e-6 * pack(batch).buffer.nbytes / batch_size,
        "structures_per_cpu_s": rate,
        "h200_structures_per_s": needed,
        "cores_per_h200": needed / rate,
    }


@pytest.mark.parametrize("make", [molecules, slabs])
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def bench_loader(benchmark, provenance, make, start_method):
    """Time what arrives from one worker, 8 structures per batch. A spawned worker's CPU time includes its start."""
    dataset = InMemory(make() * 4)
    loader = Loader(
        datasets=[dataset],
        sampler=InOrder(sizes=[len(dataset)], batch_size=8),
        num_workers=1,
        start_method=start_method,
    )
    rates, spent = [], []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(3):
        running = loader.batches()
        for _ in range(3):  # what was made ahead before the clock starts
            next(running)
        began, cpu, count = time.perf_counter(), time.process_time(), 0
        for batch in running:
            count += len(batch.ids)
        spent.append(1e3 * (time.process_time() - cpu) / count)
        rates.append(count / (time.perf_counter() - began))
    assert batch.position == len(dataset)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worker = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    benchmark.pedantic(lambda: next(iter(loader.batches())), rounds=3)
    provenance |= {
        "structures_per_s": float(np.median(rates)),
        "worker_cpu_ms_per_structure": 1e3 * worker / (3 * len(dataset)),
        "consumer_cpu_ms_per_structure": float(np.median(spent)),
        "first_batch_s": benchmark.stats.stats.median,
    }
