"""The units of the datasets in eV and A, of CODATA 2022: `ase.units.create_units("2022")` agrees to 1e-12."""

from collections.abc import Iterable

HARTREE = 27.211386245988
"""One hartree, eV."""
BOHR = 0.529177210544
"""One bohr, A."""
KCAL_PER_MOL = 0.0433641042418
"""One kcal/mol, eV; 1 cal is 4.184 J."""
ENERGY_UNITS = {
    "eV": 1.0,
    "meV": 1e-3,
    "kcal/mol": KCAL_PER_MOL,
    "kJ/mol": KCAL_PER_MOL / 4.184,
    "hartree": HARTREE,
    "rydberg": HARTREE / 2,
}
"""Units of energy by name, eV."""
LENGTH_UNITS = {"A": 1.0, "bohr": BOHR, "nm": 10.0, "pm": 0.01}
"""Units of length by name, A."""
TOO_MUCH = 1.3
"""Energies below minus this multiple of `binding_energy` are in another unit than eV."""
_SPELLINGS = {
    "energy": {
        "ev": "eV", "electronvolt": "eV", "kcal/mol": "kcal/mol", "kcalmol-1": "kcal/mol", "kcal": "kcal/mol",
        "kcal_per_mol": "kcal/mol", "kj/mol": "kJ/mol", "kjmol-1": "kJ/mol", "kj_per_mol": "kJ/mol",
        "hartree": "hartree", "hartrees": "hartree", "ha": "hartree", "eh": "hartree", "e_h": "hartree",
        "au": "hartree", "a.u.": "hartree", "ry": "rydberg", "rydberg": "rydberg",
    },
    "length": {
        "a": "A", "ang": "A", "angstrom": "A", "angstroms": "A", "å": "A", "bohr": "bohr", "a0": "bohr",
        "a_0": "bohr", "au": "bohr", "a.u.": "bohr", "nm": "nm", "nanometer": "nm", "pm": "pm",
    },
}  # fmt: skip
_EXACT = {"meV": "meV"}
"""Spellings whose capitals matter: MeV is not meV."""
_TABLES = {"energy": ENERGY_UNITS, "length": LENGTH_UNITS}


def unit_name(kind: str, text: str, where: str) -> str:
    """Return ejmp's name of a unit.

    Args:
        kind: "energy" or "length".
        text: the unit in one of its usual spellings.
        where: what states it, for the message.

    Raises:
        ValueError: if it is no unit of that kind that ejmp knows.
    """
    short = "".join(text.split())
    name = _EXACT.get(short) or ("" if short == "MeV" else _SPELLINGS[kind].get(short.lower()))
    if not name:
        raise ValueError(f"{where}: expected a unit of {kind}, one of {', '.join(_TABLES[kind])}, got {text[:50]!r}")
    return name


def factor_of(kind: str, stated: str | None, asked: str | None, default: str) -> float:
    """Return the size of the unit that a file states or a user asks for, in eV or A.

    Args:
        kind: "energy" or "length".
        stated: unit that the file states itself; None if it does not.
        asked: unit that the user names, a name of ENERGY_UNITS or LENGTH_UNITS; None if none.
        default: the format's own unit, which holds where nobody names one.

    Raises:
        ValueError: if the two contradict each other, or either is not known.
    """
    if stated is not None and stated.strip().lower() not in ("", "none", "unknown", "n/a"):
        found = unit_name(kind, stated, f"the file's unit of {kind}")
        if asked is not None and unit_name(kind, asked, f"--unit-{kind}") != found:
            raise ValueError(f"--unit-{kind}: {asked} was asked for, but the file says {stated!r}: leave the flag out")
        return _TABLES[kind][found]
    return _TABLES[kind][default if asked is None else unit_name(kind, asked, f"--unit-{kind}")]


def binding_energy(numbers: Iterable[int]) -> float:
    """Return about the energy that binds all electrons to the nuclei of some atoms, eV, which is positive.

    The Thomas-Fermi model with its corrections, 0.768745 Z^(7/3) - Z^2/2 + 0.26990 Z^(5/3) hartree (B.-G. Englert,
    Semiclassical Theory of Atoms, 1988), is within 15% of the elements' energies; bonds are a thousandth of it.

    Args:
        numbers: atomic numbers.
    """
    return HARTREE * sum(0.768745 * z ** (7 / 3) - 0.5 * z**2 + 0.26990 * z ** (5 / 3) for z in numbers)
