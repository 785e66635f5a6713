"""OC20 and OC22 as fairchem's LMDB files of pickled PyG data: one file, or a folder of `data.NNNN.lmdb`.

Energies are in eV and forces in eV/A already. The energy `y` of OC20 has slab and gas references subtracted; that of
OC22 is the total energy, which some files call `y_relaxed`. Structures that have neither, as in the test splits, have
no energy. JMP's preprocessed ANI-1x and Transition-1x (total energies) are such files without a cell: their structures
are molecules, which have no tags. A folder that `lmdb.open` made (data.mdb) is read as one file.

Ids are `<file>/<key>`, followed by `/<sid>` and `/<fid>` if the record has them.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ejmp.data.readers.files import SourceError, file_in, list_files, reading
from ejmp.data.readers.format import Format, Part, parse_slice, slices
from ejmp.data.readers.lmdb_pages import LmdbFile
from ejmp.data.readers.options import Rows, report, rows_of
from ejmp.data.readers.pickle_names import UnsafePickleError
from ejmp.data.readers.unpickle import fields, loads
from ejmp.data.readers.validation import validate
from ejmp.graph.structure import Structure

ENVIRONMENT = "data.mdb"
"""File that holds everything in a folder that `lmdb.open` made."""
ATOMS = b"ase.atoms"
"""Module whose name a pickled ase.Atoms begins with."""
OWN = ("pos", "atomic_numbers", "cell", "pbc", "natoms", "sid", "fid")
"""Fields that are the structure itself, or its id."""
FIELDS = ("pos", "atomic_numbers", "cell", "pbc", "natoms", "tags", "fixed", "y", "y_relaxed", "force", "sid", "fid")

_KNOWN_ROWS: dict[tuple[tuple[str, ...], tuple[str, ...], bool], Rows] = {}


def _parts(path: Path) -> list[Part]:
    parts = []
    for file in _files(path):
        with reading(file), LmdbFile(file) as records:
            stored = records.get(b"length")
            length = records.entries if stored is None else _integer(loads(stored), "length")
            if not 0 <= length <= records.entries:
                raise SourceError(file, "length", f"{length} records announced, {records.entries} entries")
            parts += slices(file.relative_to(path).as_posix() if path.is_dir() else file.name, length)
    return parts


def _files(path: Path) -> list[Path]:
    """Return the LMDB files of a source: itself, those in it, or what `lmdb.open` puts into a folder."""
    if path.is_dir() and (path / ENVIRONMENT).is_file():
        return [path / ENVIRONMENT]
    if path.is_dir() and any(folder.is_dir() for folder in path.glob("*.lmdb")):
        found = [item / ENVIRONMENT if item.is_dir() else item for item in sorted(path.glob("*.lmdb"))]
        return [file for file in found if file.is_file()]
    return list_files(path, ("*.lmdb",))


def _read(path: Path, part: Part, energies: tuple[str, ...]) -> Iterator[Structure]:
    name, start, stop = parse_slice(part)
    file = file_in(path, name)
    with reading(file), LmdbFile(file) as records:
        for key in range(start, stop):
            with reading(file, f"record {key}"):
                raw = records.get(str(key).encode())
                if raw is None:
                    raise SourceError(file, f"record {key}", "not there")
                values = _record(raw)
                structure = _structure(_flat(values), f"{name}/{key}", energies)
                report(_rows(values, energies, len(structure.numbers), tags=structure.tags is not None))
            yield validate(structure, file, f"record {key}")


def _rows(values: Mapping[str, Any], energies: tuple[str, ...], n: int, *, tags: bool) -> Rows:
    """Return what the fields of a record became; its names tell."""
    key = tuple(values), energies, tags
    if key not in _KNOWN_ROWS:
        used = next((name for name in energies if name in values), "")
        labels = {used: "energy", "force": "forces", "fixed": "fixed"} | ({"tags": "tags"} if tags else {})
        shapes = {name: np.shape(value) for name, value in values.items() if name not in OWN and not _is_text(value)}
        _KNOWN_ROWS[key] = rows_of(shapes, labels, n)
    return _KNOWN_ROWS[key]


def _is_text(value: Any) -> bool:
    return not isinstance(value, np.ndarray | np.generic | float | int)


def _record(raw: bytes) -> Mapping[str, Any]:
    """Return the fields of a record, after checking that it is no other object than PyG data.

    Raises:
        ValueError: naming what it is instead.
    """
    try:
        return fields(loads(raw))
    except UnsafePickleError as error:
        if ATOMS in raw[:200]:
            raise ValueError(
                "a pickled ase.Atoms, which is not read because unpickling one runs code; write them to an .extxyz "
                "file or an ASE database, and convert that as format ase"
            ) from error
        raise


def _structure(values: Mapping[str, Any], place: str, energies: tuple[str, ...]) -> Structure:
    missing = {"pos", "atomic_numbers", "cell"} - values.keys()
    tags, is_molecule = values.get("tags"), missing == {"cell"}
    if (
        is_molecule
        and len(np.unique(np.asarray(0 if tags is None else tags))) == 1
        and not np.any(values.get("pbc", 0))
    ):
        missing, tags = set(), None  # the tags there are of ase.Atoms that had none
    if missing:
        raise ValueError(f"no {', '.join(sorted(missing))}; it has {', '.join(values)}")
    natoms, numbers = values.get("natoms"), values["atomic_numbers"]
    if natoms is not None and _integer(natoms, "natoms") != np.size(numbers):
        raise ValueError(f"natoms is {_integer(natoms, 'natoms')}, but there are {np.size(numbers)} atomic numbers")
    labels = [values[name] for name in energies if name in values]
    return Structure(
        numbers=numbers,
        positions=values["pos"],
        cell=None if is_molecule else np.reshape(values["cell"], (3, 3)),
        pbc=not is_molecule,
        tags=tags,
        fixed=values.get("fixed"),
        energy=np.reshape(labels[0], ()) if labels else None,  # pyright: ignore[reportArgumentType]
        forces=values.get("force"),
        id="/".join([place, *(str(np.reshape(values[name], ())) for name in ("sid", "fid") if name in values)]),
    )


def _flat(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields that are read if none is nested: a few bytes of nested lists can stand for many values."""
    kept = {name: values[name] for name in FIELDS if values.get(name) is not None}
    wrong = [name for name, value in kept.items() if not isinstance(value, np.ndarray | np.generic | float | int | str)]
    if wrong:
        raise ValueError(f"{wrong[0]}: expected an array or a number, got {type(kept[wrong[0]]).__name__}")
    return kept


def _integer(value: Any, name: str) -> int:
    if not isinstance(value, int | np.ndarray | np.generic) or np.size(value) != 1:
        raise ValueError(f"{name}: expected an integer, got {type(value).__name__}")
    return int(np.reshape(value, ()))


OC20 = Format(parts=_parts, read=partial(_read, energies=("y",)))
OC22 = Format(parts=_parts, read=partial(_read, energies=("y", "y_relaxed")))
