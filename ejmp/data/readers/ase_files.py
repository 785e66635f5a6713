"""Files that ase.io reads, which are taken to be in eV and A: one file, or a folder of them.

These formats are read: extxyz and xyz, ASE's traj and databases (db, json), CIF, and VASP's POSCAR and CONTCAR; text
files also compressed as .xz and .gz. Other formats of ASE are refused, because some of them are pickles.

- The energy is the calculator's "energy", or else the first of ENERGY_KEYS in `info` (for databases: in the keys and
  data of the row). The forces are the calculator's "forces", without constraints applied, or else the first of
  FORCES_KEYS among the arrays.
- Every other single number in `info` becomes a target of that name, in the unit it has there.
- FixAtoms becomes `fixed`; other constraints are left out.
- Tags are kept if all are 0, 1 or 2. ASE itself gives tags no meaning (its slab builders number layers with them), so
  if one is anything else, all are left out.

Ids are `<file>:<frame>`.
"""

import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ejmp.data.readers.cif import read_cif
from ejmp.data.readers.files import SourceError, file_in, import_optional, list_files, reading
from ejmp.data.readers.format import Format, Part, parse_slice, slices
from ejmp.data.readers.validation import leaving_out, validate
from ejmp.data.readers.xyz import iter_frames, read_frames, split_part, xyz_parts
from ejmp.graph.structure import TAGS, Structure

ENERGY_KEYS = ("energy", "Energy", "REF_energy")
FORCES_KEYS = ("forces", "REF_forces")
XYZ = (".xyz", ".extxyz")
DATABASES = (".db", ".json")
TEXT = {".cif": "cif", ".vasp": "vasp", ".poscar": "vasp", ".contcar": "vasp", "": "vasp"}
ENDINGS = (*XYZ, ".cif", ".vasp", ".POSCAR", ".CONTCAR")
PATTERNS = (
    *(f"*{ending}{packed}" for ending in ENDINGS for packed in ("", ".xz", ".gz")),
    *("*.traj", "*.db", "*.json", "POSCAR*", "CONTCAR*"),
)


def from_atoms(atoms: Any, place: str, more: Mapping[str, Any] = {}) -> Structure:
    """Return ASE atoms with their labels as a structure.

    Args:
        atoms: an ase.Atoms.
        place: the structure's id.
        more: labels in addition to those of the atoms themselves.
    """
    info = {**more, **atoms.info}
    results = atoms.calc.results if atoms.calc is not None else {}
    energies = [results.get("energy"), *(info.get(key) for key in ENERGY_KEYS)]
    forces = [results.get("forces"), *(atoms.arrays.get(key) for key in FORCES_KEYS)]
    tags = atoms.get_tags() if atoms.has("tags") and np.isin(atoms.get_tags(), TAGS).all() else None
    held = [constraint.index for constraint in atoms.constraints if type(constraint).__name__ == "FixAtoms"]
    fixed = np.isin(np.arange(len(atoms)), np.concatenate(held)) if held else None
    return Structure(
        numbers=atoms.numbers,
        positions=atoms.positions,
        cell=atoms.cell.array if atoms.pbc.any() else None,
        pbc=atoms.pbc,
        tags=tags,
        fixed=fixed,
        energy=next((float(np.reshape(value, ())) for value in energies if value is not None), None),
        forces=next((value for value in forces if value is not None), None),
        targets={name: value for name, value in _scalars(info) if name not in ENERGY_KEYS},
        id=place,
    )


def _scalars(info: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in info.items():
        if isinstance(value, int | float | np.ndarray | np.generic) and not isinstance(value, bool):
            array = np.asarray(value)
            if array.size == 1 and array.dtype.kind in "iuf":
                yield str(name), float(array.reshape(()))


def parse_frame(lines: list[str]) -> Any:
    """Return one frame of an extxyz file as ASE atoms."""
    for layout in re.findall(r"""properties\s*=\s*["']?([^\s"']+)""", lines[1], re.IGNORECASE):
        # ASE would allocate memory for any number of columns.
        if sum(map(int, layout.split(":")[2::3])) > len(lines[2].split()):
            raise ValueError(f"more columns in {layout[:100]} than in the line of the first atom")
    try:
        return next(import_optional("ase.io.extxyz").read_xyz(io.StringIO("".join(lines)), 0))
    except KeyError as error:
        raise ValueError(f"{error.args[0]!r} is no element (write D and T as H)") from error


def read_text(file: Path) -> list[Any]:
    """Return the structures of a CIF, a POSCAR or a compressed text file as ASE atoms."""
    with reading(file), import_optional("ase.io.formats").open_with_compression(str(file), "r") as lines:
        inner = Path(file.stem) if file.suffix in (".xz", ".gz") else file
        if inner.suffix in XYZ:
            return [parse_frame(frame) for frame in iter_frames(io.BytesIO(lines.read().encode()), file)]
        kind = TEXT.get(inner.suffix.lower())
        if kind is None or (not inner.suffix and not inner.name.startswith(("POSCAR", "CONTCAR"))):
            known = ", ".join((*XYZ, ".traj", *DATABASES, ".cif", "POSCAR"))
            raise SourceError(file, "", f"expected one of {known}, got {inner.suffix or inner.name}")
        text = lines.read()
        if kind == "cif":
            return list(read_cif(text))
        if kind == "vasp":
            _check_poscar(text.splitlines())
        return list(import_optional("ase.io").iread(io.StringIO(text), index=":", format=kind))


def _check_poscar(lines: list[str]) -> None:
    """Raise ValueError if a POSCAR names no elements, or announces more atoms than it has lines.

    ASE would take elements from the comment or from other files in the folder, and allocate memory for all atoms.
    """
    counts = lines[5].split() if len(lines) > 5 else []
    known = import_optional("ase.data").atomic_numbers
    named = [word for word in lines[0].split() if word in known] if lines else []
    if counts and all(word.isdecimal() for word in counts) and not len(counts) == len(named) == len(lines[0].split()):
        raise ValueError(
            f"a POSCAR without symbols (VASP 4): line 6 is {lines[5].strip()[:50]!r}; put the elements of its "
            f"{len(counts)} species before it"
        )
    for line in lines[5:7]:  # counts, after the elements or without them
        if sum(int(word) for word in line.split() if word.isdecimal()) > len(lines):
            raise ValueError(f"{line.strip()[:100]!r} atoms in {len(lines)} lines")


def _trajectory(file: Path) -> Any:
    with file.open("rb") as raw:
        if raw.read(8) != b"- of Ulm":  # the format before this one was a pickle
            raise SourceError(file, "", "not a traj file, or one of before 2016, which ase.io converts")
    return import_optional("ase.io.trajectory").TrajectoryReader(file)


def _parts(path: Path) -> list[Part]:
    parts = []
    for file in list_files(path, PATTERNS):
        with leaving_out(), reading(file):
            if file.suffix in XYZ:
                parts += xyz_parts(file)
            elif file.suffix == ".traj":
                with _trajectory(file) as frames:
                    parts += slices(file.name, len(frames))
            elif file.suffix in DATABASES:
                parts += slices(file.name, import_optional("ase.db").connect(file, use_lock_file=False).count())
            else:
                count = len(read_text(file))
                parts.append(Part(name=f"{file.name}:0-{count}", count=count))
    if not sum(part.count for part in parts):
        raise SourceError(path, "", "no structures")
    return parts


def _read(path: Path, part: Part) -> Iterator[Structure]:
    prefix, start, stop = parse_slice(part)
    if "@" in prefix and prefix.rpartition("@")[0].endswith(XYZ):
        file = file_in(path, split_part(part)[0])
        frames = ((parse_frame(lines), {}) for _, lines in read_frames(file, part))
    else:
        file = file_in(path, prefix)
        frames = _frames(file, start, stop)
    k = start
    while True:
        with reading(file, f"frame {k}"):
            found = next(frames, None)
            if found is None:
                break
            structure = from_atoms(found[0], f"{file.name}:{k}", found[1])
        yield validate(structure, file, f"frame {k}")
        k += 1
    if k != stop:
        raise SourceError(file, f"frame {k}", "not there")


def _frames(file: Path, start: int, stop: int) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Yield ASE atoms, each with the labels that are stored beside it."""
    if file.suffix == ".traj":
        with _trajectory(file) as frames:
            for k in range(start, stop):
                yield frames[k], {}
    elif file.suffix in DATABASES:
        for row in (
            import_optional("ase.db").connect(file, use_lock_file=False).select(offset=start, limit=stop - start)
        ):
            yield row.toatoms(), {**row.data, **row.key_value_pairs}
    else:
        for atoms in read_text(file):
            yield atoms, {}


ASE = Format(parts=_parts, read=_read)
