"""CIF files: disordered crystals are refused by what they are, symmetry is applied, symbols and numbers are checked."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.inputs import shared_file

from ejmp.data import checking, convert, open_store, read

CASES = "cases/16-cif-disorder-symmetry"
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


CIFS = {
    "blocks2": [[30], [30]],
    "deuterium": [[8, 1, 1]],
    "esd_unknown": [[30, 8, 6]],
    "mof71_setting": [[6, 6, 27, 8, 8, 8, 8]],
    "rounded_hex": [[42, 42, 16, 16, 16, 16]],
    "rows_twice": [[30, 8]],
    "mixed_site": "disordered: site Ni1 is occupied to 0.6; --occupancy ignore",
    "mixed_close": "disordered: site Si1 is occupied to 0.9; --occupancy ignore",
    "split_sites": "disordered: site O1A is occupied to 0.5; --occupancy ignore",
    "rounded_hex_bad": "frame 0: positions: atoms .* 0.00.* A apart",
    "no_atoms": "no atoms: none of the blocks x has a site",
    "h_riding_missing": r"site C1: _atom_site_fract_x: expected a number, got '\?'",
    "dummy": "site X1: 'X' is no element",
}


@pytest.mark.parametrize("name", CIFS)
def test_cifs(name):
    """Case 16."""
    file, right = shared_file(f"{CASES}/{name}.cif"), CIFS[name]
    if isinstance(right, list):
        assert [s.numbers.tolist() for s in read(file, format="ase")] == right
        return
    with pytest.raises(ValueError, match=f"{name}.cif: .*{right}"):
        list(read(file, format="ase"))


def test_symmetry_by_operations_alone(tmp_path):
    lines = shared_file(f"{CASES}/mof71_setting.cif").read_text().splitlines()
    text = "\n".join(line for line in lines if "space_group" not in line and "Int_Tables" not in line)
    (tmp_path / "x.cif").write_text(text)
    (found,), (named,) = (
        read(f, format="ase") for f in (tmp_path / "x.cif", shared_file(f"{CASES}/mof71_setting.cif"))
    )
    np.testing.assert_array_equal(found.numbers, named.numbers)
    np.testing.assert_allclose(found.positions, named.positions, atol=1e-9)
    without = [line for line in text.splitlines() if not line.startswith(("_symmetry_equiv", "'"))]
    without[without.index("loop_")] = "_symmetry_space_group_name_Hall '-P 2y'"
    (tmp_path / "x.cif").write_text("\n".join(without))
    with pytest.raises(ValueError, match="only a Hall symbol says its symmetry"):
        list(read(tmp_path / "x.cif", format="ase"))


def test_cif_with_occupancies_ignored(capfd):
    with checking(occupancy="ignore"):
        (mixed,) = read(shared_file(f"{CASES}/mixed_site.cif"), format="ase")
        assert mixed.numbers.tolist() == [28, 8]
        assert "occupancies are ignored" in capfd.readouterr().err
        with pytest.raises(ValueError, match=r"atoms 1 and 2.*0\.3 A apart"):
            list(read(shared_file(f"{CASES}/split_sites.cif"), format="ase"))


def test_folder_of_cifs_with_one_that_can_be_read(tmp_path, capfd):
    with checking(on_error="skip") as checks:
        (folder,) = convert(shared_file(f"{CASES}/folder"), tmp_path / "x", format="ase", split="train")
    assert [s.id for s in open_store(folder)] == ["rows_twice.cif:0"]
    assert len(checks.skipped) == 2
    assert "split_sites.cif" in capfd.readouterr().err


CIF = """data_x
_cell_length_a 10
_cell_length_b 10
_cell_length_c 10
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_equiv_pos_as_xyz 'x,y,z'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
"""


@FEW
@given(
    sites=st.lists(
        st.tuples(
            st.sampled_from(["Si", "O", "D", "Zn2+", "X", "H1", "Qq"]),
            st.integers(0, 9),
            st.sampled_from([1.0, 0.999, 0.99, 0.5, 0.0, ".", "?", 1.7]),
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda site: site[1],
    )
)
def test_cifs_of_any_occupancies(tmp_path, sites):
    file = tmp_path / "x.cif"
    file.write_text(CIF + "".join(f"A{k} {z} 0.{x} 0 0 {occ}\n" for k, (z, x, occ) in enumerate(sites)))
    elements = {"Si": 14, "O": 8, "D": 1, "Zn2+": 30, "H1": 1}
    possible = all(z in elements and (occ in (".", "?") or 0.995 <= occ <= 1) for z, _, occ in sites)
    try:
        (found,) = read(file, format="ase")
    except ValueError as error:
        assert "x.cif: block x" in str(error)  # noqa: PT017
        assert not possible
    else:
        assert possible
        assert found.numbers.tolist() == [elements[z] for z, *_ in sites]
        np.testing.assert_allclose(found.positions[:, 0], [float(x) for _, x, _ in sites], atol=1e-9)
