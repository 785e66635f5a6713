"""Which structures of a source belong to which split, by the rules of the JMP paper's code.

The structures of a source are numbered through its parts in order. A random rule shuffles these numbers with
`numpy.random.RandomState(42)` and cuts the result: training, then validation, then test. Where the rules leave
something open, this is what was chosen:

- fractions of 80/10/10 are rounded down for training and test, and validation has the rest;
- of ANI-1x, JMP drew the formulas with an unknown seed. Here they are shuffled like everything else, in the order they
  have in the source; validation takes the first until it has 495,600 frames, then test, and training has the rest. Of a
  source with fewer than 4,956,000 frames both take a tenth;
- rMD17 and MD22 are one molecule per file; of a folder, each file is divided by itself;
- in a split, structures keep the order of the source.

Readers name a part FILE:START-STOP, FILE@PLACE:START-STOP or GROUP:START-STOP; this is where files and formulas are
read from.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ejmp.data.readers.format import Part

SEED = 42
ANI1X_FRAMES = 495_600
QM9_HELD_OUT = 10_000
RMD17_TRAIN, RMD17_VAL = 950, 50
MD22_TRAIN = {
    "Ac-Ala3-NHMe": 6000,
    "DHA": 8000,
    "stachyose": 8000,
    "AT-AT": 3000,
    "AT-AT-CG-CG": 2000,
    "buckyball-catcher": 600,
    "double-walled_nanotube": 800,
}
"""Frames of training and validation together; validation is 5% of them."""

Sizes = Callable[[int, str], tuple[int, int]]
"""How many of so many structures, of a source or file of that name, are for training and validation."""
_FILE, _GROUP = re.compile("[:@]"), re.compile(":")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The structures of one part that belong to a split."""

    part: Part
    indices: Sequence[int]
    """Ascending, within the part."""


def choose(format: str, parts: Sequence[Part], source_name: str) -> dict[str, list[Chosen]]:  # noqa: A002
    """Divide a source into splits by the rule of its format, or as its parts say where there is none.

    Args:
        format: a name of `ejmp.data.read.FORMATS`.
        parts: all parts of the source, in order.
        source_name: what to call the source in messages.

    Returns:
        by split what belongs to it, without splits that would be empty.

    Raises:
        ValueError: if the rule cannot be followed: too few structures, an unknown molecule, a part without a split.
    """
    if not any(part.count for part in parts):
        raise ValueError(f"{source_name}: expected structures, got none")
    if format == "ani1x":
        chosen = _by_formula(parts)
    elif format in _BY_FILE:
        chosen: dict[str, list[Chosen]] = {}
        for file, members in _grouped(parts, _FILE).items():
            for split, pieces in _at_random(members, file, _BY_FILE[format]).items():
                chosen.setdefault(split, []).extend(pieces)
    elif format in _BY_SOURCE:
        chosen = _at_random(parts, source_name, _BY_SOURCE[format])
    else:
        chosen = _given(parts, source_name)
    return {split: pieces for split, pieces in chosen.items() if pieces}


def choose_all(parts: Sequence[Part], split: str) -> dict[str, list[Chosen]]:
    """Put a whole source into one split."""
    return {split: [Chosen(part=part, indices=range(part.count)) for part in parts if part.count]}


def _given(parts: Sequence[Part], source_name: str) -> dict[str, list[Chosen]]:
    chosen: dict[str, list[Chosen]] = {}
    for part in parts:
        if part.split is None:
            raise ValueError(f"split: {source_name} does not say what split {part.name} belongs to; name one")
        if part.count:
            chosen.setdefault(part.split, []).append(Chosen(part=part, indices=range(part.count)))
    return chosen


def _grouped(parts: Sequence[Part], name: re.Pattern[str]) -> dict[str, list[Part]]:
    """Return the parts by the beginning of their names, in order of first appearance."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(name.split(part.name, maxsplit=1)[0], []).append(part)
    return groups


def _at_random(parts: Sequence[Part], name: str, sizes: Sizes) -> dict[str, list[Chosen]]:
    total = sum(part.count for part in parts)
    order = np.arange(total)
    np.random.RandomState(SEED).shuffle(order)
    train, val = sizes(total, name)
    cuts = {"train": order[:train], "val": order[train : train + val], "test": order[train + val :]}
    return {split: _locate(parts, numbers) for split, numbers in cuts.items()}


def _by_formula(parts: Sequence[Part]) -> dict[str, list[Chosen]]:
    formulas = _grouped(parts, _GROUP)
    names = np.array(list(formulas))
    np.random.RandomState(SEED).shuffle(names)
    wanted = min(ANI1X_FRAMES, sum(part.count for part in parts) // 10)
    split_of, held_out = {}, {"val": 0, "test": 0}
    for name in names.tolist():
        split = next((split for split, frames in held_out.items() if frames < wanted), "train")
        split_of[name] = split
        if split != "train":
            held_out[split] += sum(part.count for part in formulas[name])
    chosen: dict[str, list[Chosen]] = {"train": [], "val": [], "test": []}
    for name, members in formulas.items():
        chosen[split_of[name]] += choose_all(members, "")[""]
    return chosen


def _locate(parts: Sequence[Part], numbers: np.ndarray) -> list[Chosen]:
    """Return where the structures of these numbers are, in the order of the source."""
    ends = np.cumsum([part.count for part in parts])
    numbers = np.sort(numbers)
    cuts = np.searchsorted(numbers, ends)
    chosen, first = [], 0
    for part, end, cut in zip(parts, ends.tolist(), cuts.tolist(), strict=True):
        if cut > first:
            chosen.append(Chosen(part=part, indices=numbers[first:cut] - (end - part.count)))
        first = cut
    return chosen


def _fractions(total: int, _: str) -> tuple[int, int]:
    train, test = int(total * 0.8), int(total * 0.1)
    return train, total - train - test


def _rmd17(total: int, source_name: str) -> tuple[int, int]:
    _need(RMD17_TRAIN + RMD17_VAL, total, source_name)
    return RMD17_TRAIN, RMD17_VAL


def _md22(total: int, source_name: str) -> tuple[int, int]:
    molecule = source_name.removeprefix("md22_").removesuffix(".npz").removesuffix(".xyz")
    if molecule not in MD22_TRAIN:
        raise ValueError(f"{source_name}: expected md22_MOLECULE.npz, MOLECULE one of {', '.join(MD22_TRAIN)}")
    both = MD22_TRAIN[molecule]
    _need(both, total, source_name)
    val = int(both * 0.05)
    return both - val, val


def _qm9(total: int, source_name: str) -> tuple[int, int]:
    _need(2 * QM9_HELD_OUT + 1, total, source_name)
    return total - 2 * QM9_HELD_OUT, QM9_HELD_OUT


def _need(least: int, total: int, source_name: str) -> None:
    if total < least:
        raise ValueError(f"{source_name}: its split rule needs {least} structures, got {total}; name a split for all")


_BY_FILE: Mapping[str, Sizes] = {"rmd17": _rmd17, "md22": _md22}
_BY_SOURCE: Mapping[str, Sizes] = {"spice": _fractions, "qm9": _qm9, "qmof": _fractions}
