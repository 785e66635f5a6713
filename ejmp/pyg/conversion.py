"""Record stores made of PyG's datasets."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ejmp.data.readers.format import Format, Part, parse_slice, slices
from ejmp.data.readers.qm9 import TARGETS
from ejmp.data.readers.units import BOHR, HARTREE, KCAL_PER_MOL
from ejmp.data.readers.validation import validate
from ejmp.data.store import conversion
from ejmp.graph.structure import Structure
from ejmp.pyg.exchange import to_structures

ENERGY_UNITS = {"eV": 1.0, "kcal/mol": KCAL_PER_MOL, "kJ/mol": KCAL_PER_MOL / 4.184, "hartree": HARTREE}
"""Units of energy, eV."""
LENGTH_UNITS = {"A": 1.0, "bohr": BOHR}
"""Units of length, A."""
Place = str | tuple[str, int]
"""An attribute of a `Data`, or an attribute and the number of a value in it."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Where a PyG dataset has its labels, and in which units.

    Raises:
        ValueError: for an unknown unit.
    """

    unit_energy: str
    """Unit of the energy, and with the length's that of the forces: "eV", "kcal/mol", "kJ/mol" or "hartree"."""
    unit_length: str = "A"
    """Unit of positions and cells: "A" or "bohr"."""
    energy: Place | None = "energy"
    """Place of the total energy; None: there is none."""
    forces: str | None = None
    """Attribute of the forces, [n, 3]; None: there are none."""
    targets: Mapping[str, Place] = field(default_factory=dict)
    """Places of other labels of the whole structure by the name they get; they keep their units."""

    def __post_init__(self) -> None:
        """Check the units."""
        for name, known in {"unit_energy": ENERGY_UNITS, "unit_length": LENGTH_UNITS}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")


MD17 = Labels(unit_energy="kcal/mol", forces="force")
"""Labels of `torch_geometric.datasets.MD17`. It rounds energies to float32 (those of ethanol to 0.008 kcal/mol); the
npz files that it downloads are not rounded."""
QM9 = Labels(unit_energy="eV", energy=("y", TARGETS.index("U0")), targets={t: ("y", i) for i, t in enumerate(TARGETS)})
"""Labels of `torch_geometric.datasets.QM9`; the energy is U0, and the 19 targets have the names of `ejmp.data`."""


def structures(dataset: Any, labels: Labels) -> Iterator[Structure]:
    """Yield the structures of a PyG dataset, in eV and A.

    Args:
        dataset: a PyG dataset, or a list of `Data`, each of them one structure as `from_data` takes it. Its `name` or
            `idx` becomes the id, if it has one.
        labels: where its labels are.

    Raises:
        ValueError: naming the item and the field, if a label is missing or anything is impossible.
    """
    return _read(dataset, range(len(dataset)), labels)


def convert(dataset: Any, dest: str | Path, labels: Labels, *, split: str, licence: str = "not stated") -> list[Path]:
    """Write a PyG dataset as a record store, `dest/split`, resuming where an earlier run ended.

    Args:
        dataset: a PyG dataset, or a list of `Data`.
        dest: a folder; its name becomes the dataset's.
        labels: where its labels are.
        split: name of the split: "train", "val" or "test".
        licence: what to write into `dataset.json`.

    Returns:
        The folder of the split, in a list.

    Raises:
        ValueError: for what `structures` refuses, or if `dest` holds another conversion.
    """
    kind = type(dataset).__name__
    known = hashlib.blake2b(repr(labels).encode(), digest_size=8)
    for structure in _read(dataset, range(min(1, len(dataset))), labels):
        known.update(repr(structure.energy).encode() + structure.positions.tobytes())
    name = f"{kind}-{known.hexdigest()}"

    def read(_: Path, part: Part) -> Iterator[Structure]:
        start, stop = parse_slice(part)[1:]
        return _read(dataset, range(start, stop), labels)

    reader = Format(parts=lambda _: slices(name, len(dataset)), read=read)
    return conversion.convert(f"torch_geometric {kind}", dest, format=reader, split=split, licence=licence)


def _read(dataset: Any, numbers: Iterable[int], labels: Labels) -> Iterator[Structure]:
    kind = Path(type(dataset).__name__)
    length, energy = LENGTH_UNITS[labels.unit_length], ENERGY_UNITS[labels.unit_energy]
    for number in numbers:
        data = dataset[number]
        found = to_structures(data)
        if len(found) != 1:
            raise ValueError(f"{kind}: item {number}: expected one structure, got {len(found)}")
        forces = None if labels.forces is None else _array(data, labels.forces, number) * (energy / length)
        name = getattr(data, "name", None)
        structure = replace(
            found[0],
            positions=_numpy(found[0].positions) * length,
            cell=None if found[0].cell is None else _numpy(found[0].cell) * length,
            energy=None if labels.energy is None else _value(data, labels.energy, number) * energy,
            forces=forces,
            targets={target: _value(data, place, number) for target, place in labels.targets.items()},
            id=name if isinstance(name, str) else str(int(getattr(data, "idx", number))),
        )
        yield validate(structure, kind, f"item {number}")


def _numpy(value: Any) -> np.ndarray:
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    return array.astype(np.float64)


def _array(data: Any, name: str, number: int) -> np.ndarray:
    value = getattr(data, name, None)
    if value is None:
        raise ValueError(f"item {number}: expected a label {name!r}, got {', '.join(data.keys())}")
    return _numpy(value)


def _value(data: Any, place: Place, number: int) -> float:
    name, column = (place, None) if isinstance(place, str) else place
    values = _array(data, name, number).reshape(-1)
    if (len(values) != 1) if column is None else not 0 <= column < len(values):
        wanted = "one value" if column is None else f"more than {column} values"
        raise ValueError(f"item {number}: {name}: expected {wanted}, got {len(values)}")
    return float(values[column or 0])
