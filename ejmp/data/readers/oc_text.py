"""OC20 as published text: `N.extxyz` with total energies, and `N.txt` with a line for each frame; both may be .xz.

A line of the txt file is "system,frame,reference energy". The energy of a structure is the total energy less this
reference, as in fairchem's LMDB files; if the line has no reference, it is the total energy. Forces are in eV/A; atoms
that `move_mask` holds in place are `fixed`. Ids are `<file>/<frame of the file>/<system>/<frame>`.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ejmp.data.readers.ase_files import parse_frame
from ejmp.data.readers.files import SourceError, file_in, list_files, reading
from ejmp.data.readers.format import Format, Part
from ejmp.data.readers.kinds import open_plain, read_plain
from ejmp.data.readers.labels import LabelReader
from ejmp.data.readers.options import ReadOptions, current_survey
from ejmp.data.readers.validation import validate
from ejmp.data.readers.xyz import iter_frames
from ejmp.graph.structure import Structure


def _lines(file: Path) -> list[list[str]]:
    """Return the lines of the txt file that belongs to an extxyz file, split at commas."""
    base = file.name.removesuffix(".xz").removesuffix(".extxyz")
    found = [beside for ending in (".txt", ".txt.xz") if (beside := file.with_name(base + ending)).exists()]
    if not found:
        raise SourceError(file, "", f"{base}.txt or {base}.txt.xz should be beside it")
    with reading(found[0]):
        lines = [line.split(",") for line in read_plain(found[0]).decode().split()]
        if any(len(line) not in (2, 3) for line in lines):
            raise SourceError(found[0], "", 'expected lines of "system,frame,reference energy"')
        return lines


def _parts(path: Path) -> list[Part]:
    files = list_files(path, ("*.extxyz", "*.extxyz.xz"))
    return [Part(name=file.name, count=len(_lines(file))) for file in files]


def _read(path: Path, part: Part) -> Iterator[Structure]:
    file = file_in(path, part.name)
    labels = _lines(file)
    reader = LabelReader(ReadOptions(), current_survey(), tags="oc20", name=str(file))
    with reading(file), open_plain(file) as raw:
        frames = iter_frames(raw, file)
        for k, (system, frame, *reference) in enumerate(labels):
            with reading(file, f"frame {k}"):
                text = next(frames, None)
                if text is None:
                    raise SourceError(file, f"frame {k}", f"the txt file has {len(labels)} lines")
                structure = reader.structure(parse_frame(text), f"{file.name}/{k}/{system}/{frame}")
                if reference and structure.energy is not None:
                    structure = replace(structure, energy=structure.energy - float(reference[0]))
            yield validate(replace(structure, targets={}), file, f"frame {k}")
        if next(frames, None) is not None:
            raise SourceError(file, "", f"it has more frames than the {len(labels)} lines of the txt file")


OC20_TEXT = Format(parts=_parts, read=_read)
