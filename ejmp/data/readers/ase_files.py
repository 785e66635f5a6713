"""Files that ase.io reads, which are taken to be in eV and A: one file, or a folder of them.

These formats are read: extxyz and xyz, ASE's traj and databases (db, json), CIF, and VASP's POSCAR and CONTCAR; text
files also compressed as .xz, .gz and .bz2. What a file is, its contents say; its name decides only where they do not.
Other formats of ASE are refused, because some of them are pickles.

- `ejmp.data.readers.labels` says which arrays become energy, forces and targets. A database's metadata may state units:
  as `energy_unit` and `length_unit`, as SchNetPack's `_property_unit_dict` and `_distance_unit`, or as ASE's
  `key_descriptions`. So may the comment of an extxyz frame.
- Atoms that FixAtoms holds, or FixCartesian in all three directions, are `fixed`; so are those whose `move_mask` is
  false. Other constraints, and atoms held in part, are left out.
- Tags are left out unless `ReadOptions.tags` says what they are: ASE's slab builders number layers with them.

Ids are `<file>:<frame>`.
"""

import io
import itertools
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ejmp.data.readers.cif import read_cif
from ejmp.data.readers.files import SourceError, file_in, import_optional, reading
from ejmp.data.readers.format import Format, Part, parse_slice, slices
from ejmp.data.readers.kinds import check_tables, is_packed, kind_of, name_kind, open_plain, read_plain
from ejmp.data.readers.labels import LabelReader
from ejmp.data.readers.options import ReadOptions, Survey, listed
from ejmp.data.readers.validation import leaving_out, validate
from ejmp.data.readers.xyz import iter_frames, read_frames, split_part, xyz_parts
from ejmp.graph.structure import Structure
from ejmp.limits import check_limit, check_regular, open_regular

KINDS = ("xyz", "cif", "vasp", "traj", "db", "json")
"""What this module reads, as `kind_of` calls it."""
_KNOWN = ".xyz, .extxyz, .traj, .db, .json, .cif, POSCAR"
_LOGICAL = {"T", "F", "True", "False"}


def parse_frame(frame: str) -> Any:
    """Return one frame of an extxyz file as ASE atoms."""
    _, comment, rows = frame.split("\n", 2)
    for layout in re.findall(r"""properties\s*=\s*["']?([^\s"']+)""", comment, re.IGNORECASE):
        words = layout.split(":")
        # ASE would allocate memory for any number of columns.
        if sum(map(int, words[2::3])) > len(rows.split("\n", 1)[0].split()):
            raise ValueError(f"more columns in {layout[:100]} than in the line of the first atom")
        if "L" in words[1::3]:
            _check_logical(words, rows.rstrip("\n").split("\n"))
    try:
        return next(import_optional("ase.io.extxyz").read_xyz(io.StringIO(frame), 0))
    except KeyError as error:
        raise ValueError(f"{error.args[0]!r} is no element (write D and T as H)") from error


def _check_logical(words: list[str], rows: list[str]) -> None:
    """Raise ValueError for a logical value that ASE would take for false because it does not know it."""
    at = 0
    for name, kind, size in zip(words[::3], words[1::3], map(int, words[2::3]), strict=False):
        if kind == "L":
            found = (row.split(None, at + size)[at : at + size] for row in rows)
            wrong = set(itertools.chain.from_iterable(found)) - _LOGICAL
            if wrong:
                raise ValueError(f"{name}: expected T or F, got {listed(sorted(wrong))}")
        at += size


def read_text(file: Path) -> list[Any]:
    """Return the structures of a CIF, a POSCAR or a compressed text file as ASE atoms."""
    return list(_iterate_text(file))


def _iterate_text(file: Path) -> Iterator[Any]:
    with reading(file):
        kind = kind_of(file)
        if kind not in ("xyz", "cif", "vasp"):
            packed = " in a compressed file: unpack it" * is_packed(file)
            got = f"{kind}{packed}" if kind in KINDS else kind or file.suffix or file.name
            raise SourceError(file, "", f"expected one of {_KNOWN}, got {got}")
        if kind == "xyz":
            with open_plain(file) as contents:
                yield from map(parse_frame, iter_frames(contents, file))
            return
        text = read_plain(file).decode(errors="replace")
        import_optional("ase.io.formats")
        if kind == "cif":
            yield from read_cif(text, file)
            return
        _check_poscar(text.splitlines())
        yield from import_optional("ase.io").iread(io.StringIO(text), index=":", format=kind)


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
        if sum(map(_count, line.split())) > len(lines):
            raise ValueError(f"{line.strip()[:100]!r} atoms in {len(lines)} lines")


def _count(word: str) -> int:
    """Return a number of atoms as ASE understands it; 0 for any other word."""
    try:
        return abs(int(word))
    except ValueError:
        return 0


def _trajectory(file: Path) -> Any:
    with open_regular(file) as raw:
        if raw.read(8) != b"- of Ulm":  # the format before this one was a pickle
            raise SourceError(file, "", "not a traj file, or one of before 2016, which ase.io converts")
    return import_optional("ase.io.trajectory").TrajectoryReader(file)


def _database(file: Path) -> Any:
    """Return an ASE database, of the kind that its contents are."""
    if kind_of(file) == "db":
        check_tables(file)
    else:
        check_limit(file, "read_bytes", check_regular(file).st_size, "bytes")
    return import_optional("ase.db").connect(file, type=kind_of(file), use_lock_file=False)


def files_in(path: Path, survey: Survey) -> list[Path]:
    """Return the path itself if it is a file, or else the files in it that this module reads, in order of name.

    Those are the ones of a name it knows; where there are none, those whose contents it knows.

    Raises:
        SourceError: if there are none.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not path.is_dir():
        check_regular(path)
        return [path]
    inside = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    found = [file for file in inside if name_kind(file)] or [file for file in inside if kind_of(file) in KINDS]
    if not found:
        raise SourceError(path, "", f"expected files such as {_KNOWN} in it, got {listed(f.name for f in inside)}")
    others = [file.name for file in inside if file not in set(found)]
    if others:
        survey.say(f"{path}: {len(found)} files are read, {len(others)} of other names are not: {listed(others)}")
    return found


def _parts(path: Path, options: ReadOptions | None = None, survey: Survey | None = None) -> list[Part]:
    options, survey = options or ReadOptions(), survey or Survey()
    parts: list[Part] = []
    for file in files_in(path, survey):
        with leaving_out():
            try:
                with reading(file):
                    parts += _some_parts(file)
            except SourceError as error:
                if options.on_error == "raise":
                    raise
                survey.skip(file, str(error))
    if not parts:
        raise SourceError(path, "", "no structures")
    return parts


def _some_parts(file: Path) -> list[Part]:
    parts = _file_parts(file)
    if not sum(part.count for part in parts):
        raise SourceError(file, "", "no structures")
    return parts


def _file_parts(file: Path) -> list[Part]:
    kind = kind_of(file)
    if kind in ("traj", "db", "json") and not is_packed(file):
        if kind == "traj":
            with _trajectory(file) as frames:
                return slices(file.name, len(frames))
        return slices(file.name, _database(file).count())
    if kind == "xyz" and not is_packed(file):
        return xyz_parts(file)
    count = sum(1 for _ in _iterate_text(file))
    return [Part(name=f"{file.name}:0-{count}", count=count)]


def _read(
    path: Path, part: Part, options: ReadOptions | None = None, survey: Survey | None = None
) -> Iterator[Structure]:
    options, survey = options or ReadOptions(), survey or Survey()
    prefix, start, stop = parse_slice(part)
    of_slices = not (path / prefix).exists() if path.is_dir() else path.name != prefix
    stated = {}
    if of_slices:
        file = file_in(path, split_part(part)[0])
        frames = ((parse_frame(lines), {}) for _, lines in read_frames(file, part))
    else:
        file = file_in(path, prefix)
        with reading(file):
            kind = kind_of(file)
            stated = stated_units(_database(file).metadata) if kind in ("db", "json") else {}
        frames = _frames(file, kind, start, stop)
    labels = LabelReader(options, survey, stated=stated, name=str(path))
    k = start
    while True:
        with reading(file, f"frame {k}"):
            found = next(frames, None)
            if found is None:
                break
            structure = labels.structure(found[0], f"{file.name}:{k}", found[1])
        yield validate(structure, file, f"frame {k}")
        k += 1
    if k != stop:
        raise SourceError(file, f"frame {k}", "not there")


def _frames(file: Path, kind: str | None, start: int, stop: int) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Yield ASE atoms, each with the labels that are stored beside it."""
    if kind == "traj":
        with _trajectory(file) as frames:
            for k in range(start, stop):
                yield frames[k], {}
    elif kind in ("db", "json"):
        for row in _database(file).select(offset=start, limit=stop - start):
            yield row.toatoms(), {**row.data, **row.key_value_pairs}
    else:
        for atoms in _iterate_text(file):
            yield atoms, {}


def stated_units(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the units that the metadata of an ASE database state, by the name of a quantity or of a unit."""
    found = {}
    for key, description in _mapping(metadata.get("key_descriptions")).items():
        if isinstance(description, list | tuple) and len(description) == 3 and description[2]:
            found[key] = description[2]
    for name in ("_property_unit_dict", "property_unit_dict", "units"):
        found |= _mapping(metadata.get(name))
    found |= {key: value for key, value in metadata.items() if "unit" in key}
    return {str(key): value for key, value in found.items() if isinstance(value, str) and value.strip()}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def configure(options: ReadOptions, survey: Survey) -> Format:
    """Return the format whose labels are chosen by options."""
    return Format(
        parts=partial(_parts, options=options, survey=survey),
        read=partial(_read, options=options, survey=survey),
        configure=configure,
    )


ASE = Format(parts=_parts, read=_read, configure=configure)
