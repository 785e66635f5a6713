"""Held atoms mean the same in every format, and tags are OC20's only where somebody says so."""

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, fcc111, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian, FixScaled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support import data_sources as made
from support.inputs import shared_file

from ejmp import cli
from ejmp.data import ReadOptions, open_store, read

MANY = settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
N = 4
CELL = np.diag([7.0, 8.0, 9.0])
POSITIONS = np.array([[0.0, 0, 0], [2, 0, 1], [0, 2.5, 2], [2, 2, 4]])


def only(path, **options):
    (s,) = read(path, format="ase", options=ReadOptions(**options))
    return s


@pytest.mark.parametrize("ending", ["extxyz", "traj"])
def test_case_of_move_mask(ending):
    """Issue 13, case 05: forces of all atoms, held ones too; an atom that is held in part counts as free."""
    folder = shared_file("cases/05-extxyz-move-mask-forces")
    for name, fixed in (("fixed", [1, 1, 0, 0]), ("mixed", [1, 0, 0, 0])):
        s = only(folder / f"{name}.{ending}")
        assert s.fixed.tolist() == list(map(bool, fixed))
        assert s.energy == -10
        np.testing.assert_array_equal(s.forces, np.full((4, 3), 0.7))


def constrained(held, kind):
    atoms = Atoms("Cu4", POSITIONS, cell=CELL, pbc=True)
    whole = held.all(1)
    others = [k for k in np.flatnonzero(held.any(1)) if kind == "cartesian" or not whole[k]]
    constraint = FixScaled if kind == "scaled" else FixCartesian
    constraints = [constraint(int(k), mask=held[k]) for k in others]
    if kind != "cartesian" and whole.any():
        constraints.append(FixAtoms(mask=whole))
    atoms.set_constraint(constraints)
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.full((N, 3), 0.25))
    return atoms


def write_held(folder, held, kind):
    """Write a structure whose atoms are held in these directions, in one of the ways that files have for it."""
    if kind == "poscar":
        rows = [" ".join(map(str, (*r, *("F" if h else "T" for h in k)))) for r, k in zip(POSITIONS, held, strict=True)]
        text = "\n".join(["x", "1.0", "7 0 0", "0 8 0", "0 0 9", "Cu", "4", "Selective", "Cartesian", *rows])
        (folder / "POSCAR.01").write_text(text + "\n")
        return folder / "POSCAR.01"
    if kind == "extxyz":
        rows = [
            " ".join(["Cu", *map(str, r), *("F" if h else "T" for h in k), "0.25 0.25 0.25"])
            for r, k in zip(POSITIONS, held, strict=True)
        ]
        columns = "Properties=species:S:1:pos:R:3:move_mask:L:3:forces:R:3 energy=-1"
        (folder / "a.xyz").write_text("\n".join(["4", columns, *rows]) + "\n")
        return folder / "a.xyz"
    path = folder / f"a.{kind.partition(' ')[0]}"
    if kind == "db data":
        with ase.db.connect(path) as database:
            database.write(Atoms("Cu4", POSITIONS, cell=CELL, pbc=True), data={"move_mask": ~held})
        return path
    ase.io.write(path, constrained(held, kind.partition(" ")[2]))
    return path


KINDS = ["poscar", "extxyz", "traj cartesian", "traj atoms", "traj scaled", "db atoms", "db cartesian", "db data"]


@MANY
@given(arrays.arrays(bool, (N, 3)), st.sampled_from(KINDS))
def test_held_atoms_are_the_same_in_every_format(tmp_path_factory, held, kind):
    s = only(write_held(tmp_path_factory.mktemp("a"), held, kind))
    whole = held.all(1)
    assert (np.zeros(N, bool) if s.fixed is None else s.fixed).tolist() == whole.tolist()
    if not kind.startswith(("poscar", "db data")):
        np.testing.assert_array_equal(s.forces, np.full((N, 3), 0.25))
    if whole.any() and not whole.all():
        assert only(write_held(tmp_path_factory.mktemp("a"), held, kind), tags="infer").tags.tolist() == [
            0 if h else 1 for h in whole
        ]


def test_a_mask_that_ase_would_misread(tmp_path):
    """ASE takes a logical value that it does not know for false, which would hold every atom."""
    text = "2\nProperties=species:S:1:move_mask:L:1:pos:R:3\nCu 1 0 0 0\nCu 0 0 0 2\n"
    (tmp_path / "a.xyz").write_text(text)
    with pytest.raises(ValueError, match=r"a\.xyz: frame 0: move_mask: expected T or F, got 0, 1"):
        only(tmp_path / "a.xyz")
    (tmp_path / "a.xyz").write_text(text.replace(":L:", ":I:"))
    assert only(tmp_path / "a.xyz").fixed.tolist() == [False, True]


@MANY
@given(st.lists(st.integers(0, 4), min_size=3, max_size=3), st.sampled_from(["xyz", "traj", "db"]))
def test_tags_are_left_out_unless_asked_for(tmp_path_factory, tags, ending):
    path = tmp_path_factory.mktemp("a") / f"a.{ending}"
    if ending == "xyz":
        rows = "".join(f"Cu 0 0 {3 * k} {tag}\n" for k, tag in enumerate(tags))
        path.write_text(f"3\nProperties=species:S:1:pos:R:3:tags:I:1\n{rows}")
    else:
        ase.io.write(path, Atoms("Cu3", [[0, 0, 3 * k] for k in range(3)], tags=tags))
    assert only(path).tags is None
    assert only(path, tags="none").tags is None
    if max(tags) <= 2:
        assert only(path, tags="oc20").tags.tolist() == tags
    else:
        with pytest.raises(ValueError, match=rf"a\.{ending}: frame 0: tags: expected \(0, 1, 2\)"):
            only(path, tags="oc20")
    with pytest.raises(ValueError, match=rf"a\.{ending}: frame 0: --tags infer: expected a slab"):
        only(path, tags="infer")


def slab(layers=2, adsorbate="CO"):
    atoms = fcc111("Cu", (2, 2, layers), vacuum=8)
    atoms.set_constraint(FixAtoms(mask=atoms.get_tags() == layers))
    add_adsorbate(atoms, molecule(adsorbate), 2, "ontop")
    return atoms


def test_layers_of_a_slab_are_not_tags_of_oc20(tmp_path, capsys):
    """ASE numbers two layers 2 and 1, and adsorbates 0; to OC20 that is an adsorbate, a surface and a bulk."""
    ase.io.write(tmp_path / "a.traj", [slab(), slab()])
    assert [s.tags for s in read(tmp_path / "a.traj")] == [None, None]
    err = capsys.readouterr().err
    assert err.count("tags are left out, as ASE gives them no meaning (0, 1, 2): say --tags oc20 if") == 1
    command = [
        "data",
        "convert",
        str(tmp_path / "a.traj"),
        str(tmp_path / "set"),
        "--split",
        "train",
        "--tags",
        "infer",
    ]
    assert cli.main(command) == 0
    assert "tags" not in capsys.readouterr().err.replace("--tags", "")
    for s in open_store(tmp_path / "set" / "train"):
        assert s.tags.tolist() == [0] * 4 + [1] * 4 + [2] * 2


def test_inference_agrees_with_oc20():
    """Wherever held atoms and elements tell, they tell OC20's own tags; the other structures are refused."""
    folder = shared_file("data/oc20/s2ef_extxyz_derived")
    truth = {s.id: s.tags for s in read(folder, format="ase", options=ReadOptions(tags="oc20"))}
    from ejmp.data.readers.tags import infer_tags

    told = refused = 0
    for s in read(folder, format="ase", options=ReadOptions(tags="none")):
        held = set(s.numbers[s.fixed].tolist())
        if any(z in (1, 6, 7, 8) and z in held for z in s.numbers[~s.fixed].tolist()):
            refused += 1
            with pytest.raises(ValueError, match="may be of the slab or of an adsorbate"):
                infer_tags(s.numbers, s.fixed)
        else:
            told += 1
            np.testing.assert_array_equal(infer_tags(s.numbers, s.fixed), truth[s.id])
    assert told > refused


def test_what_cannot_be_inferred(tmp_path):
    oxide = Atoms("Ni2O2NiO", [[0, 0, k] for k in range(0, 12, 2)], cell=CELL * 2, pbc=True)
    oxide.set_constraint(FixAtoms([0, 1, 2, 3]))
    ase.io.write(tmp_path / "oxide.traj", oxide)
    with pytest.raises(ValueError, match=r"oxide\.traj: frame 0: --tags infer: free atoms of elements \[8\] may be of"):
        only(tmp_path / "oxide.traj", tags="infer")
    sulfur = slab(adsorbate="SH")
    ase.io.write(tmp_path / "sulfur.traj", sulfur)
    with pytest.raises(ValueError, match=r"free atoms of elements \[16\] may be of the slab or of an adsorbate"):
        only(tmp_path / "sulfur.traj", tags="infer")


def test_tags_of_oc_readers(tmp_path):
    """Their tags are OC20's unless somebody says otherwise."""
    path = made.write_oc(tmp_path)
    for tags, expected in ((None, [0, 0, 1, 2, 2]), ("oc20", [0, 0, 1, 2, 2]), ("none", None)):
        found = [s.tags for s in read(path, format="oc20", options=ReadOptions(tags=tags))]
        assert [None if tags is None else tags.tolist() for tags in found] == [expected] * made.FRAMES
    with pytest.raises(ValueError, match=r"data\.0000\.lmdb/0.*: --tags infer: free atoms of elements \[1\] may be"):
        list(read(path, format="oc20", options=ReadOptions(tags="infer")))


def test_frames_without_tags(tmp_path):
    """Who says that tags are OC20's wants every structure to have them."""
    ase.io.write(tmp_path / "a.traj", molecule("CO"))
    with pytest.raises(ValueError, match=r"a\.traj: frame 0: no tags, which --tags oc20 asks for"):
        only(tmp_path / "a.traj", tags="oc20")
