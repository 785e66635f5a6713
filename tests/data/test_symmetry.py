"""Crystals of CIFs: the same atoms, in the same order, to the last digit, as ase.io's own slow way makes them."""

import io
import warnings
from pathlib import Path

import ase.io.cif
import numpy as np
import pytest
from ase.spacegroup import Spacegroup
from hypothesis import given, settings
from hypothesis import strategies as st
from support.hostile_files import CIF_HEAD

from ejmp.data.readers import symmetry
from ejmp.limits import LimitError

SPECIAL = [0.0, 0.25, 0.5, 0.75, 1 / 3, 0.3333, 2 / 3, 0.1234, 0.9999, 0.9996, 0.0004]


def block_of(group, sites, occupancies=None):
    head = CIF_HEAD.replace("_cell_length_c 100", "_cell_length_c 120")
    columns = ["label", "fract_x", "fract_y", "fract_z", *(["occupancy"] if occupancies else [])]
    text = f"{head}_space_group_IT_number {group}\nloop_\n" + "".join(f"_atom_site_{name}\n" for name in columns)
    for k, (x, y, z) in enumerate(sites):
        text += f"{'OCNS'[k % 4]} {x} {y} {z} {occupancies[k] if occupancies else ''}\n"
    return next(ase.io.cif.parse_cif(io.StringIO(text)))


def same(block):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = block.get_atoms()
    found = symmetry.crystal(block, Path("x.cif"))
    assert found.numbers.tolist() == expected.numbers.tolist()
    np.testing.assert_array_equal(found.positions, expected.positions)
    np.testing.assert_array_equal(found.cell.array, expected.cell.array)
    assert found.pbc.all()
    assert found.arrays.keys() == expected.arrays.keys()
    assert found.info.keys() == expected.info.keys()
    assert found.arrays["spacegroup_kinds"].tolist() == expected.arrays["spacegroup_kinds"].tolist()


@settings(max_examples=60, deadline=None)
@given(
    group=st.sampled_from([1, 2, 14, 62, 148, 166, 194, 217, 225, 227, 230]),
    sites=st.lists(st.tuples(*[st.sampled_from(SPECIAL)] * 3), min_size=1, max_size=4),
)
def test_same_as_ase(group, sites):
    same(block_of(group, sites))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.1004, 0.6]), st.sampled_from([0.2, 0.5, 1.0])), min_size=1, max_size=5)
)
def test_main_species_is_that_of_ase(rows):
    same(block_of(1, [(x, 0.5, 0.5) for x, _ in rows], [share for _, share in rows]))


def test_too_many_atoms():
    sites = np.random.default_rng(0).random((600, 3))
    with pytest.raises(LimitError, match=r"x\.cif: 100,\d{3} atoms or more: the limit atoms"):
        symmetry.images(Spacegroup(225), sites, Path("x.cif"))


def test_many_atoms_at_almost_one_place():
    sites = np.linspace(0, 0.9e-3, 200)[:, None] * [1, 0, 0]
    places, kinds = symmetry.images(Spacegroup(1), sites, Path("x.cif"))
    assert (places.tolist(), kinds) == ([[0, 0, 0]], [0])
