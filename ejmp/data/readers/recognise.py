"""Which format a source is of, by its contents; where they fit several formats, the user is asked.

Two things no content tells, so they are always asked for: whether an LMDB file of OC records has OC20's or OC22's
energies, and whether molecules in an extxyz file of sGDML's columns are in eV or in kcal/mol where both are possible.
"""

import csv
import io
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ejmp.data.readers.ase_files import KINDS
from ejmp.data.readers.files import SourceError, import_optional, reading
from ejmp.data.readers.hdf5 import ANI1X_LAYOUT, SPICE_LAYOUT, TRANSITION1X_LAYOUT
from ejmp.data.readers.kinds import NUMBER, check_zip, head_of, is_packed, kind_of, open_tar, plain_name
from ejmp.data.readers.labels import ENERGY_UNIT_KEYS
from ejmp.data.readers.layout import Layout
from ejmp.data.readers.md import MD22_LAYOUT, RMD17_LAYOUT
from ejmp.data.readers.options import listed
from ejmp.data.readers.qm9 import QM9, RAW_NAME
from ejmp.data.readers.qmof import FILE_COLUMNS, GAP_COLUMNS, LABELS, STRUCTURES
from ejmp.data.readers.units import TOO_MUCH, binding_energy
from ejmp.limits import check_regular

_TITLES = {
    "xyz": "extxyz", "cif": "CIF", "vasp": "a POSCAR", "traj": "an ASE trajectory", "db": "an ASE database",
    "json": "an ASE database in JSON",
}  # fmt: skip
_OF_FOLDERS = ("oc20", "oc22", "oc20_text", "rmd17", "md22", "qmof", "ase")
"""Formats whose source may be a folder; a folder of QM9's raw files may be one too."""
_SGDML_COLUMNS = "species:S:1:pos:R:3:forces:R:3"
_OC20_LINE = re.compile(r"[^,\s]+,frame\d+(,\S+)?\s*$|[^,\s]+,\d+(,\S+)?\s*$")
_ALL_ELECTRONS = 0.5, TOO_MUCH
"""Multiples of the estimated binding energy that the total energy of all electrons has."""


@dataclass(frozen=True)
class Recognised:
    """What a source was taken for."""

    format: str
    """Name of the format."""
    reason: str
    """What in the source says so."""


def recognise(source: Path) -> Recognised:
    """Return the format of a file or a folder.

    Raises:
        SourceError: naming the candidates if several formats fit, or what is there if none does.
        FileNotFoundError: if there is nothing at the path.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if not source.is_dir():
        check_regular(source)
        return _of_file(source)
    files = sorted(file for file in source.iterdir() if file.is_file() and not file.name.startswith("."))
    names = {file.name for file in files}
    if "dataset.json" in names or any(source.glob("*/dataset.json")):
        raise SourceError(source, "", "a record store that ejmp has written: ejmp.data.open_store reads its splits")
    if {LABELS, STRUCTURES} <= names:
        return Recognised("qmof", f"{LABELS} and {STRUCTURES} are in it")
    tables = [file for file in files if file.suffix == ".csv" and _is_gaps(file)]
    if tables:
        return Recognised("qmof", f"{tables[0].name} has a column of band gaps")
    found = dict(_of_files(files))
    if not found:
        raise SourceError(source, "", f"of no format that ejmp knows; it has {listed(names)}: say --format")
    kinds = {each.format for each in found.values()}
    if len(kinds) > 1:
        examples = {each.format: file.name for file, each in found.items()}
        shown = ", ".join(f"{kind} ({name})" for kind, name in sorted(examples.items()))
        raise _ask(source, sorted(kinds), f"its files are of several formats: {shown}")
    (kind,) = kinds
    first = next(iter(found))
    if kind not in _OF_FOLDERS and not RAW_NAME.search(first.name):
        raise SourceError(source, "", f"{first.name} in it is of the format {kind}, which is one file: name that file")
    return Recognised(kind, f"{len(found)} of {len(files)} files, the first is {first.name}: {found[first].reason}")


def _of_files(files: Iterable[Path]) -> Iterator[tuple[Path, Recognised]]:
    """Yield what the files of a folder are, without those of no kind and those that cannot be read at all."""
    ambiguous = None
    for file in files:
        try:
            yield file, _of_file(file)
        except _AmbiguousError as error:
            ambiguous = error
        except SourceError:
            continue  # a text of another kind, or a damaged file, which the reader names
    if ambiguous is not None:
        raise ambiguous


class _AmbiguousError(SourceError):
    """Raised for a source that fits several formats."""


def _ask(path: Path, candidates: Iterable[str], problem: str) -> _AmbiguousError:
    return _AmbiguousError(path, "", f"{problem}: say which it is, --format {' or --format '.join(candidates)}")


def _of_file(file: Path) -> Recognised:
    kind = kind_of(file)
    with reading(file):
        if kind in ("cif", "vasp", "traj", "db"):
            return Recognised("ase", f"its contents are {_TITLES[kind]}")
        if kind == "xyz":
            return _of_xyz(file)
        if kind == "json" and b'"ids"' in _tail_of(file):
            return Recognised("ase", f"its contents are {_TITLES[kind]}")
        if kind == "hdf5":
            return _of_hdf5(file)
        if kind == "zip":
            return _of_zip(file)
        if kind == "lmdb":
            raise _ask(file, ("oc20", "oc22"), "an LMDB file, whose energies are those of OC20 or of OC22")
        if kind == "tar" or (is_packed(file) and head_of(file)[257:262] == b"ustar"):
            return _of_tar(file)
    if kind == "pickle":
        raise SourceError(file, "", "a pickle, which could run code when it is read: no format of ejmp is one")
    raise SourceError(file, "", f"of no format that ejmp recognises by its contents; it reads {', '.join(KINDS)}, "
                      "HDF5, LMDB, npz and more: say --format")  # fmt: skip


def _tail_of(file: Path) -> bytes:
    """Return first and last bytes of a file."""
    size = file.stat().st_size
    with file.open("rb") as raw:
        head = raw.read(1 << 16)
        raw.seek(max(size - (1 << 16), 0))
        return head + raw.read()


def _has(names: Iterable[str], layout: Layout) -> bool:
    return {layout.numbers, layout.positions, layout.energy, layout.forces} <= set(names)


def _of_hdf5(file: Path) -> Recognised:
    layouts = {"ani1x": ANI1X_LAYOUT, "transition1x": TRANSITION1X_LAYOUT, "spice": SPICE_LAYOUT}
    seen: dict[str, None] = {}

    def visit(name: str, item: object) -> str | None:
        if not hasattr(item, "keys"):
            return None
        inside = list(item.keys())  # pyright: ignore[reportAttributeAccessIssue]
        seen.update(dict.fromkeys(inside[:30]))
        return next((f"{kind} {name}" for kind, layout in layouts.items() if _has(inside, layout)), None)

    with import_optional("h5py").File(file) as contents:
        found = contents.visititems(visit)
    if found is None:
        raise SourceError(file, "", f"an HDF5 file of no layout that ejmp knows; it has {listed(seen)}")
    kind, _, group = found.partition(" ")
    return Recognised(kind, f"group {group} has {layouts[kind].energy} and {layouts[kind].forces}")


def _of_zip(file: Path) -> Recognised:
    check_zip(file, file)
    with zipfile.ZipFile(file) as archive:
        inside = archive.namelist()
    if any(name.endswith("data.pkl") for name in inside):
        return Recognised("qm9", f"{sum(part.count for part in QM9.parts(file))} molecules of PyG's QM9")
    names = [name.removesuffix(".npy") for name in inside if name.endswith(".npy")]
    if not names:
        raise SourceError(file, "", f"a zip of {listed(inside)}: unpack it")
    for kind, layout in (("rmd17", RMD17_LAYOUT), ("md22", MD22_LAYOUT)):
        if _has(names, layout):
            return Recognised(kind, f"an npz with {layout.positions}, {layout.energy} and {layout.forces}")
    # No layout fits; the reader's own message is the clearest about what an npz lacks.
    several = "; N, R and Z of several molecules end to end are not read" * ("N" in names and "Z" in names)
    raise SourceError(file, "", f"an npz of no layout that ejmp knows; it has {listed(sorted(names))}{several}")


def _of_tar(file: Path) -> Recognised:
    with open_tar(file) as archive:
        names = [member.name for member, _ in zip(archive, range(100), strict=False)]
    if any(RAW_NAME.search(name) for name in names):
        return Recognised("qm9", "a tar of dsgdb9nsd_*.xyz")
    raise SourceError(file, "", f"a tar, of {listed(names)}: unpack it")


def _of_xyz(file: Path) -> Recognised:
    text = head_of(file).decode(errors="replace")
    lines = text.splitlines()
    comment = lines[1].strip()
    if comment.startswith("gdb") and len(comment.split()) == 17:
        return Recognised("qm9", "a raw file of QM9")
    if re.fullmatch(NUMBER, comment) and len(lines[2].split()) == 7:
        return Recognised("md22", "xyz with the energy alone as comment, as sGDML writes it, in kcal/mol")
    if _has_oc20_lines(file):
        return Recognised("oc20_text", "a txt file of systems and frames is beside it")
    columns = re.search(r"Properties=(\S+)", comment)
    periodic = "Lattice" in comment or re.search(r'pbc="[^"]*T', comment)
    states_unit = any(f"{key}=" in comment.lower() for key in ENERGY_UNIT_KEYS)
    energy = re.search(rf"(?:^|\s)(energy)=({NUMBER})(?:\s|$)", comment, re.IGNORECASE)
    if columns is not None and columns[1] == _SGDML_COLUMNS and not (periodic or states_unit) and energy is not None:
        symbols = [line.split()[0].capitalize() for line in lines[2 : 2 + int(lines[0])] if line.strip()]
        known = import_optional("ase.data").atomic_numbers
        ratio = -float(energy[2]) / binding_energy([known.get(symbol, 1) for symbol in symbols] or [1])
        if ratio > TOO_MUCH:
            raise _ask(file, ("md22", "ase"), f"energy {energy[2]} is too low for eV: in md22 it is in kcal/mol, in "
                       "ase in the unit that --unit-energy says")  # fmt: skip
        low, high = _ALL_ELECTRONS
        if energy[1] == "Energy" and not low < ratio < high:
            raise _ask(file, ("md22", "ase"), "molecules with forces in kcal/mol (md22) or in eV (ase)")
    return Recognised("ase", f"its contents are {_TITLES['xyz']}")


def _has_oc20_lines(file: Path) -> bool:
    """Return whether the lines of OC20's text form, "system,frame,reference energy", are beside an extxyz file."""
    base = Path(plain_name(file)).stem
    for beside in (file.with_name(f"{base}.txt"), file.with_name(f"{base}.txt.xz")):
        if beside.is_file():
            lines = head_of(beside).decode(errors="replace").splitlines()
            return bool(lines) and _OC20_LINE.match(lines[0]) is not None
    return False


def _is_gaps(file: Path) -> bool:
    try:
        row = next(csv.reader(io.StringIO(head_of(file).decode(errors="replace"))), [])
    except csv.Error:
        return False
    return bool(set(row) & set(FILE_COLUMNS)) and bool(set(row) & set(GAP_COLUMNS))
