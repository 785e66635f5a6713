"""The plan of a conversion: which structures go into which split and shard.

A plan follows from the source alone, so that any number of processes comes to the same shards.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ejmp.data.readers.format import Format
from ejmp.data.store.splits import Chosen, choose, choose_all, choose_groups
from ejmp.graph.structure import Structure

OWN = "ase"
"""Format of files of a user's own, which no published rule divides."""


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """What goes into the shards of one split."""

    split: str
    """Name of the split."""
    folder: Path
    """Folder of the split."""
    chosen: Sequence[Chosen]
    """Structures of the split, by part of the source."""
    count: int
    """Number of structures."""
    shard_size: int
    """Structures per shard."""
    digest: str
    """Hash of everything that decides what the shards hold."""

    @property
    def num_shards(self) -> int:
        """Number of shards; all but the last are full."""
        return -(-self.count // self.shard_size)

    def first(self, shard: int) -> int:
        """Return the number of the first structure of a shard; of the one after the last, the count."""
        return min(shard * self.shard_size, self.count)


def plan_splits(
    source: Path, dest: Path, reader: Format, name: str, split: str | None, shard_size: int, chosen_by: str = ""
) -> list[SplitPlan]:
    """Decide what goes into each split.

    Args:
        source: the dataset in its original form.
        dest: the folder that the folders of the splits are in.
        reader: the format of the source.
        name: the name of the format.
        split: the split that all of the source goes to; None: as the rule of the format says.
        shard_size: structures per shard.
        chosen_by: text that differs where options make other structures of the same source.

    Raises:
        ValueError: if the source has no structures, its split rule cannot be followed, or shard_size < 1.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size: expected 1 or more, got {shard_size}")
    parts = reader.parts(source)
    if split is not None:
        by_split = choose_all(parts, split)
    elif name == OWN:
        formulas = [_formula(structure) for part in parts for structure in reader.read(source, part)]
        by_split = choose_groups(formulas, parts, source.name)
    else:
        by_split = choose(name, parts, source.name)
    plans = []
    for split_name, chosen in by_split.items():
        state = hashlib.blake2b(f"{name} {shard_size}{chosen_by}".encode(), digest_size=8)
        for piece in chosen:
            state.update(f"\0{piece.part.name}\0{piece.part.count}\0".encode())
            whole = isinstance(piece.indices, range)
            state.update(b"all" if whole else np.asarray(piece.indices, "<i8").tobytes())
        plans.append(
            SplitPlan(
                split=split_name,
                folder=dest / split_name,
                chosen=chosen,
                count=sum(len(piece.indices) for piece in chosen),
                shard_size=shard_size,
                digest=state.hexdigest(),
            )
        )
    if not any(plan.count for plan in plans):
        raise ValueError(f"{source}: expected structures, got none")
    return plans


def _formula(structure: Structure) -> str:
    """Return a text that is the same for structures of the same elements in the same numbers."""
    return str(np.unique(np.asarray(structure.numbers), return_counts=True))
