"""QMOF: metal-organic frameworks with PBE band gaps, as the two JSON files of the database, or as CIF files and a CSV.

- JSON: a folder with `qmof.json` (labels) and `qmof_structure_data.json` (structures as pymatgen writes them).
  Structures without a gap are left out. Ids are QMOF's.
- CIF: a folder with CIF files and one CSV file, which has one of FILE_COLUMNS (a file's name with or without ending)
  and some of GAP_COLUMNS. Rows whose file is not in the folder are left out. Ids are the files' names.

The targets are `bandgap` (PBE, eV) and, if a CSV has it, `bandgap_hse06` (eV). There is no energy.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ejmp.data.readers.ase_files import read_text
from ejmp.data.readers.files import SourceError, cached_by_file, import_optional, list_files, reading
from ejmp.data.readers.format import Format, Part, parse_slice, slices
from ejmp.data.readers.kinds import read_plain
from ejmp.data.readers.options import Rows, report, rows_of
from ejmp.data.readers.validation import current_checks, validate
from ejmp.graph.structure import Structure

LABELS, STRUCTURES = "qmof.json", "qmof_structure_data.json"
FILE_COLUMNS = ("file", "filename", "qmof_id", "name")
GAP_COLUMNS = {
    "BG_PBE_eV": "bandgap", "BG_PBE": "bandgap", "outputs.pbe.bandgap": "bandgap",
    "BG_HSE06_eV": "bandgap_hse06", "outputs.hse06.bandgap": "bandgap_hse06",
}  # fmt: skip
STRUCTURE_ENDINGS = ("", ".cif", ".CONTCAR")


@cached_by_file
def _records(file: Path) -> dict[str, Mapping[str, Any]]:
    """Return the records of one of the JSON files by their ids."""
    with reading(file):
        records = json.loads(read_plain(file))
        return {str(record["qmof_id"]): record for record in records}


def _gap(record: Mapping[str, Any]) -> float | None:
    value = record.get("outputs.pbe.bandgap")
    if value is None:
        value = record.get("outputs", {}).get("pbe", {}).get("bandgap")
    return None if value is None else float(value)


def _pairs(folder: Path) -> list[tuple[str, Mapping[str, Any], float]]:
    with reading(folder / LABELS):
        labels = {name: _gap(record) for name, record in _records(folder / LABELS).items()}
    structures = _records(folder / STRUCTURES)
    missing = [name for name in labels if name not in structures]
    if missing:
        raise SourceError(folder / STRUCTURES, missing[0], f"not there, as {len(missing)} of {len(labels)} are not")
    return [(name, structures[name], gap) for name, gap in labels.items() if gap is not None]


def _rows(folder: Path) -> list[tuple[Path, dict[str, float]]]:
    """Return the files that a folder's CSV lists, and their gaps."""
    tables = list_files(folder, ("*.csv",))
    if len(tables) != 1:
        raise SourceError(folder, "", f"expected one CSV file, got {', '.join(table.name for table in tables)[:200]}")
    with reading(tables[0]), tables[0].open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
        columns = [name for name in FILE_COLUMNS if rows and name in rows[0]]
        gaps = {name: target for name, target in GAP_COLUMNS.items() if rows and name in rows[0]}
        if not columns or "bandgap" not in gaps.values():
            raise SourceError(tables[0], "", f"expected columns of {FILE_COLUMNS} and {tuple(GAP_COLUMNS)[:3]}")
        found = []
        for row in rows:
            files = [folder / (Path(row[columns[0]]).name + ending) for ending in STRUCTURE_ENDINGS]
            file = next((file for file in files if file.is_file()), None)
            if file is not None:
                found.append((file, {target: float(row[name]) for name, target in gaps.items() if row[name]}))
        if not found:
            raise SourceError(tables[0], "", f"none of the {len(rows)} files it lists is in the folder")
        return found


def _parts(path: Path) -> list[Part]:
    if not path.is_dir():
        raise SourceError(path, "", f"expected a folder with {LABELS} and {STRUCTURES}, or with CIF files and a CSV")
    is_json = (path / LABELS).exists()
    return slices("json" if is_json else "csv", len(_pairs(path) if is_json else _rows(path)))


def _read(path: Path, part: Part) -> Iterator[Structure]:
    kind, start, stop = parse_slice(part)
    if kind == "json":
        labels = _records(path / LABELS)
        for name, record, gap in _pairs(path)[start:stop]:
            with reading(path / STRUCTURES, name):
                structure = _from_pymatgen(record, name, gap)
                report(_json_rows(labels[name]))
            yield validate(structure, path / STRUCTURES, name)
        return
    for file, targets in _rows(path)[start:stop]:
        frames = read_text(file)
        if len(frames) != 1:
            raise SourceError(file, "", f"expected one structure, got {len(frames)}")
        atoms = frames[0]
        structure = Structure(
            numbers=atoms.numbers,
            positions=atoms.positions,
            cell=atoms.cell.array,
            pbc=True,
            targets=targets,
            id=file.name,
        )
        report(tuple((name, "structure", f"target {name}") for name in targets))
        yield validate(structure, file, "")


def _json_rows(record: Mapping[str, Any]) -> Rows:
    """Return what the labels of a record became: the gap alone is read."""
    nested = record.get("outputs", {})
    names = [name for name in record if name.startswith("outputs.")]
    names += [f"outputs.{level}.{name}" for level, values in nested.items() for name in dict(values)]
    return rows_of(dict.fromkeys(names, ()), {"outputs.pbe.bandgap": "target bandgap"}, 0)


def _from_pymatgen(record: Mapping[str, Any], name: str, gap: float) -> Structure:
    symbols = import_optional("ase.data").atomic_numbers
    structure = record.get("structure", record)
    shared = [site for site in structure["sites"] if [s.get("occu", 1) for s in site.get("species", [{}])] != [1]]
    if shared and current_checks().occupancy == "refuse":
        raise ValueError(f"disordered: site {shared[0]['label']} is occupied in part or by two species")
    elements = [re.match("[A-Z][a-z]?", site["label"]) for site in structure["sites"]]
    numbers = [symbols.get(element[0]) if element else None for element in elements]
    if None in numbers:
        raise ValueError(
            f"site {numbers.index(None)}: its label {structure['sites'][numbers.index(None)]['label']!r} is no element"
        )
    return Structure(
        numbers=numbers,
        positions=np.array([site["xyz"] for site in structure["sites"]], dtype=np.float64),
        cell=np.array(structure["lattice"]["matrix"], dtype=np.float64),
        pbc=True,
        targets={"bandgap": gap},
        id=name,
    )


QMOF = Format(parts=_parts, read=_read)
