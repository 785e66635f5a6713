"""The store reads what was written, from any process, and no damage goes unnoticed or kills the reader."""

import json
import multiprocessing
import os
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from support.data_store import make_format, make_structure, numbers_of, same

import ejmp
from ejmp.data import DamagedRecord, Structure, convert, open_store, verify
from ejmp.data.store.record import decode
from ejmp.data.store.shard import estimate_edges, write_shard

FLIPS = {"slice": 120, "all": 10_000}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    dest = tmp_path_factory.mktemp("store") / "made"
    convert("nowhere", dest, format=make_format(), shard_size=50)
    return dest / "train"


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made, tmp_path / "train")


def problems(path):
    return [problem for _, found in verify(path) for problem in found]


def test_every_structure_is_there_in_order(made):
    store = open_store(made)
    numbers = numbers_of("train")
    assert len(store) == len(numbers) == 160
    for structure, number in zip(store, numbers, strict=True):
        expected = make_structure(number)
        assert same(expected, structure)
        assert structure.forces.dtype == np.float32
    assert store[-1].id == store[159].id == store[np.int64(159)].id == f"structure {numbers[-1]}"
    for index in (160, -161):
        with pytest.raises(IndexError, match="expected -160 to 159"):
            store[index]
    assert not problems(made)


def test_index_is_memory_mapped_and_right(made):
    store = open_store(made)
    assert isinstance(store.num_atoms, np.memmap)
    assert store.num_atoms.tolist() == [len(s.numbers) for s in store]
    assert store.num_edges.tolist() == [estimate_edges(s) for s in store]


def frames(path, step=1):
    import ase.io

    return [
        Structure(numbers=a.numbers, positions=a.positions, cell=np.array(a.cell) if any(a.pbc) else None, pbc=a.pbc)
        for a in ase.io.read(path, f"::{step}")
    ]


@pytest.mark.parametrize(
    ("name", "step", "low", "high"),
    [
        ("data/qm9/qm9_rows001_400_U0_eV.extxyz", 20, 1.0, 1.0),  # exact: all neighbours are within reach
        ("data/md22/md22_Ac-Ala3-NHMe_5frames.xyz", 2, 0.99, 1.01),
        ("data/oc20/raw_traj", 6, 0.88, 1.02),
        ("data/oxides_bo2/bo2_pbe_eos.extxyz", 20, 0.91, 1.0),
    ],
)
def test_estimated_edges_are_near_those_of_the_graph(shared, name, step, low, high):
    path = shared(name)
    files = sorted(path.glob("*.traj")) if path.is_dir() else [path]
    assert files
    for structure in (structure for file in files for structure in frames(file, step)):
        real = len(ejmp.build_graph([structure], 12.0, 30, backend="reference").main.source)
        assert low <= estimate_edges(structure) / real <= high


def test_shards_are_ordinary_lmdbs(made):
    """The lmdb package, which knows nothing of the index, reads the same records."""
    import lmdb

    found = {}
    for path in sorted(made.glob("shard-*.lmdb")):
        with lmdb.open(str(path), subdir=False, lock=False, readonly=True) as environment, environment.begin() as read:
            found |= dict(read.cursor())
    assert sorted(found) == [f"{number:012d}".encode() for number in range(160)]
    for number, structure in enumerate(open_store(made)):
        assert same(structure, decode(found[f"{number:012d}".encode()], number))


def test_lmdb_is_not_needed_to_read(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert len(list(open_store(made))) == 160


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read(made, method):
    store = open_store(made)
    expected = [structure.id for structure in store]  # opens all shards before the children begin
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert [s.id for s in pool.map(store.__getitem__, range(160))] == expected


def test_threads_share_a_store(made, monkeypatch):
    monkeypatch.setattr("ejmp.data.store.dataset.OPEN_SHARDS", 1)
    store = open_store(made)
    order = np.random.default_rng(0).permutation(160).tolist() * 5
    with ThreadPoolExecutor(8) as threads:
        ids = [structure.id for structure in threads.map(store.__getitem__, order)]
    assert ids == [f"structure {numbers_of('train')[number]}" for number in order]
    assert len(store._files) == 1


def test_few_files_are_kept_open(made, monkeypatch):
    monkeypatch.setattr("ejmp.data.store.dataset.OPEN_SHARDS", 2)
    descriptors = Path("/proc/self/fd")
    store = open_store(made)
    before = len(list(descriptors.iterdir()))
    assert len(list(store)) == 160
    assert len(list(descriptors.iterdir())) <= before + 2


def test_pickles_small(made):
    store = open_store(made, on_error="skip")
    data = pickle.dumps(store)
    assert len(data) < 1000
    again = pickle.loads(data)  # noqa: S301
    assert again.on_error == "skip"
    assert same(again[7], store[7])


def test_a_missing_shard_is_named(copied):
    (copied / "shard-00001.lmdb").unlink()
    with pytest.raises(DamagedRecord, match=r"shard-00001\.lmdb, key 000000000050: .*No such file"):
        open_store(copied)[50]
    store = open_store(copied, on_error="skip")
    assert len(list(store)) == 110
    assert sorted(store.skipped) == list(range(50, 100))
    with pytest.raises(DamagedRecord):
        store[99]
    assert any("missing" in problem for problem in problems(copied))


def test_lack_of_descriptors_is_not_damage(made, monkeypatch):
    def no_more(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", no_more)
    with pytest.raises(OSError, match="Too many open files"):
        list(open_store(made, on_error="skip"))


def test_a_swapped_shard_is_noticed(copied):
    """Sound records of the same sizes in the wrong place are refused, because their numbers differ."""
    table = json.loads((copied / "dataset.json").read_text())["shards"]
    write_shard(copied / "shard-00000.lmdb", [make_structure(n) for n in numbers_of("train")[:50]], first=1)
    assert (copied / "shard-00000.lmdb").stat().st_size == table[0]["bytes"]
    with pytest.raises(DamagedRecord, match="expected the record of structure 0, got that of structure 1"):
        open_store(copied)[0]


@pytest.mark.parametrize("change", [-1, 1])
def test_a_changed_length_is_noticed_before_reading(copied, change):
    path = copied / "shard-00000.lmdb"
    os.truncate(path, path.stat().st_size + change)
    with pytest.raises(DamagedRecord, match=r"shard-00000\.lmdb, key 000000000003: expected a shard of"):
        open_store(copied)[3]
    assert len(list(open_store(copied, on_error="skip"))) == 110


def in_child(check, *arguments):
    """Run a check in a forked process, so that a crash is noticed; return its result."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply_async(check, arguments).get(timeout=600)


def flip(path, bit):
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def check_flips(path, how_many, seed):
    """Flip bits of a shard one at a time; return how many were noticed by reading, and how many only by `verify`."""
    shard = path / "shard-00000.lmdb"
    expected = [make_structure(number) for number in numbers_of("train")[:50]]
    seen = unused = 0
    for bit in np.random.default_rng(seed).integers(0, 8 * shard.stat().st_size, how_many).tolist():
        flip(shard, bit)
        store, wrong = open_store(path), 0
        for number, structure in enumerate(expected):
            try:
                assert same(structure, store[number]), f"bit {bit}: structure {number} is another"
            except DamagedRecord as error:
                assert f"shard-00000.lmdb, key {number:012d}" in str(error)  # noqa: PT017
                wrong += 1
        assert wrong <= 1
        seen += wrong
        unused += not wrong
        found = [problem for name, found in verify(path) if name == shard.name for problem in found]
        assert len(found) == 1 + wrong, f"bit {bit}: {found}"
        flip(shard, bit)
    return seen, unused


def test_flipped_bits(copied):
    seen, unused = in_child(check_flips, copied, FLIPS["slice"], 0)
    assert seen + unused == FLIPS["slice"]
    assert seen > unused


@pytest.mark.slow
def test_ten_thousand_flipped_bits(copied, record_property):
    seen, unused = in_child(check_flips, copied, FLIPS["all"], 1)
    record_property("seen by reading", seen)
    record_property("in bytes no record uses, seen by verify", unused)
    assert seen + unused == FLIPS["all"]


def check_lengths(path, lengths):
    shard = path / "shard-00000.lmdb"
    for length in lengths:
        os.truncate(shard, length)
        store = open_store(path)
        for number in (0, 25, 49):
            with pytest.raises(DamagedRecord, match="expected a shard of"):
                store[number]
    return len(lengths)


def test_truncation(copied):
    size = (copied / "shard-00000.lmdb").stat().st_size
    lengths = sorted({*range(size - 40, size), *range(0, size, 997)}, reverse=True)
    assert in_child(check_lengths, copied, lengths) == len(lengths)


@pytest.mark.slow
def test_every_truncation(copied):
    size = (copied / "shard-00000.lmdb").stat().st_size
    assert in_child(check_lengths, copied, range(size - 1, -1, -1)) == size


def test_every_flipped_bit_of_dataset_json(copied):
    path = copied / "dataset.json"
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 13):
        flip(path, bit)
        try:
            store = open_store(copied)
        except ValueError as error:
            assert "dataset.json" in str(error)  # noqa: PT017
        else:  # only the layout of the JSON has changed, not its meaning
            assert store.info == open_store(copied).info
            assert json.loads(path.read_bytes()) == json.loads(data)
        path.write_bytes(data)


@pytest.mark.filterwarnings("ignore:Data type alias")
@pytest.mark.parametrize("name", ["num_atoms", "num_edges", "places"])
def test_every_flipped_bit_of_the_index(copied, name):
    """Damage in the index is refused or harmless to what is read, and `verify` finds all of it."""
    path = copied / f"{name}.npy"
    data = path.read_bytes()
    expected = [make_structure(number) for number in numbers_of("train")]
    bits = [*range(8 * 128), *np.random.default_rng(0).integers(8 * 128, 8 * len(data), 150).tolist()]
    for bit in bits:
        flip(path, bit)
        try:
            store = open_store(copied, on_error="skip")
        except ValueError as error:
            assert name in str(error)  # noqa: PT017
        else:
            number = max(bit // 8 - 128, 0) // store._places.dtype.itemsize if name == "places" else 0
            try:
                assert same(expected[number], store[number])
            except DamagedRecord:
                assert name == "places"
            assert problems_of_index(copied, name)
        path.write_bytes(data)


def problems_of_index(path, name):
    return dict(islice(verify(path), 3))[f"{name}.npy"]


def test_bad_calls(copied, tmp_path):
    with pytest.raises(ValueError, match=r"no dataset\.json: not a dataset, or its conversion has not"):
        open_store(tmp_path / "none")
    with pytest.raises(ValueError, match='on_error: expected "raise" or "skip", got'):
        open_store(copied, on_error="ignore")
    os.truncate(copied / "places.npy", 500)
    with pytest.raises(ValueError, match=r"places\.npy: missing or damaged"):
        open_store(copied)
    with pytest.raises(ValueError, match="expected at least one"):
        write_shard(tmp_path / "empty.lmdb", [])
    assert not (tmp_path / "empty.lmdb").exists()


def test_an_interrupted_shard_leaves_no_file(tmp_path):
    def structures():
        yield make_structure(0)
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        write_shard(tmp_path / "shard.lmdb", structures())
    assert not list(tmp_path.iterdir())
