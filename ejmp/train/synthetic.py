"""More structures to distil on: walks with the teacher's forces, which begin at training structures."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import distributed as dist

from ejmp.data import convert
from ejmp.data.readers.validation import checking
from ejmp.data.sampling.loader import Dataset
from ejmp.data.store.dataset import open_store
from ejmp.data.store.writers import Writers
from ejmp.graph.structure import Structure
from ejmp.model.jmp import JMP
from ejmp.predict.dynamics import Dynamics
from ejmp.predict.dynamics import run as move
from ejmp.train.distributed import Ranks
from ejmp.train.sources import TaskData

FRAMES = 10
"""Frames of each walk, its beginning included."""
EVERY = 20
"""Steps of half a femtosecond from one frame to the next."""
JITTER = 0.03
"""Standard deviation of what the atoms of a beginning are moved by along each axis, A."""


def with_synthetic(
    sources: Sequence[TaskData],
    teacher: JMP,
    folder: Path,
    count: int,
    ranks: Ranks,
    *,
    temperature: float = 300.0,
    seed: int = 0,
) -> list[TaskData]:
    """Return sources whose training split has more structures, with the teacher's energies and forces as labels.

    Each of them is a frame of a short walk at constant temperature (Langevin, by ASE) with the teacher's forces; walks
    begin at training structures, jittered a little. Frames with atoms on top of each other, where a teacher has led a
    walk astray, are left out, and said. The frames are kept in `folder`, as extended XYZ and as record
    stores, and are not made again if they are there.

    Args:
        sources: datasets with a split "train", and tasks that the teacher has too.
        teacher: model that moves the atoms; its tasks are in eV.
        folder: for the frames.
        count: structures to add to each source, at most.
        ranks: this process among all; the first one makes the frames.
        temperature: of the walks, K.
        seed: seed of the beginnings, the jitter and the walks.

    Raises:
        ValueError: if a task's target is not an energy.
        ImportError: if ASE is not installed.
    """
    found = []
    for source in sources:
        store = folder / source.name
        made = (store / "train").exists()  # of a run that is resumed
        if not made and ranks.rank == 0:
            _walk(source, teacher, folder / f"{source.name}.extxyz", count, temperature, seed)
        dist.barrier()
        if not made and (ranks.rank == 0 or Writers().size > 1):
            with checking(on_error="skip"):
                convert(folder / f"{source.name}.extxyz", store, format="ase", split="train", licence="not stated")
        dist.barrier()
        more = _Together(source.split("train"), open_store(store / "train"))
        found.append(dataclasses.replace(source, splits={**source.splits, "train": more}))
    return found


def _walk(source: TaskData, teacher: JMP, path: Path, count: int, temperature: float, seed: int) -> None:
    """Write so many frames of walks to a file."""
    import ase.constraints  # noqa: PLC0415

    from ejmp.predict.calculator import Calculator  # noqa: PLC0415

    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    random = np.random.default_rng(seed)
    data, calculator = source.split("train"), Calculator(teacher, source.name)
    for first in range(0, count, FRAMES):
        structure = data[int(random.integers(len(data)))]
        atoms = ase.Atoms(structure.numbers, structure.positions, tags=structure.tags)
        if structure.pbc.any():
            atoms.set_cell(structure.cell)
            atoms.pbc = structure.pbc
        atoms.positions += random.normal(scale=JITTER, size=atoms.positions.shape)
        if structure.fixed is not None:
            atoms.set_constraint(ase.constraints.FixAtoms(mask=structure.fixed))
        atoms.calc = calculator
        asked = Dynamics(
            ensemble="nvt",
            temperature=temperature,
            steps=max(1, EVERY * (min(FRAMES, count - first) - 1)),
            every=EVERY,
            seed=int(random.integers(2**31)),
        )
        move(atoms, asked, path, report=lambda _line: None)


class _Together:
    """Two datasets, one after the other; what is known of the whole is what is known of the first."""

    def __init__(self, first: Dataset, second: Dataset) -> None:
        self._parts = first, second
        self.info = dataclasses.replace(first.info, count=len(first) + len(second))
        self.num_atoms = np.concatenate([first.num_atoms, second.num_atoms])
        self.num_edges = np.concatenate([first.num_edges, second.num_edges])

    def __len__(self) -> int:
        return self.info.count

    def __getitem__(self, index: int) -> Structure:
        first, second = self._parts
        return first[index] if index < len(first) else second[index - len(first)]
