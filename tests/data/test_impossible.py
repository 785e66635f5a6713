"""Structures that cannot be are refused, with file and frame, or left out and counted; possible ones are read right."""

import itertools
import pickle
import re
import subprocess
import sys

import ase
import ase.io
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.data_sources import oc_record, write_hdf5, write_lmdb
from support.inputs import environment, shared_file

import ejmp.data
from ejmp.cli import main
from ejmp.data import Structure, checking, convert, open_store, read
from ejmp.data.readers import validation
from ejmp.data.readers.hdf5 import ANI1X_LAYOUT, SPICE_LAYOUT
from ejmp.data.readers.impossible import COVALENT_RADII, LEAST, NEAREST, TooNearError, check_possible
from ejmp.data.sampling.loader import Loader
from ejmp.data.sampling.mix import InOrder
from ejmp.data.store.shard import write_shard

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def structure(numbers, positions, cell=None, pbc=False):
    pbc = np.broadcast_to(pbc, (3,)).copy()
    return Structure(
        numbers=np.array(numbers),
        positions=np.array(positions, float).reshape(-1, 3),
        cell=None if cell is None else np.array(cell, float),
        pbc=pbc,
    )


def worst_by_hand(s):
    """The least distance over its limit, of all pairs of atoms and of images up to six cells away."""
    cell = np.zeros((3, 3)) if s.cell is None else s.cell
    steps = np.array(list(itertools.product(*[range(-6, 7) if p else (0,) for p in s.pbc])))
    least = np.inf
    for i, j in itertools.combinations_with_replacement(range(len(s.numbers)), 2):
        limit = max(LEAST, NEAREST * (COVALENT_RADII[s.numbers[i]] + COVALENT_RADII[s.numbers[j]]))
        apart = np.linalg.norm(s.positions[i] - s.positions[j] + steps @ cell, axis=1)
        apart = apart[(steps != 0).any(1)] if i == j else apart
        least = min(least, *(apart / limit), np.inf)
    return least


def refused(s):
    try:
        check_possible(s)
    except TooNearError:
        return True
    return False


def test_what_the_limit_is():
    assert refused(structure([1, 1], [[0, 0, 0], [0, 0, 0.3]]))
    assert not refused(structure([1, 1], [[0, 0, 0], [0, 0, 0.5]]))
    assert refused(structure([2, 2], [[0, 0, 0], [0, 0, 0.3]]))
    assert not refused(structure([6, 1], [[0, 0, 0], [0, 0, 0.397]]))  # of JMP's own LMDBs in ../shared/cases/23
    assert refused(structure([8, 8], [[0, 0, 0], [0, 0, 0.3]]))
    assert not refused(structure([118], [[0, 0, 0]]))
    image = structure([1], [[0, 0, 0]], np.diag([0.3, 9, 9]), (True, False, False))
    with pytest.raises(TooNearError, match=r"atom 0 and its own image are 0\.3 A apart"):
        check_possible(image)
    assert [round(float(COVALENT_RADII[z]), 2) for z in (1, 6, 8, 26, 55, 96, 97)] == [
        0.31, 0.76, 0.66, 1.32, 2.44, 1.69, 2.0,
    ]  # fmt: skip


def test_the_demo_passes():
    for name in ejmp.data.DEMO_MIX + ejmp.data.DEMO_DOWNSTREAM:
        data = ejmp.data.demo(name, "val")
        for k in range(min(len(data), 60)):
            check_possible(data[k])


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 6),
    pbc=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    size=st.floats(1.0, 6.0),
    boxes=st.booleans(),
)
def test_near_atoms_are_found_in_any_cell(seed, n, pbc, size, boxes):
    rng = np.random.default_rng(seed)
    cell = rng.normal(size=(3, 3)) * size
    heights = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    if heights.min() < 0.8:  # six cells away is not far enough by hand
        return
    numbers = rng.choice([1, 6, 8, 14, 55], size=n)
    s = structure(numbers, rng.uniform(-1, 2, (n, 3)) @ cell, cell if any(pbc) else None, pbc)
    worst = worst_by_hand(s)
    if abs(worst - 1) < 1e-9:
        return
    with pytest.MonkeyPatch.context() as patch:
        if boxes:
            patch.setattr("ejmp.data.readers.impossible.MOST_AT_ONCE", 0)
        assert refused(s) == (worst < 1)


def test_large_structures_take_little_time_and_memory():
    grid = np.stack(np.meshgrid(*[np.arange(40.0)] * 3), -1).reshape(-1, 3) * 1.6
    s = structure(np.full(len(grid), 6), grid, np.eye(3) * 64, True)
    check_possible(s)
    s.positions[1234] = s.positions[4321] + 0.1
    with pytest.raises(TooNearError, match="atoms 1234 and 4321"):
        check_possible(s)
    s.positions[:] = 1.0
    with pytest.raises(TooNearError, match="0 A apart"):
        check_possible(s)


@pytest.mark.parametrize(
    ("cell", "pbc", "message"),
    [
        (np.zeros((3, 3)), True, "needs a volume"),
        ([[9, 0, 0], [0, 9, 0], [9, 9, 0]], True, "needs a volume"),
        ([[9, 0, 0], [0, 0.05, 0], [0, 0, 9]], True, "closer than 0.1 A"),
        ([[9, 0, 0], [18, 0, 0], [0, 0, 0]], (True, True, False), "needs a volume"),
        (None, True, r"cell: expected \[3, 3\] of a periodic structure, got none"),
    ],
)
def test_cells_without_a_volume(tmp_path, cell, pbc, message):
    s = Structure(numbers=[6], positions=[[0, 0, 0]], cell=cell, pbc=pbc)
    with pytest.raises(ValueError, match=f"x: frame 3: cell.*{message}|x: frame 3: .*{message}"):
        validation.validate(s, tmp_path / "x", "frame 3")


def test_a_slab_needs_no_third_vector(tmp_path):
    s = structure([6, 6], [[0, 0, 0], [0, 0, 1.4]], [[3, 0, 0], [0, 3, 0], [0, 0, 0]], (True, True, False))
    assert validation.validate(s, tmp_path, "").pbc.tolist() == [True, True, False]


@pytest.mark.parametrize(("name", "problem"), [("dup", "atoms 1 and 2.*0.005 A apart"), ("flat", "needs a volume")])
def test_one_bad_structure(tmp_path, capfd, name, problem):
    """Case 19: refused with file and frame; left out and counted; reported by verify; named by training."""
    source = shared_file(f"cases/19-one-bad-structure-in-training/{name}.xyz")
    assert main(["data", "convert", str(source), str(tmp_path / "a"), "--format", "ase", "--split", "train"]) == 2
    assert re.search(f"{name}.xyz: frame 12: .*{problem}", capfd.readouterr().err)
    with checking(on_error="skip") as checks:
        (folder,) = convert(source, tmp_path / "b", format="ase", split="train", shard_size=5)
    store, everything = open_store(folder), ase.io.read(source, ":")
    assert [s.id for s in store] == [f"{name}.xyz:{k}" for k in range(25) if k != 12]
    np.testing.assert_allclose(store[12].positions, everything[13].positions)
    assert next(iter(checks.skipped)).startswith(f"{source}: frame 12: ")
    assert len(checks.skipped) == 1
    assert "1 structures" in capfd.readouterr().err
    with checking(allow_close=True, on_error="skip"):
        assert len(list(read(source, format="ase"))) == (25 if name == "dup" else 24)


def test_verify_reports_what_an_older_conversion_let_through(tmp_path, capfd):
    source = shared_file("cases/19-one-bad-structure-in-training/dup.xyz")
    with checking(allow_close=True):
        (folder,) = convert(source, tmp_path / "b", format="ase", split="train")
    assert main(["data", "verify", str(folder)]) == 1
    shown = capfd.readouterr()
    assert "key 000000000012, structure dup.xyz:12: positions: atoms 1 and 2" in shown.err
    assert "1 problems" in shown.out
    assert main(["data", "verify", str(folder), "--allow-close"]) == 0


def test_training_names_the_structure(tmp_path):
    flat = shared_file("cases/19-one-bad-structure-in-training/flat.xyz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "check_possible", lambda *_, **__: None)
        (folder,) = convert(flat, tmp_path / "slabs", format="ase", split="train")
    data = open_store(folder)
    loader = Loader(datasets=[data], sampler=InOrder(sizes=[25], batch_size=25))
    with pytest.raises(ValueError, match=r"slabs\[12\].*cell: .*\(in slabs\[12\], id 'flat.xyz:12'\)"):
        next(iter(loader.batches()))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pair=st.sampled_from([(1, 1), (1, 8), (6, 6), (26, 26), (55, 9), (2, 2)]),
    distance=st.floats(0.0, 2.5),
    across=st.booleans(),
    cut=st.integers(0, 400),
)
def test_files_of_any_distance_cut_anywhere(tmp_path, pair, distance, across, cut):
    """Each is read right, or refused with file and frame."""
    start = 8.9 if across else 1.0
    atoms = ase.Atoms(pair, [[start, 1, 1], [start + distance, 1, 1]], cell=[9, 9, 9], pbc=True)
    atoms.wrap()
    file = tmp_path / "x.xyz"
    ase.io.write(file, [atoms, atoms], format="extxyz")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - cut] if cut < len(whole) else b"")
    limit = max(LEAST, NEAREST * (COVALENT_RADII[pair[0]] + COVALENT_RADII[pair[1]]))
    if abs(distance - limit) < 1e-5:
        return
    try:
        found = list(read(file, format="ase"))
    except ValueError as error:
        assert "x.xyz" in str(error)  # noqa: PT017
        assert "frame" in str(error) or cut  # noqa: PT017
        assert distance < limit or cut
    else:
        assert distance > limit
        assert len(found) == 2 or (len(found) == 1 and whole[: len(whole) - cut].count(b"Lattice") == 1)
        np.testing.assert_allclose(found[0].positions, atoms.positions, atol=1e-7)


def test_spice_with_a_group_of_nothing(capfd):
    """Case 1."""
    found = list(read(shared_file("cases/01-spice-2.0.1-empty-group/spice201.h5"), format="spice"))
    assert len(found) == 2
    assert found[0].energy == pytest.approx(-76.4 * 27.211386245988, abs=1e-6)
    assert "1 of 2 groups hold no conformations" in capfd.readouterr().err
    import h5py

    with h5py.File(shared_file("cases/01-spice-2.0.1-empty-group/spice201.h5")) as file:
        group = next(g for g in file.values() if g["conformations"].shape[0])
        gradient, bohr = group["dft_total_gradient"][0], 0.529177210903
    np.testing.assert_allclose(found[0].forces, -gradient * 27.211386245988 / bohr, rtol=1e-6)


def test_layout_of_another_dataset_says_what_is_missing(tmp_path):
    import h5py

    with h5py.File(tmp_path / "ani2x.h5", "w") as file:
        for name, shape in {"species": (3, 4), "coordinates": (3, 4, 3), "energies": (3,), "forces": (3, 4, 3)}.items():
            file[f"4/{name}"] = np.ones(shape)
    with pytest.raises(
        ValueError, match="group 4 has coordinates, energies, forces, species, and lacks atomic_numbers"
    ):
        list(read(tmp_path / "ani2x.h5", format="ani1x"))


@pytest.mark.parametrize("name", ["oc20", "ani1x", "transition1x"])
def test_jmp_preprocessed_molecules(name):
    """Case 23."""
    found = list(read(shared_file("cases/23-jmp-own-lmdbs/ani1x"), format=name))
    assert len(found) == 3
    assert found[0].energy == pytest.approx(-1096.0)
    assert not any(s.pbc.any() for s in found)
    assert all(s.tags is None for s in found)
    np.testing.assert_allclose(found[0].forces, 0.5)


def test_slabs_without_a_cell_stay_refused(tmp_path):
    write_lmdb(tmp_path / "x.lmdb", [oc_record(cell=...)])  # its tags are those of a slab
    with pytest.raises(ValueError, match="record 0: no cell"):
        list(read(tmp_path / "x.lmdb", format="oc20"))


def test_folder_of_lmdb_open(tmp_path):
    import lmdb

    with lmdb.open(str(tmp_path / "data.lmdb"), map_size=1 << 20) as file, file.begin(write=True) as change:
        change.put(b"0", oc_record(0))
        change.put(b"length", pickle.dumps(1))
    for source in (tmp_path / "data.lmdb", tmp_path):
        (found,) = read(source, format="oc20")
        assert len(found.numbers) == 5


@pytest.mark.parametrize("protocol", [2, 5])
def test_lmdb_of_pickled_atoms_is_refused_by_what_it_is(tmp_path, protocol):
    write_lmdb(tmp_path / "x.lmdb", [pickle.dumps(ase.Atoms("H2", [[0, 0, 0], [0, 0, 0.7]]), protocol=protocol)])
    with pytest.raises(ValueError, match=r"record 0: a pickled ase\.Atoms"):
        list(read(tmp_path / "x.lmdb", format="oc20"))


@FEW
@given(empty=st.integers(0, 3), full=st.integers(1, 3), small=st.booleans())
def test_hdf5_with_empty_groups(tmp_path, empty, full, small):
    import h5py

    layout = ANI1X_LAYOUT if small else SPICE_LAYOUT
    path = tmp_path / "x.h5"
    write_hdf5(path, layout, [f"g{k}" for k in range(full)])
    with h5py.File(path, "a") as file:
        for k in range(empty):
            for name in (layout.numbers, layout.positions, layout.energy, layout.forces, *layout.targets):
                file[f"e{k}/{name}"] = np.zeros((0,) if name != layout.numbers else (5,), "f4")
    found = list(read(path, format="ani1x" if small else "spice"))
    assert len(found) == 3 * full


def test_frames_of_hdf5_with_atoms_too_near(tmp_path):
    positions = np.arange(45, dtype=np.float32).reshape(3, 5, 3)
    positions[1, 4] = positions[1, 0]
    write_hdf5(tmp_path / "x.h5", ANI1X_LAYOUT, ["g"], coordinates=positions)
    with pytest.raises(ValueError, match=r"x\.h5: g, frame 1: positions: atoms 0 and 4"):
        list(read(tmp_path / "x.h5", format="ani1x"))
    with checking(on_error="skip"):
        assert [s.id for s in read(tmp_path / "x.h5", format="ani1x")] == ["g:0", "g:2"]


POSCAR = "{comment}\n1.0\n5 0 0\n0 5 0\n0 0 5\n{symbols}1 1\nDirect\n0 0 0\n0.5 0.5 0.5\n"


def test_poscar_without_symbols(tmp_path):
    file = tmp_path / "POSCAR"
    file.write_text(POSCAR.format(comment="some crystal", symbols=""))
    with pytest.raises(ValueError, match=r"POSCAR: a POSCAR without symbols \(VASP 4\): line 6 is '1 1'"):
        list(read(file, format="ase"))
    for comment, symbols in (("Na Cl", ""), ("some crystal", "Na Cl\n")):
        file.write_text(POSCAR.format(comment=comment, symbols=symbols))
        assert next(read(file, format="ase")).numbers.tolist() == [11, 17]


@pytest.mark.parametrize("symbol", ["D", "H1", "Qq"])
def test_symbols_that_are_no_elements(tmp_path, symbol):
    (tmp_path / "x.xyz").write_text(f"2\nProperties=species:S:1:pos:R:3\n{symbol} 0 0 0\nO 0 0 1\n")
    with pytest.raises(ValueError, match=f"x.xyz: frame 0: '{symbol}' is no element"):
        list(read(tmp_path / "x.xyz", format="ase"))


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
from ejmp.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_full_disk_ends_a_conversion_with_one_message(tmp_path):
    source = shared_file("cases/19-one-bad-structure-in-training/val.xyz")
    words = ["data", "convert", str(source), str(tmp_path / "x"), "--format", "ase", "--split", "train"]
    run = subprocess.run(
        [sys.executable, "-c", FULL, *words], capture_output=True, text=True, env=environment(), check=False
    )
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert "what was finished before stays, and the same command goes on from there" in run.stderr
    assert not list((tmp_path / "x/train").glob("*.tmp"))
    assert main(words) == 0


def test_closed_pipe_is_no_error():
    run = subprocess.run(
        ["/bin/bash", "-c", f"{sys.executable} -m ejmp.cli doctor | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert run.returncode in (0, 141)
    assert "roken pipe" not in run.stderr


def test_a_shard_says_which_file_cannot_be_written(tmp_path):
    (tmp_path / "here").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="here"):
        write_shard(tmp_path / "here/x.lmdb", [structure([1], [[0, 0, 0]])])
