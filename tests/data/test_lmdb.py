"""The reader of LMDB files agrees with the lmdb package, and refuses damaged files on which that ends the process."""

import random

import lmdb
import pytest

from ejmp.data.readers.lmdb_pages import LmdbFile


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write a file with three levels, values on pages of their own, deleted keys and many commits."""
    path = tmp_path_factory.mktemp("lmdb") / "data.lmdb"
    rng = random.Random(0)
    values = {}
    with lmdb.open(str(path), subdir=False, map_size=1 << 28, lock=False, sync=False) as file:
        for start in range(0, 12_000, 100):
            with file.begin(write=True) as change:
                for k in range(start, start + 100):
                    key = str(k).encode()
                    values[key] = rng.randbytes(rng.choice([0, 3, 60, 500, 2000, 2037, 4080, 9000]))
                    change.put(key, values[key])
            with file.begin(write=True) as change:
                for key in rng.sample(sorted(values), 5):
                    change.delete(key)
                    del values[key]
    return path, values


def test_reads_what_lmdb_wrote(written):
    path, values = written
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as file:
        assert file.stat()["depth"] >= 3
    with LmdbFile(path) as ours, LmdbFile(path) as again:
        assert ours.entries == len(values)
        assert all(ours.get(key) == value for key, value in values.items())
        assert all(again.get(key) is None for key in (b"", b"x", b"00", b"12000", b"/", b"99999"))


def test_empty_and_single(tmp_path):
    path = tmp_path / "data.lmdb"
    with lmdb.open(str(path), subdir=False) as file:
        with file.begin(write=True):
            pass
        with LmdbFile(path) as ours:
            assert (ours.entries, ours.get(b"0")) == (0, None)
        with file.begin(write=True) as change:
            change.put(b"0", b"value")
        with LmdbFile(path) as ours:
            assert (ours.entries, ours.get(b"0"), ours.get(b"1")) == (1, b"value", None)


def test_truncated_files_are_refused(written, tmp_path):
    path, _ = written
    whole = path.read_bytes()
    cut = tmp_path / "cut.lmdb"
    rng = random.Random(1)
    for size in (0, 15, 4096, 8191, 8192, len(whole) - 1, *rng.sample(range(len(whole)), 50)):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"truncated LMDB file|not an LMDB file"):
            LmdbFile(cut)


def test_changed_bytes_give_values_or_errors(written, tmp_path):
    path, values = written
    whole = path.read_bytes()
    damaged = tmp_path / "damaged.lmdb"
    rng = random.Random(2)
    keys = rng.sample(sorted(values), 20)
    refused = 0
    for k in range(40):
        content = bytearray(whole)
        pages = [rng.randrange(len(whole) // 4096) for _ in range(1 + 40 * k)]
        for page in pages:
            content[4096 * page + rng.randrange(40)] = rng.randrange(256)
        damaged.write_bytes(content)
        try:
            with LmdbFile(damaged) as file:
                for key in keys:
                    file.get(key)
        except ValueError as error:
            refused += 1
            if "LMDB" not in str(error):
                raise
    assert refused >= 3


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "data.lmdb"
    with lmdb.open(str(path), subdir=False, max_dbs=1) as file:
        with file.begin(write=True) as change:
            change.put(b"0", b"1", db=file.open_db(b"named", txn=change))
        with LmdbFile(path) as ours, pytest.raises(ValueError, match="flags 0x2"):
            ours.get(b"named")
    path.write_bytes(b"not this" * 2000)
    with pytest.raises(ValueError, match="not an LMDB file of version 1"):
        LmdbFile(path)
