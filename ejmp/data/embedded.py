"""The demo mix: nine small datasets shipped with the package, read with numpy alone.

`ejmp.data.generate` says what is in each and makes them again.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ejmp.catalog import CATALOG
from ejmp.data.info import DatasetInfo
from ejmp.graph.structure import Structure

DEMO_MIX = tuple(entry.name for entry in CATALOG.values() if entry.demo and entry.pretraining is not None)
"""Names of the four demo datasets to pre-train on."""
DEMO_DOWNSTREAM = tuple(entry.name for entry in CATALOG.values() if entry.demo and entry.pretraining is None)
"""Names of the five demo datasets to fine-tune on; these have a test split."""
DEMO_FOLDER = Path(__file__).parent / "demo-mix"
"""Folder of the demo datasets' files."""
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
"""Names of the splits, in the order they have in a file."""


class DemoSet:
    """One split of a demo dataset, in memory."""

    def __init__(self, arrays: dict[str, Any], info: DatasetInfo, first: int) -> None:
        """Make one split of a dataset.

        Args:
            arrays: the arrays of all splits, as `ejmp.data.generate.write` writes them.
            info: what is known of this split.
            first: the number of its first structure in the arrays.
        """
        self.info = info
        self._arrays = arrays
        self._first = first
        own = slice(first, first + info.count)
        self.num_atoms = np.diff(arrays["ptr"])[own]
        self.num_edges = arrays["num_edges"][own]

    def __len__(self) -> int:
        return self.info.count

    def __getitem__(self, index: int) -> Structure:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.info.name} {self.info.split}: index {index} of {len(self)} structures")
        i = self._first + index % len(self)
        arrays = self._arrays
        atoms = slice(arrays["ptr"][i], arrays["ptr"][i + 1])
        of_atoms = {key: arrays[key][atoms] for key in ("tags", "fixed", "forces") if key in arrays}
        prefix = "target:"
        return Structure(
            numbers=arrays["numbers"][atoms].astype(np.int64),
            positions=arrays["positions"][atoms].astype(np.float64),
            cell=arrays["cell"][i] if arrays["pbc"][i].any() else None,
            pbc=arrays["pbc"][i],
            energy=float(arrays["energy"][i]),
            targets={key.removeprefix(prefix): float(arrays[key][i]) for key in arrays if key.startswith(prefix)},
            id=str(arrays["id"][i]),
            **of_atoms,
        )


def demo(name: str, split: Split = "train") -> DemoSet:
    """Read one split of one of the nine embedded demo datasets.

    Energies are in eV, forces in eV/A, positions in A. All have an energy; qm9 has no forces; qm9 and qmof have the
    target "gap" (HOMO-LUMO gap, eV); oc20 and oc22 have tags and fixed atoms.

    Args:
        name: one of DEMO_MIX (for pre-training; train and val) or DEMO_DOWNSTREAM (train, val and test).
        split: "train", "val" or "test".

    Raises:
        ValueError: if there is no such dataset, or it has no such split.
    """
    if name not in DEMO_MIX + DEMO_DOWNSTREAM:
        raise ValueError(f"name: expected one of {', '.join(DEMO_MIX + DEMO_DOWNSTREAM)}, got {name!r}")
    arrays, infos = _load(name)
    if split not in infos:
        raise ValueError(f"split: {name} has {', '.join(infos)}, got {split!r}")
    before = SPLITS[: SPLITS.index(split)]
    return DemoSet(arrays, infos[split], sum(infos[other].count for other in before))


@cache
def _load(name: str) -> tuple[dict[str, Any], dict[str, DatasetInfo]]:
    with np.load(DEMO_FOLDER / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    for array in arrays.values():
        array.flags.writeable = False
    infos = {split: DatasetInfo.from_json(fields) for split, fields in json.loads(arrays.pop("info").item()).items()}
    return arrays, infos
