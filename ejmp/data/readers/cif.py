"""CIF files whose every site is one whole atom, with their symmetry applied; disordered crystals are no structures."""

import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ejmp.data.readers.files import import_optional
from ejmp.data.readers.symmetry import CROWD, crystal
from ejmp.data.readers.validation import current_checks
from ejmp.limits import LimitError, check_limit

WHOLE = 0.995
"""Least occupancy of a site that counts as occupied; refined ones are rarely 1 to the last digit."""
SAME_PLACE = 1e-4
"""Greatest difference of fractional coordinates of two sites that are one place."""
UNKNOWN = (".", "?")
_COORDINATES = tuple(f"_atom_site_{kind}_{axis}" for kind in ("fract", "cartn") for axis in "xyz")
_OPERATIONS = (
    "_space_group_symop_operation_xyz", "_space_group_symop.operation_xyz", "_symmetry_equiv_pos_as_xyz",
)  # fmt: skip
_GROUPS = (
    "_space_group_it_number", "_space_group.it_number", "_symmetry_int_tables_number",
    "_space_group_name_h-m_alt", "_symmetry_space_group_name_h-m", "_space_group.patterson_name_h-m",
)  # fmt: skip
"""Items by which ase.io learns a crystal's symmetry; without them it takes P 1."""
_HALL = ("_space_group_name_hall", "_symmetry_space_group_name_hall")


def read_cif(text: str, path: Path) -> Iterator[Any]:
    """Yield the crystal of each block of a CIF as ase.Atoms; blocks without atoms are passed over.

    Args:
        text: the CIF.
        path: the file it is from, for messages.

    Raises:
        LimitError: for more atoms, or longer lines, than `ejmp.limits` allows.
        ValueError: naming block and site: without coordinates or element, or, unless `checking` says
            `occupancy="ignore"`, occupied in part or by two species; or if no block has atoms.
    """
    names, has_atoms = [], False
    check_limit(path, "cif_line_bytes", max(map(len, text.split("\n"))), "bytes in one line")
    cif = import_optional("ase.io.cif")
    for block in cif.parse_cif(io.StringIO(text)):
        names.append(block.name)
        if not any(name in block for name in ("_atom_site_label", "_atom_site_type_symbol", *_COORDINATES)):
            continue
        has_atoms = True
        _check_sites(block)
        named = block
        if any(block.get(name) for name in _OPERATIONS) and not any(block.get(name) for name in _GROUPS):
            named = cif.CIFBlock(block.name, {**block, _GROUPS[0]: 1})  # ase.io wants a group; the operations count
        try:
            yield crystal(named, path)
        except LimitError:
            raise
        except Exception as error:  # ase.io documents no errors
            raise ValueError(f"block {block.name}: {type(error).__name__}: {error}") from error
    if not has_atoms:
        raise ValueError(f"no atoms: none of the blocks {', '.join(names)[:200] or '(there are none)'} has a site")


def _column(block: Any, name: str) -> list[Any] | None:
    """Return one value per site, or None."""
    values = block.get(name)
    return values if values is None or isinstance(values, list) else [values]


def _check_sites(block: Any) -> None:
    where = f"block {block.name}"
    symbols = _column(block, "_atom_site_type_symbol") or _column(block, "_atom_site_label")
    if symbols is None:
        raise ValueError(f"{where}: its sites have neither _atom_site_type_symbol nor _atom_site_label")
    labels = _column(block, "_atom_site_label") or symbols
    columns = {name: _column(block, name) for name in _COORDINATES}
    kind = next((c for c in (_COORDINATES[:3], _COORDINATES[3:]) if all(columns[name] is not None for name in c)), None)
    if kind is None:
        raise ValueError(f"{where}: its sites have no coordinates")
    for name in kind:
        for label, value in zip(labels, columns[name] or (), strict=False):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{where}, site {label}: {name}: expected a number, got {value!r}")
    elements = [_element(where, label, symbol) for label, symbol in zip(labels, symbols, strict=True)]
    if not any(block.get(name) for name in (*_OPERATIONS, *_GROUPS)) and any(
        block.get(name, "P 1") != "P 1" for name in _HALL
    ):
        raise ValueError(f"{where}: only a Hall symbol says its symmetry; add _symmetry_equiv_pos_as_xyz")
    problem = _disorder(block, [str(label) for label in labels], elements, kind)
    if problem and current_checks().occupancy == "refuse":
        raise ValueError(f"{where}: disordered: {problem}; --occupancy ignore takes the main species of each site")
    if problem:
        sys.stderr.write(f"{where}: disordered: {problem}; occupancies are ignored\n")


def _element(where: str, label: Any, symbol: Any) -> str:
    """Return the element of a site as ase.io understands its symbol; D and T are H."""
    known = import_optional("ase.data").atomic_numbers
    letters = "".join(letter for letter in str(symbol) if letter.isalpha())
    at = next((k for k, letter in enumerate(letters) if letter.isupper()), None)
    found = "" if at is None else letters[at : at + 2] if letters[at + 1 : at + 2].islower() else letters[at]
    found = "H" if found == "D" else found
    if not known.get(found):
        raise ValueError(f"{where}, site {label}: {symbol!r} is no element")
    return found


def _disorder(block: Any, labels: list[str], elements: list[str], kind: tuple[str, ...]) -> str:
    """Say which sites are occupied in part, or by two species; "" if none is."""
    occupancies = _column(block, "_atom_site_occupancy") or [1.0] * len(labels)
    for label, value in zip(labels, occupancies, strict=True):
        if value in UNKNOWN:
            continue
        if not isinstance(value, int | float) or not 0 <= value <= 1.01:
            raise ValueError(f"block {block.name}, site {label}: occupancy: expected 0 to 1, got {value!r}")
        if value < WHOLE:
            return f"site {label} is occupied to {value:g}"
    places = np.array([_column(block, name) for name in kind], np.float64).T
    _check_crowd(places)
    pairs = import_optional("scipy.spatial").cKDTree(places).query_pairs(SAME_PLACE, p=np.inf, output_type="ndarray")
    for i, j in pairs.tolist():
        if elements[i] != elements[j]:
            return f"sites {labels[i]} and {labels[j]} are one place"
    return ""


def _check_crowd(places: np.ndarray) -> None:
    """Refuse sites of which very many are one place: comparing all of them with each other would take very long."""
    _, counts = np.unique(np.floor(places / SAME_PLACE), axis=0, return_counts=True)
    if counts.max(initial=0) > CROWD:
        raise ValueError(f"{counts.max()} sites are one place")
