"""ANI-1x, Transition-1x and SPICE: HDF5 files of groups of conformations of one molecule.

Groups without conformations are left out, and how many there are is said on stderr. A folder of LMDB files, or one, in
place of an HDF5 file is read as JMP's preprocessed ANI-1x or Transition-1x, as `ejmp.data.readers.oc` reads it.

- ANI-1x has a group per formula, with wB97x/6-31G(d) labels in hartree. Frames without energy or forces (NaN) are
  skipped, and groups of fewer than MIN_ATOMS atoms are dropped.
- Transition-1x has groups split / formula / reaction, with wB97x/6-31G(d) labels in eV. The splits are train, val and
  test; a file with none of them is read from `data`, without splits. Systems of fewer than MIN_ATOMS atoms are kept,
  and marked by an id that ends in `:small`.
- SPICE has a group per molecule, in bohr and hartree, with gradients, which are minus the forces. `formation_energy`
  (eV) is a target.

Ids are `<group>:<frame>`, the frame's number in its group.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ejmp.data.readers.files import SourceError, import_optional, list_files, reading
from ejmp.data.readers.format import Format, Part, parse_slice, slices
from ejmp.data.readers.hdf5_checks import check_links, check_stored, inside
from ejmp.data.readers.impossible import all_far_apart
from ejmp.data.readers.layout import Layout
from ejmp.data.readers.oc import OC20
from ejmp.data.readers.options import Rows, report, rows_of
from ejmp.data.readers.units import BOHR, HARTREE
from ejmp.data.readers.validation import validate
from ejmp.graph.structure import Structure
from ejmp.limits import check_limit, check_regular, check_unpacked

MIN_ATOMS = 4
"""Fewest atoms of a system that JMP is trained on."""
SLICE_ATOMS = 1_000_000
"""Most atoms of all structures in one part."""
SPLITS = ("train", "val", "test")
_KNOWN_ROWS: dict[tuple[str, tuple[str, ...]], Rows] = {}

ANI1X_LAYOUT = Layout(
    numbers="atomic_numbers", positions="coordinates", energy="wb97x_dz.energy", forces="wb97x_dz.forces",
    energy_unit=HARTREE, force_unit=HARTREE,
)  # fmt: skip
TRANSITION1X_LAYOUT = Layout(
    numbers="atomic_numbers", positions="positions", energy="wB97x_6-31G(d).energy", forces="wB97x_6-31G(d).forces",
)  # fmt: skip
SPICE_LAYOUT = Layout(
    numbers="atomic_numbers", positions="conformations", energy="dft_total_energy", forces="dft_total_gradient",
    length_unit=BOHR, energy_unit=HARTREE, force_unit=-HARTREE / BOHR, targets={"formation_energy": HARTREE},
)  # fmt: skip


def _all_groups(file: Any) -> list[tuple[str, str | None]]:
    """Return every group with atoms, at any depth, without a split: a "/" in a SMILES of SPICE adds a level."""
    found: list[tuple[str, str | None]] = []

    def visit(name: str, item: Any) -> None:
        if hasattr(item, "keys") and item.id.links.exists(b"atomic_numbers"):  # a group
            found.append((name, None))

    file.visititems(visit)
    return found


def _reactions(file: Any) -> list[tuple[str, str | None]]:
    """Return every reaction of Transition-1x, with its split."""
    splits: Sequence[str] = [name for name in SPLITS if name in file] or ["data"]
    return [
        (f"{split}/{formula}/{reaction}", None if split == "data" else split)
        for split in splits
        for formula in sorted(file[split])
        for reaction in sorted(file[f"{split}/{formula}"])
    ]


def _array(group: Any, name: str, shape: tuple[int | None, ...]) -> Any:
    """Return an array of a group without reading it, after checking that it holds numbers and has the given shape."""
    array = inside(group, name)
    found = getattr(array, "shape", None)
    fits = (
        found is not None
        and len(found) == len(shape)
        and all(b in (None, a) for a, b in zip(found, shape, strict=True))
    )
    if not fits or array.dtype.kind not in "fiu" or array.dtype.subdtype:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected numbers [{expected}], got {found} {getattr(array, 'dtype', 'a group')}")
    return array


def _arrays(group: Any, layout: Layout) -> dict[str, Any]:
    """Return the arrays of a group after checking that their shapes agree; only the atomic numbers are read."""
    count = _array(group, layout.numbers, (None,))
    if not len(count):
        raise ValueError(f"{layout.numbers}: expected 1 or more atoms, got none")
    check_limit(group.file.filename, "atoms", len(count), "atoms")
    positions = _array(group, layout.positions, (None, len(count), 3))
    arrays = {name: _array(group, name, (len(positions),)) for name in (layout.energy, *layout.targets)}
    forces = _array(group, layout.forces, positions.shape)
    return {layout.numbers: count[:], layout.positions: positions, layout.forces: forces, **arrays}


def _labelled(arrays: dict[str, Any], layout: Layout, start: int, stop: int) -> np.ndarray:
    """Return which frames of a slice have an energy and all forces, [stop - start] bool."""
    energy, forces = (arrays[name][start:stop] for name in (layout.energy, layout.forces))
    return np.isfinite(energy) & np.isfinite(forces).all((1, 2))


def _is_empty(group: Any, layout: Layout) -> bool:
    """Return whether a group announces no conformations: SPICE 2.0.1 has such, with arrays of another shape."""
    there = group.id.links.exists(layout.positions.encode())
    shape = getattr(inside(group, layout.positions), "shape", None) if there else None
    return shape is not None and len(shape) > 0 and shape[0] == 0


def _parts(path: Path, layout: Layout, groups: Callable[[Any], list[tuple[str, str | None]]]) -> list[Part]:
    h5py = import_optional("h5py")
    (source,) = list_files(path, ())
    parts, empty, found, total, unpacked = [], 0, [], 0, 0
    packed = check_regular(source).st_size
    with reading(source), h5py.File(source, "r") as file:
        check_links(file)
        found = groups(file)
        for name, split in found:
            with reading(source, name):
                if _is_empty(file[name], layout):
                    empty += 1
                    continue
                arrays = _arrays(file[name], layout)
                atoms, frames = len(arrays[layout.numbers]), len(arrays[layout.positions])
                total += frames
                check_limit(source, "frames", total, "frames or more")
                unpacked += sum(check_stored(source, array) for array in arrays.values() if hasattr(array, "chunks"))
                check_unpacked(source, unpacked, packed)
                if layout == ANI1X_LAYOUT and atoms < MIN_ATOMS:
                    continue
                for part in slices(name, frames, SLICE_ATOMS // atoms):
                    count = part.count
                    if layout == ANI1X_LAYOUT:
                        count = int(_labelled(arrays, layout, *parse_slice(part)[1:]).sum())
                    parts.append(Part(name=part.name, count=count, split=split))
    if not parts:
        with reading(source), h5py.File(source, "r") as file:
            raise SourceError(source, "", _nothing(file, layout))
    if empty:
        sys.stderr.write(f"{source}: {empty} of {len(found)} groups hold no conformations and are left out\n")
    return parts


def _nothing(file: Any, layout: Layout) -> str:
    """Say why a file has no group to read: which arrays one needs, and which the first one has."""
    arrays: dict[str, list[str]] = {}

    def visit(name: str, item: Any) -> None:
        if not hasattr(item, "keys"):
            folder, _, array = name.rpartition("/")
            arrays.setdefault(folder, []).append(array)

    file.visititems(visit)
    wanted = [layout.numbers, layout.positions, layout.energy, layout.forces, *layout.targets]
    for folder, names in arrays.items():
        missing = [name for name in wanted if name not in names]
        if missing:
            has = ", ".join(names)[:200]
            return f"no group holds any conformations: group {folder or '/'} has {has}, and lacks {', '.join(missing)}"
    return "no group holds any conformations"


def _rows(group: Any, layout: Layout, n: int) -> Rows:
    """Return what the arrays of a group became; names alone tell, as the groups of a file have the same ones."""
    names = tuple(name for name in group if name not in (layout.numbers, layout.positions))
    if (layout.energy, names) not in _KNOWN_ROWS:
        labels = {layout.energy: "energy", layout.forces: "forces"}
        labels |= {name: labels.get(name, f"target {name}") for name in layout.targets}
        shapes = {name: getattr(group[name], "shape", None) or () for name in names}
        _KNOWN_ROWS[layout.energy, names] = rows_of(shapes, labels, n)
    return _KNOWN_ROWS[layout.energy, names]


def _read(path: Path, part: Part, layout: Layout) -> Iterator[Structure]:
    h5py = import_optional("h5py")
    name, start, stop = parse_slice(part)
    with reading(path, name):
        check_regular(path)
        with h5py.File(path, "r") as file:
            arrays = _arrays(file[name], layout)
            report(_rows(file[name], layout, len(arrays[layout.numbers])))
            keep = np.ones(stop - start, dtype=bool)
            if layout == ANI1X_LAYOUT:
                keep = _labelled(arrays, layout, start, stop)
            numbers = arrays.pop(layout.numbers)
            values = {key: np.asarray(array[start:stop]) for key, array in arrays.items()}
        small = ":small" if layout == TRANSITION1X_LAYOUT and len(numbers) < MIN_ATOMS else ""
    positions = values[layout.positions].astype(np.float64) * layout.length_unit
    with np.errstate(all="ignore"):  # NaN and infinity are found by `validate`
        far_apart = all_far_apart(numbers, positions)
    for k in keep.nonzero()[0].tolist():
        structure = Structure(
            numbers=numbers,
            positions=positions[k],
            energy=float(values[layout.energy][k]) * layout.energy_unit,
            forces=values[layout.forces][k] * layout.force_unit,
            targets={key: float(values[key][k]) * unit for key, unit in layout.targets.items()},
            id=f"{name}:{start + k}{small}",
        )
        yield validate(structure, path, f"{name}, frame {start + k}", far_apart=bool(far_apart[k]))


def _format(layout: Layout, groups: Callable[[Any], list[tuple[str, str | None]]]) -> Format:
    return Format(parts=partial(_parts, layout=layout, groups=groups), read=partial(_read, layout=layout))


def _or_preprocessed(hdf5: Format) -> Format:
    """Return a format that reads JMP's preprocessed LMDB files as well as HDF5."""

    def is_lmdb(path: Path) -> bool:
        return path.suffix == ".lmdb" or (path.is_dir() and any(path.glob("*.lmdb")))

    def parts(path: Path) -> Sequence[Part]:
        return (OC20 if is_lmdb(path) else hdf5).parts(path)

    def read(path: Path, part: Part) -> Iterator[Structure]:
        return (OC20 if is_lmdb(path) else hdf5).read(path, part)

    return Format(parts=parts, read=read)


ANI1X = _or_preprocessed(_format(ANI1X_LAYOUT, _all_groups))
TRANSITION1X = _or_preprocessed(_format(TRANSITION1X_LAYOUT, _reactions))
SPICE = _format(SPICE_LAYOUT, _all_groups)
