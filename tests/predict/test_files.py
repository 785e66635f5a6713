"""What `ejmp predict` reads: any format of ase.io but pickles, and nothing that does not say its elements."""

import pickle

import ase
import ase.io
import numpy as np
import pytest
from support.inputs import shared_file

from ejmp.predict.files import read_frames

DUMP = """ITEM: TIMESTEP
0
ITEM: NUMBER OF ATOMS
2
ITEM: BOX BOUNDS pp pp pp
0 9
0 9
0 9
ITEM: ATOMS id type {more}x y z
1 1 {a}0 0 0
2 2 {b}0 0 1.6
"""


def numbers(path):
    return [atoms.numbers.tolist() for _, atoms in read_frames([path])]


def test_lammps_dump_needs_elements(tmp_path):
    file = tmp_path / "run.lammpstrj"
    file.write_text(DUMP.format(more="", a="", b=""))
    with pytest.raises(ValueError, match=r"run\.lammpstrj: a LAMMPS dump without elements"):
        numbers(file)
    file.write_text(DUMP.format(more="element ", a="Si ", b="O "))
    assert numbers(file) == [[14, 8]]


@pytest.mark.parametrize("name", ["x.pckl", "x.traj", "x.xyz"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(ase.Atoms("H2")))
    with pytest.raises(ValueError, match="it is a pickle"):
        numbers(tmp_path / name)
    (tmp_path / name).write_bytes(b"PickleTrajectory" + pickle.dumps(ase.Atoms("H2")))
    with pytest.raises(ValueError, match="it is a pickle"):
        numbers(tmp_path / name)


def test_other_formats_are_read(tmp_path):
    atoms = ase.Atoms("CO", [[0, 0, 0], [0, 0, 1.13]], cell=[9, 9, 9], pbc=True)
    for name in ("x.traj", "x.cif", "POSCAR", "x.xyz", "x.pdb", "x.xsf"):
        ase.io.write(tmp_path / name, atoms)
        ((place, found),) = read_frames([tmp_path / name])
        assert place == f"{tmp_path / name}:0"
        np.testing.assert_allclose(found.positions, atoms.positions, atol=1e-3)


def test_disorder_and_symbols(tmp_path):
    with pytest.raises(ValueError, match="disordered: site Ni1"):
        numbers(shared_file("cases/16-cif-disorder-symmetry/mixed_site.cif"))
    (tmp_path / "x.xyz").write_text("1\nProperties=species:S:1:pos:R:3\nD 0 0 0\n")
    with pytest.raises(ValueError, match="frame 0: 'D' is no element"):
        numbers(tmp_path / "x.xyz")
