"""QM9: the raw files (a folder of `dsgdb9nsd_*.xyz`, or a tar of them), or a file of PyG's processed list.

The energy is the total energy U0 in eV; there are no forces. The targets have the names and units of PyG's 19: mu (D),
alpha (a0^3), homo, lumo, gap (eV), r2 (a0^2), zpve, U0, U, H, G (eV), Cv (cal/mol/K), U0_atom, U_atom, H_atom, G_atom
(eV, less the energies of the free atoms), A, B, C (GHz). The values of the raw files are converted to these.

The molecules listed in `uncharacterized.txt`, if that is beside the source or in it, are left out (3,054 of 133,885).
Ids are `gdb_<number>`, or `<place in the file>` if PyG's file has no names.
"""

import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ejmp.data.readers.files import SourceError, cached_by_file, import_optional, list_files, reading
from ejmp.data.readers.format import Format, Part, parse_slice, slices
from ejmp.data.readers.kinds import is_packed, kind_of, open_tar, read_plain
from ejmp.data.readers.options import NOT_READ, Rows, report
from ejmp.data.readers.units import HARTREE
from ejmp.data.readers.unpickle import fields, load_pt
from ejmp.data.readers.validation import validate
from ejmp.graph.structure import Structure

TARGETS: tuple[str, ...] = (
    "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "U0", "U", "H", "G", "Cv",
    "U0_atom", "U_atom", "H_atom", "G_atom", "A", "B", "C",
)  # fmt: skip
RAW_TARGETS = ("A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "U0", "U", "H", "G", "Cv")
IN_HARTREE: tuple[str, ...] = ("homo", "lumo", "gap", "zpve", "U0", "U", "H", "G")
FREE_ATOMS = {
    "H": {"U0": -0.500273, "U": -0.498857, "H": -0.497912, "G": -0.510927},
    "C": {"U0": -37.846772, "U": -37.845355, "H": -37.844411, "G": -37.861317},
    "N": {"U0": -54.583861, "U": -54.582445, "H": -54.581501, "G": -54.598897},
    "O": {"U0": -75.064579, "U": -75.063163, "H": -75.062219, "G": -75.079532},
    "F": {"U0": -99.718730, "U": -99.717314, "H": -99.716370, "G": -99.733544},
}
"""Energies of the free atoms by element, hartree, from the atomref.txt published with QM9."""
RAW_ROWS: Rows = (
    ("line 2", "structure", "energy and 19 targets"),
    ("Mulliken charges", "atom", NOT_READ),
    ("harmonic frequencies", "structure", NOT_READ),
    ("SMILES and InChI", "structure", NOT_READ),
)
MAX_MOLECULES = 1_000_000
RAW_NAME = re.compile(r"dsgdb9nsd_(\d+)\.xyz$")
MAX_RAW = 1 << 20
"""Most bytes read of a molecule's raw file, which has about a thousandth of it."""


def _uncharacterized(path: Path) -> set[int]:
    """Return the numbers of the molecules to leave out, from the lines that start with a number."""
    folder = path if path.is_dir() else path.parent
    file = folder / "uncharacterized.txt"
    if not file.exists():
        return set()
    with reading(file):
        rows = [line.split() for line in read_plain(file).decode().splitlines()]
        found = {int(row[0]) for row in rows if row and row[0].isdecimal() and len(row[0]) < 10}
    if not found:
        raise SourceError(file, "", "expected lines that start with a molecule's number, got none")
    return found


def _wanted(name: str, left_out: set[int]) -> bool:
    number = RAW_NAME.search(name)
    return number is not None and int(number[1]) not in left_out


def _raw_files(path: Path) -> list[Path]:
    left_out = _uncharacterized(path)
    return [file for file in list_files(path, ("dsgdb9nsd_*.xyz",)) if path.is_file() or _wanted(file.name, left_out)]


def _tar_members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    left_out = _uncharacterized(path)
    with open_tar(path) as archive:
        for member in archive:
            if member.isfile() and _wanted(member.name, left_out):
                yield archive, member


def _form(path: Path) -> str:
    """Return what a source is by its contents, or by its name where they do not say: "pt", "raw" or "tar"."""
    if path.is_dir() or path.suffix == ".xyz":
        return "raw"
    kind = kind_of(path)
    if kind == "zip" or path.suffix in (".pt", ".pth"):
        return "pt"
    return "raw" if kind == "xyz" and not is_packed(path) else "tar"


def _parts(path: Path) -> list[Part]:
    if _form(path) == "pt":
        return slices(path.name, len(_molecules(path)))
    if _form(path) == "tar":
        with reading(path):
            count = sum(1 for _ in _tar_members(path))
            if not count:
                raise SourceError(path, "", "no dsgdb9nsd_*.xyz in it")
            return [Part(name=path.name, count=count)]  # a tar is read from its start
    return slices(path.name, len(_raw_files(path)))


def _read(path: Path, part: Part) -> Iterator[Structure]:
    form = _form(path)
    if form == "pt":
        _, start, stop = parse_slice(part)
        for k, values in _molecules(path)[start:stop]:
            with reading(path, f"molecule {k}"):
                structure = _from_pyg(values, k)
            report(_pyg_rows(values))
            yield validate(structure, path, f"molecule {k}")
    elif form == "tar":
        with reading(path):
            for archive, member in _tar_members(path):
                with reading(path, member.name):
                    contents = archive.extractfile(member)
                    structure = _from_raw(contents.read(MAX_RAW) if contents else b"", member.name)
                report(RAW_ROWS)
                yield validate(structure, path, member.name)
    else:
        _, start, stop = parse_slice(part)
        for file in _raw_files(path)[start:stop]:
            with reading(file), file.open("rb") as contents:
                structure = _from_raw(contents.read(MAX_RAW), file.name)
            report(RAW_ROWS)
            yield validate(structure, file, "")


def _float(text: str) -> float:
    """Parse a number as QM9 spells it: 1.5*^-6 is 1.5e-6."""
    return float(text.replace("*^", "e"))


def _from_raw(contents: bytes, name: str) -> Structure:
    symbols = import_optional("ase.data").atomic_numbers
    lines = contents.decode().splitlines()
    n = int(lines[0])
    values = lines[1].split()
    rows = [line.split() for line in lines[2 : n + 2]]
    if len(values) != 17 or values[0] != "gdb":
        raise ValueError("expected gdb, its number and 15 values in line 2")
    if not 1 <= n <= len(lines) - 5 or any(len(row) != 5 or row[0] not in FREE_ATOMS for row in rows):
        raise ValueError(f"expected {n} lines of symbol, x, y, z, charge from line 3, and three more lines")
    if len(lines[n + 2].split()) not in (3 * n - 6, 3 * n - 5):
        raise ValueError(f"expected the frequencies of {n} atoms in line {n + 3}")
    given = {name: _float(text) for name, text in zip(RAW_TARGETS, values[2:], strict=True)}
    for kind in ("U0", "U", "H", "G"):
        given[f"{kind}_atom"] = given[kind] - sum(FREE_ATOMS[row[0]][kind] for row in rows)
    units = dict.fromkeys((*IN_HARTREE, "U0_atom", "U_atom", "H_atom", "G_atom"), HARTREE)
    targets = {target: given[target] * units.get(target, 1.0) for target in TARGETS}
    number = RAW_NAME.search(name)
    return Structure(
        numbers=[symbols[row[0]] for row in rows],
        positions=np.array([[_float(text) for text in row[1:4]] for row in rows]),
        energy=targets["U0"],
        targets=targets,
        id=f"gdb_{int(number[1]) if number else int(values[1])}",
    )


@cached_by_file
def _molecules(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """Return PyG's molecules with their places: from a list of Data or dicts, or from Data joined end to end."""
    with reading(path):
        loaded = load_pt(path)
        joined = isinstance(loaded, tuple) and len(loaded) in (2, 3) and isinstance(loaded[1], dict)
        listed = _split(fields(loaded[0]), loaded[1]) if joined else loaded
        if not isinstance(listed, list):
            raise SourceError(path, "", f"expected a list of PyG data, got {type(listed).__name__}")
        left_out = _uncharacterized(path)
        molecules = [(k, fields(item)) for k, item in enumerate(listed)]
        return [(k, values) for k, values in molecules if _number(values) not in left_out]


def _split(whole: Mapping[str, Any], bounds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the molecules of PyG's joined form: `bounds[name]` says where the rows of each in `whole[name]` start."""
    rows = {name: bounds[name] for name in ("z", "pos", "y", "name", "idx") if name in bounds}
    counts = {len(bound) for bound in rows.values()}
    if not {"z", "pos", "y"} <= rows.keys() or len(counts) != 1 or max(counts) > MAX_MOLECULES:
        raise ValueError(f"expected bounds of z, pos and y, all of one length, got {sorted(bounds)[:20]}")
    items: list[dict[str, Any]] = [{} for _ in range(counts.pop() - 1)]
    for name, bound in rows.items():
        for k, item in enumerate(items):
            item[name] = whole[name][int(bound[k]) : int(bound[k + 1])]
    return items


def _pyg_rows(values: Mapping[str, Any]) -> Rows:
    others = [name for name in values if name not in ("z", "pos", "y", "name", "idx")]
    return (("y", "structure", "energy and 19 targets"), *((name, "structure", NOT_READ) for name in others))


def _number(values: Mapping[str, Any]) -> int | None:
    """Return a molecule's number in GDB-9: in PyG's data, `name` is gdb_1 where `idx` is 0."""
    name = values.get("name")
    name = name[0] if isinstance(name, list) and len(name) == 1 else name
    if isinstance(name, str) and (found := re.fullmatch(r"gdb_(\d{1,9})", name)):
        return int(found[1])
    place = values.get("idx")
    return int(place) + 1 if isinstance(place, int | torch.Tensor) else None


def _from_pyg(values: Mapping[str, Any], place: int) -> Structure:
    missing = [name for name in ("z", "pos", "y") if not isinstance(values.get(name), torch.Tensor)]
    if missing:
        raise ValueError(f"no tensors {', '.join(missing)}; it has {', '.join(sorted(values))[:200]}")
    if values["y"].numel() != len(TARGETS):
        raise ValueError(f"y: expected {len(TARGETS)} values, got {list(values['y'].shape)}")
    targets = dict(zip(TARGETS, values["y"].double().flatten().tolist(), strict=True))
    number = _number(values)
    return Structure(
        numbers=np.asarray(values["z"]),
        positions=np.asarray(values["pos"]),
        energy=targets["U0"],
        targets=targets,
        id=str(place) if number is None else f"gdb_{number}",
    )


QM9 = Format(parts=_parts, read=_read)
