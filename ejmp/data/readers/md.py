"""rMD17 and MD22: trajectories of one molecule per file, in kcal/mol and A unless a file states other units.

A source is one file or a folder of them. The files are `rmd17_<molecule>.npz`, `md22_<molecule>.npz`, or the xyz files
of sGDML: their comment line is the energy, alone or as `Energy=`, and each atom's line ends with its force. Units that
an npz states as sGDML does, `e_unit` and `r_unit`, are obeyed. Ids are `<file>:<frame>`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ejmp.data.readers.files import SourceError, cached_by_file, file_in, import_optional, list_files, reading
from ejmp.data.readers.format import Format, Part, parse_slice, slices
from ejmp.data.readers.impossible import all_far_apart
from ejmp.data.readers.kinds import check_zip, kind_of
from ejmp.data.readers.labels import ENERGY_UNIT_KEYS, LENGTH_UNIT_KEYS
from ejmp.data.readers.layout import Layout
from ejmp.data.readers.options import LEFT_OUT, NOT_READ, ReadOptions, Rows, Survey
from ejmp.data.readers.units import factor_of
from ejmp.data.readers.validation import validate
from ejmp.data.readers.xyz import read_frames, split_part, xyz_parts
from ejmp.graph.structure import Structure

RMD17_LAYOUT = Layout(numbers="nuclear_charges", positions="coords", energy="energies", forces="forces")
MD22_LAYOUT = Layout(numbers="z", positions="R", energy="E", forces="F")

_XYZ_ROWS = (("energy in the comment", "structure", "energy"), ("forces [n, 3]", "atom", "forces"))


@cached_by_file
def _arrays(file: Path) -> dict[str, np.ndarray]:
    with reading(file):
        check_zip(file, file)
    with reading(file), np.load(file, allow_pickle=False) as arrays:
        found = {}
        for name in arrays.files:
            try:
                found[name] = arrays[name]
            except ValueError as error:
                if "Object arrays" not in str(error):
                    raise
                problem = "Object arrays cannot be loaded: they are pickles, and a pickle can run code; write one file"
                raise SourceError(file, name, f"{problem} per molecule, with arrays of numbers") from error
        return found


@dataclass(frozen=True, kw_only=True)
class _Frames:
    """The arrays of a file as they are in it, their units in eV and A, and what became of each array."""

    numbers: np.ndarray
    positions: np.ndarray
    energy: np.ndarray | None
    forces: np.ndarray | None
    targets: Mapping[str, np.ndarray]
    energy_unit: float
    length_unit: float
    rows: Rows


def _asked(layout: Layout, options: ReadOptions) -> tuple[str | None, str | None]:
    """Return the names of energies and forces as options choose them; None: left out."""
    names = (options.energy_key or layout.energy, options.forces_key or layout.forces)
    return tuple(None if name == LEFT_OUT else name for name in names)  # pyright: ignore[reportReturnType]


def _load(file: Path, layout: Layout, options: ReadOptions) -> _Frames:
    """Return the arrays of a file if their shapes agree."""
    arrays = _arrays(file)
    energy, forces = _asked(layout, options)
    wanted = (layout.numbers, layout.positions, energy, forces, *options.targets)
    missing = [name for name in wanted if name is not None and name not in arrays]
    if missing:
        several = arrays["N"].ndim == 1 if "N" in arrays else False
        note = "; N, R and Z of several molecules end to end are not read: write one file per molecule" * several
        raise SourceError(file, "", f"no {', '.join(missing)}; it has {', '.join(sorted(arrays))[:200]}{note}")
    n, frames = arrays[layout.numbers].size, arrays[layout.positions].size // max(3 * arrays[layout.numbers].size, 1)
    shapes = {layout.numbers: (n,), layout.positions: (frames, n, 3)}
    shapes |= {name: (frames,) for name in (energy, *options.targets) if name is not None}
    shapes |= {forces: (frames, n, 3)} if forces is not None else {}
    found = {}
    for name, shape in shapes.items():
        found[name] = arrays[name].reshape(-1) if len(shape) == 1 else arrays[name]
        if found[name].shape != shape or found[name].dtype.kind not in "iuf":
            got = f"{arrays[name].dtype} {list(arrays[name].shape)}"
            raise SourceError(file, name, f"expected numbers {list(shape)}, got {got}")
    with reading(file):
        energy_unit, length_unit = _units(
            {name: str(_text(array)) for name, array in arrays.items() if array.size == 1}, options
        )
    labels = {energy: "energy", forces: "forces"} | {key: f"target {name}" for key, name in options.targets.items()}
    rows = [(name, "structure" if array.ndim < 3 else "atom", labels.get(name, NOT_READ))
            for name, array in arrays.items()
            if array.ndim and len(array) == frames and name not in (layout.numbers, layout.positions)]  # fmt: skip
    return _Frames(
        numbers=found[layout.numbers],
        positions=found[layout.positions],
        energy=None if energy is None else found[energy],
        forces=None if forces is None else found[forces],
        targets={name: found[key] for key, name in options.targets.items()},
        energy_unit=energy_unit,
        length_unit=length_unit,
        rows=tuple(rows),
    )


def _units(stated: Mapping[str, str], options: ReadOptions) -> tuple[float, float]:
    """Return the units of energy (eV) and length (A): what the file states, or options, or those of the datasets."""
    energy = next((stated[name] for name in ENERGY_UNIT_KEYS if name in stated), None)
    length = next((stated[name] for name in LENGTH_UNIT_KEYS if name in stated), None)
    return (
        factor_of("energy", energy, options.unit_energy, "kcal/mol"),
        factor_of("length", length, options.unit_length, "A"),
    )


def _text(array: np.ndarray) -> str:
    value = array.reshape(())[()]
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _npz_parts(path: Path, layout: Layout, options: ReadOptions, survey: Survey) -> list[Part]:
    parts = []
    for file in list_files(path, ("*.npz",)):
        parts += _unless_skipped(partial(_npz_slices, file, layout, options), file, options, survey)
    return parts


def _npz_slices(file: Path, layout: Layout, options: ReadOptions) -> list[Part]:
    return slices(file.name, len(_load(file, layout, options).positions))


def _unless_skipped(parts: Callable[[], list[Part]], file: Path, options: ReadOptions, survey: Survey) -> list[Part]:
    """Return the parts of a file, none if it is unreadable and options say to skip such files."""
    try:
        return parts()
    except SourceError as error:
        if options.on_error == "raise":
            raise
        survey.skip(file, str(error))
        return []


def _read_npz(path: Path, part: Part, layout: Layout, options: ReadOptions, survey: Survey) -> Iterator[Structure]:
    name, start, stop = parse_slice(part)
    file = file_in(path, name)
    found = _load(file, layout, options)
    force_unit = found.energy_unit / found.length_unit
    with np.errstate(all="ignore"):  # NaN and infinity are found by `validate`
        far_apart = all_far_apart(found.numbers, found.positions[start:stop] * found.length_unit)
    for k in range(start, stop):
        structure = Structure(
            numbers=found.numbers,
            positions=found.positions[k] if found.length_unit == 1 else found.positions[k] * found.length_unit,
            energy=None if found.energy is None else float(found.energy[k]) * found.energy_unit,
            forces=None if found.forces is None else found.forces[k] * force_unit,
            targets={name: float(values[k]) for name, values in found.targets.items()},
            id=f"{file.stem}:{k}",
        )
        survey.saw(found.rows)
        yield validate(structure, file, f"frame {k}", far_apart=bool(far_apart[k - start]))


def _md22_parts(path: Path, layout: Layout, options: ReadOptions, survey: Survey) -> list[Part]:
    parts = []
    for file in list_files(path, ("*.npz", "*.xyz")):
        if kind_of(file) == "xyz":
            parts += _unless_skipped(partial(xyz_parts, file), file, options, survey)
        else:
            parts += _npz_parts(file, layout, options, survey)
    return parts


def _read_md22(path: Path, part: Part, layout: Layout, options: ReadOptions, survey: Survey) -> Iterator[Structure]:
    if "@" not in part.name.rpartition(":")[0]:
        yield from _read_npz(path, part, layout, options, survey)
        return
    file = file_in(path, split_part(part)[0])
    chosen = [name for name in ("energy_key", "forces_key", "targets") if getattr(options, name)]
    if chosen:
        raise SourceError(file, "", f"{chosen[0]}: xyz files of sGDML have one energy and forces; --format ase chooses")
    for k, frame in read_frames(file, part):
        with reading(file, f"frame {k}"):
            structure = _sgdml(frame, f"{file.stem}:{k}", options)
        survey.saw(_XYZ_ROWS)
        yield validate(structure, file, f"frame {k}")


def _sgdml(frame: str, place: str, options: ReadOptions) -> Structure:
    """Return one frame of an xyz file of sGDML as a structure."""
    symbols = import_optional("ase.data").atomic_numbers
    _, comment, atoms = frame.split("\n", 2)
    comment = comment.strip()
    layout = re.search(r"Properties=(\S+)", comment)
    if layout and layout[1] != "species:S:1:pos:R:3:forces:R:3":
        raise ValueError(f"expected columns species, pos, forces, got {layout[1][:100]}")
    energy = re.search(r"(?:^|\s)energy=(\S+)", comment, re.IGNORECASE)
    rows = [line.split() for line in atoms.rstrip("\n").split("\n")]
    if any(len(row) != 7 or row[0] not in symbols for row in rows):
        raise ValueError("expected lines of symbol, x, y, z and three components of the force")
    values = np.array([row[1:] for row in rows], dtype=np.float64)
    stated = dict(re.findall(r"""(\w*unit\w*)=["']?([^\s"']+)""", comment)) if "unit" in comment else {}
    energy_unit, length_unit = _units(stated, options)
    return Structure(
        numbers=[symbols[row[0]] for row in rows],
        positions=values[:, :3] * length_unit,
        energy=float(energy[1] if energy else comment) * energy_unit,
        forces=values[:, 3:] * (energy_unit / length_unit),
        id=place,
    )


def _configure(layout: Layout, parts: Callable[..., list[Part]], read: Callable[..., Iterator[Structure]]) -> Format:
    """Return a format of this layout, which takes options."""

    def configure(options: ReadOptions, survey: Survey) -> Format:
        chosen = {"layout": layout, "options": options, "survey": survey}
        return Format(parts=partial(parts, **chosen), read=partial(read, **chosen), configure=configure)

    return configure(ReadOptions(), Survey())


RMD17 = _configure(RMD17_LAYOUT, _npz_parts, _read_npz)
MD22 = _configure(MD22_LAYOUT, _md22_parts, _read_md22)
