"""Split labelled structures and write them as one npz."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ejmp.data.embedded import SPLITS
from ejmp.data.info import DatasetInfo, Statistics
from ejmp.graph.build import build_graph
from ejmp.graph.structure import Structure

EDGE_CUTOFF, EDGE_NEIGHBORS = 12.0, 30
"""Cutoff (A) and neighbours at which edges are counted."""


def split_frames(count: int, shares: Mapping[str, float]) -> dict[str, list[int]]:
    """Split the frames of one molecule, shuffled by RandomState(42) as rMD17 and MD22 are; return indices by split."""
    order = np.random.RandomState(42).permutation(count).tolist()
    splits, end = {}, count
    for split, share in shares.items():
        start = end - round(share * count)
        splits[split], end = sorted(order[start:end]), start
    return {"train": sorted(order[:end]), **splits}


def split_by_formula(
    structures: Sequence[Structure], shares: Mapping[str, float], rng: np.random.Generator
) -> dict[str, list[int]]:
    """Split structures so that no formula is in two splits; return indices by split.

    As in ANI-1x, each split but train takes shuffled formulas until it has its share. A formula stays in train where
    one of its elements would be left with fewer than two others there.
    """
    members: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for index, structure in enumerate(structures):
        members.setdefault(tuple(sorted(Counter(structure.numbers.tolist()).items())), []).append(index)
    formulas = [sorted(members)[i] for i in rng.permutation(len(members))]
    left = Counter(number for formula in formulas for number, _ in formula)
    splits: dict[str, list[int]] = {}
    for split, share in shares.items():
        taken: list[int] = []
        for formula in list(formulas):
            if len(taken) >= share * len(structures):
                break
            if all(left[number] > 2 for number, _ in formula):
                formulas.remove(formula)
                left.subtract(number for number, _ in formula)
                taken += members[formula]
        splits[split] = sorted(taken)
    return {"train": sorted(i for formula in formulas for i in members[formula]), **splits}


def linear_reference(structures: Sequence[Structure]) -> dict[int, float]:
    """Return the energy of each element, eV by atomic number: least squares on element counts, of minimum norm."""
    elements = np.unique(np.concatenate([item.numbers for item in structures]))
    fit, *_ = np.linalg.lstsq(_counts(structures, elements), _energies(structures), rcond=None)
    return dict(zip(elements.tolist(), fit.tolist(), strict=True))


def statistics(structures: Sequence[Structure], reference: Mapping[int, float]) -> dict[str, Statistics]:
    """Return statistics of energies less their reference, of targets, and of free atoms' force components about 0."""
    referenced = _counts(structures, np.array(list(reference))) @ np.array(list(reference.values()))
    energy = _energies(structures) - referenced
    found = {"energy": Statistics(mean=float(energy.mean()), std=float(energy.std()), unit="eV")}
    if structures[0].forces is not None:
        free = [item.forces if item.fixed is None else item.forces[~item.fixed] for item in structures]
        components = np.concatenate(free).astype(np.float64)
        found["forces"] = Statistics(mean=0.0, std=float(np.sqrt(np.mean(components**2))), unit="eV/A")
    for name in structures[0].targets:
        values = [item.targets[name] for item in structures]
        found[name] = Statistics(mean=float(np.mean(values)), std=float(np.std(values)), unit="eV")
    return found


def write(
    path: Path, structures: Sequence[Structure], splits: Mapping[str, Sequence[int]], info: DatasetInfo
) -> dict[str, DatasetInfo]:
    """Write train, val and test one after the other, and return the information on each.

    The file has, of all atoms of all structures, `numbers` (uint8), `positions` and `forces` (float32), `tags`,
    `fixed`; of all structures `ptr` (their first atoms), `energy`, `cell`, `pbc`, `id`, `num_edges` (12 A, 30
    neighbours), `target:NAME`; and `info`, JSON by split.

    Args:
        path: the npz file.
        structures: the structures of all splits.
        splits: the indices of the structures by split.
        info: name, format, source and licence; the other fields are filled in here.
    """
    train = [structures[i] for i in splits["train"]]
    reference = linear_reference(train)
    info = replace(info, linear_reference=reference, statistics=statistics(train, reference))
    infos = {split: replace(info, split=split, count=len(splits[split])) for split in SPLITS if split in splits}
    ordered = [structures[i] for split in infos for i in splits[split]]
    fields = json.dumps({split: asdict(one) for split, one in infos.items()})
    np.savez_compressed(path, info=np.array(fields), **_arrays(ordered))
    return infos


def _counts(structures: Sequence[Structure], elements: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.array([(item.numbers[:, None] == elements).sum(axis=0) for item in structures], dtype=np.float64)


def _energies(structures: Sequence[Structure]) -> np.ndarray[Any, Any]:
    return np.array([item.energy for item in structures], dtype=np.float64)


def _arrays(ordered: Sequence[Structure]) -> dict[str, Any]:
    arrays = {
        "ptr": np.cumsum([0, *(len(item.numbers) for item in ordered)]),
        "numbers": np.concatenate([item.numbers for item in ordered]).astype(np.uint8),
        "positions": np.concatenate([item.positions for item in ordered]).astype(np.float32),
        "energy": _energies(ordered),
        "cell": np.stack([item.cell for item in ordered]),
        "pbc": np.stack([item.pbc for item in ordered]),
        "id": np.array([item.id for item in ordered]),
        "num_edges": np.array([build_graph(item, EDGE_CUTOFF, EDGE_NEIGHBORS).main.num_edges for item in ordered]),
    }
    first = ordered[0]
    for key, kind in (("forces", np.float32), ("tags", np.uint8), ("fixed", np.bool_)):
        if getattr(first, key) is not None:
            arrays[key] = np.concatenate([getattr(item, key) for item in ordered]).astype(kind)
    for name in first.targets:
        arrays[f"target:{name}"] = np.array([item.targets[name] for item in ordered])
    return arrays
