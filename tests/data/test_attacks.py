"""A short run of `python -m support.attack_sources`, and honest files that look like what it refuses."""

import subprocess
import sys
import tracemalloc

import h5py
import numpy as np
import pytest
from support.data_sources import xyz_text
from support.hostile_files import cif
from support.inputs import TESTS, environment

from ejmp.data import convert, limiting, open_store, read
from ejmp.data.readers.hdf5 import ANI1X_LAYOUT


def test_attacks_are_refused():
    words = [sys.executable, "-m", "support.attack_sources", "--short", "--quiet"]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=900, check=False, cwd=TESTS, env=environment(OMP_NUM_THREADS="1")
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " 0 failures" in done.stdout


def test_limits_can_be_raised(tmp_path, capsys):
    from ejmp.cli import main

    file = cif(300)(tmp_path)
    arguments = ["data", "convert", str(file), str(tmp_path / "x"), "--format", "ase", "--split", "train"]
    assert main([*arguments, "--limit", "atoms=299"]) != 0
    text = capsys.readouterr().err
    assert "a.cif" in text
    assert "--limit atoms=300" in text
    assert main([*arguments, "--limit", "atoms=300"]) == 0
    assert main(["data", "verify", str(tmp_path / "x" / "train"), "--limit", "manifest_bytes=10"]) != 0
    assert "dataset.json" in capsys.readouterr().err
    with limiting(atoms=299), pytest.raises(ValueError, match="300 atoms"):
        list(read(file, format="ase"))


def test_a_framework_of_10_000_atoms(tmp_path):
    (found,) = read(cif(10_000)(tmp_path), format="ase")
    side = 22  # the least whose third power holds 10,000
    k = np.arange(10_000)
    expected = 100 * np.stack([k % side, k // side % side, k // side**2], 1) / side
    np.testing.assert_allclose(found.positions, expected, atol=1e-4)


def test_hdf5_with_chunks_compressed_and_growing(tmp_path):
    """What is refused of chunks is not what h5py writes: compressed, shuffled, checked, resizable."""
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file.create_group("C1H4")
        group[ANI1X_LAYOUT.numbers] = np.array([6, 1, 1, 1, 1], np.uint8)
        for name, shape in ((ANI1X_LAYOUT.positions, (5, 3)), (ANI1X_LAYOUT.forces, (5, 3)), (ANI1X_LAYOUT.energy, ())):
            values = rng.normal(size=(20_000, *shape)).astype("f4")
            if name == ANI1X_LAYOUT.positions:
                values = values / 10 + 3 * np.arange(5, dtype="f4")[:, None]
            group.create_dataset(
                name, data=values, chunks=(20_000, *shape), maxshape=(None, *shape), compression="gzip", shuffle=True,
                fletcher32=True,
            )  # fmt: skip
        positions = group[ANI1X_LAYOUT.positions][:]
    found = list(read(tmp_path / "a.h5", format="ani1x"))
    assert len(found) == 20_000
    np.testing.assert_array_equal(found[-1].positions, positions[-1])


def test_soft_links_inside_the_file(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["numbers"] = np.array([6, 1, 1, 1, 1], np.uint8)
        group = file.create_group("C1H4")
        group[ANI1X_LAYOUT.numbers] = h5py.SoftLink("/numbers")
        for name, shape in ((ANI1X_LAYOUT.positions, (5, 3)), (ANI1X_LAYOUT.forces, (5, 3)), (ANI1X_LAYOUT.energy, ())):
            group[name] = np.broadcast_to(np.arange(15.0).reshape(5, 3) if shape else 0.0, (2, *shape))
    assert [s.numbers.tolist() for s in read(tmp_path / "a.h5", format="ani1x")] == [[6, 1, 1, 1, 1]] * 2


@pytest.mark.slow
def test_two_gigabytes_of_xyz(tmp_path):
    """Read and converted within 1.5 GB in a process of its own; frames of 100 atoms, 8 kB each."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(5.0)] * 3), -1).reshape(-1, 3)[:100] * 3
    with (tmp_path / "big.extxyz").open("w") as file:
        rows = [f"O {x:.9f} {y:.9f} {z:.9f} " for x, y, z in grid + rng.normal(size=grid.shape) / 10]
        for k in range(250_000):
            forces = rng.normal(size=(100, 3))
            file.write(f"100\nProperties=species:S:1:pos:R:3:forces:R:3 energy={-k / 100}\n")
            file.writelines(
                f"{row}{fx:.12f} {fy:.12f} {fz:.12f}\n" for row, (fx, fy, fz) in zip(rows, forces, strict=True)
            )
            if file.tell() > 2e9:
                break
    frames = k + 1
    code = (
        "import resource, sys; from ejmp.data import read; "
        "n = sum(1 for _ in read(sys.argv[1], format='ase')); "
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "big.extxyz")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment(OMP_NUM_THREADS="1"))
    found, peak = map(int, done.stdout.split())
    assert found == frames
    assert peak < 1.5e9


def test_compressed_xyz_is_streamed(tmp_path):
    """Memory does not grow with the number of frames, once a block of them has been read."""
    import gzip

    text = xyz_text(["Properties=species:S:1:pos:R:3:forces:R:3 energy={energy}"] * 3).encode()
    peaks = []
    for frames in (900, 2700):
        path = tmp_path / f"{frames}.xyz.gz"
        path.write_bytes(gzip.compress(text * (frames // 3)))
        tracemalloc.start()
        assert sum(1 for _ in read(path, format="ase")) == frames
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + (1 << 19)


CHANGES = {
    "grown": lambda path: path.open("a").write("5\n"),
    "rewritten": lambda path: path.write_text(path.read_text()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_sources_that_change(name, tmp_path):
    """Nothing of them is published; when they have come to rest, the same command goes on."""
    path = tmp_path / "a.xyz"
    path.write_text(xyz_text(["Properties=species:S:1:pos:R:3:forces:R:3 energy={energy}"] * 3) * 40)
    changed = []

    def progress(done, _total):
        if done >= 50 and not changed:
            changed.append(done)
            CHANGES[name](path)

    with pytest.raises(ValueError, match=r"a\.xyz: .*(changed while it was read|ends early)"):
        convert(path, tmp_path / "x", format="ase", split="train", shard_size=50, progress=progress)
    assert not list((tmp_path / "x").glob("*/dataset.json"))
    if name == "rewritten":
        (folder,) = convert(path, tmp_path / "x", format="ase", split="train", shard_size=50)
        assert len(open_store(folder)) == 120
