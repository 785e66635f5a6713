"""rMD17 and MD22: trajectories of one molecule per file, in kcal/mol and A.

A source is one file or a folder of them. The files are `rmd17_<molecule>.npz`, `md22_<molecule>.npz`, or the xyz files
of sGDML: their comment line is the energy, alone or as `Energy=`, and each atom's line ends with its force. Ids are
`<file>:<frame>`.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from ejmp.data.readers.files import SourceError, cached_by_file, file_in, import_optional, list_files, reading
from ejmp.data.readers.format import Format, Part, parse_slice, slices
from ejmp.data.readers.layout import Layout
from ejmp.data.readers.units import KCAL_PER_MOL
from ejmp.data.readers.validation import validate
from ejmp.data.readers.xyz import read_frames, split_part, xyz_parts
from ejmp.graph.structure import Structure

RMD17_LAYOUT = Layout(numbers="nuclear_charges", positions="coords", energy="energies", forces="forces")
MD22_LAYOUT = Layout(numbers="z", positions="R", energy="E", forces="F")


@cached_by_file
def _arrays(file: Path) -> dict[str, np.ndarray]:
    with reading(file), np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _layout_arrays(file: Path, layout: Layout) -> list[np.ndarray]:
    """Return numbers [n], positions [f, n, 3], energies [f] and forces [f, n, 3] if their shapes agree."""
    arrays = _arrays(file)
    names = (layout.numbers, layout.positions, layout.energy, layout.forces)
    missing = [name for name in names if name not in arrays]
    if missing:
        raise SourceError(file, "", f"no {', '.join(missing)}; it has {', '.join(sorted(arrays))[:200]}")
    numbers, positions, energy, forces = (arrays[name] for name in names)
    energy = energy.reshape(-1)
    frames, n = len(energy), numbers.size
    for name, array, shape in (
        (layout.numbers, numbers, (n,)),
        (layout.positions, positions, (frames, n, 3)),
        (layout.energy, energy, (frames,)),
        (layout.forces, forces, (frames, n, 3)),
    ):
        if array.shape != shape or array.dtype.kind not in "iuf":
            raise SourceError(file, name, f"expected numbers {list(shape)}, got {array.dtype} {list(array.shape)}")
    return [numbers, positions, energy, forces]


def _npz_parts(path: Path, layout: Layout) -> list[Part]:
    files = list_files(path, ("*.npz",))
    return [part for file in files for part in slices(file.name, len(_layout_arrays(file, layout)[2]))]


def _read_npz(path: Path, part: Part, layout: Layout) -> Iterator[Structure]:
    name, start, stop = parse_slice(part)
    file = file_in(path, name)
    numbers, positions, energy, forces = _layout_arrays(file, layout)
    for k in range(start, stop):
        structure = Structure(
            numbers=numbers,
            positions=positions[k],
            energy=float(energy[k]) * KCAL_PER_MOL,
            forces=forces[k] * KCAL_PER_MOL,
            id=f"{file.stem}:{k}",
        )
        yield validate(structure, file, f"frame {k}")


def _md22_parts(path: Path) -> list[Part]:
    parts = []
    for file in list_files(path, ("*.npz", "*.xyz")):
        parts += xyz_parts(file) if file.suffix == ".xyz" else _npz_parts(file, MD22_LAYOUT)
    return parts


def _read_md22(path: Path, part: Part) -> Iterator[Structure]:
    if "@" not in part.name.rpartition(":")[0]:
        yield from _read_npz(path, part, MD22_LAYOUT)
        return
    file = file_in(path, split_part(part)[0])
    for k, lines in read_frames(file, part):
        with reading(file, f"frame {k}"):
            structure = _sgdml(lines, f"{file.stem}:{k}")
        yield validate(structure, file, f"frame {k}")


def _sgdml(lines: list[str], place: str) -> Structure:
    """Return one frame of an xyz file of sGDML as a structure."""
    symbols = import_optional("ase.data").atomic_numbers
    comment = lines[1].strip()
    layout = re.search(r"Properties=(\S+)", comment)
    if layout and layout[1] != "species:S:1:pos:R:3:forces:R:3":
        raise ValueError(f"expected columns species, pos, forces, got {layout[1][:100]}")
    energy = re.search(r"(?:^|\s)energy=(\S+)", comment, re.IGNORECASE)
    rows = [line.split() for line in lines[2:]]
    if any(len(row) != 7 or row[0] not in symbols for row in rows):
        raise ValueError("expected lines of symbol, x, y, z and three components of the force")
    values = np.array([row[1:] for row in rows], dtype=np.float64)
    return Structure(
        numbers=[symbols[row[0]] for row in rows],
        positions=values[:, :3],
        energy=float(energy[1] if energy else comment) * KCAL_PER_MOL,
        forces=values[:, 3:] * KCAL_PER_MOL,
        id=place,
    )


RMD17 = Format(parts=partial(_npz_parts, layout=RMD17_LAYOUT), read=partial(_read_npz, layout=RMD17_LAYOUT))
MD22 = Format(parts=_md22_parts, read=_read_md22)
