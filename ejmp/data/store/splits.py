"""Which structures of a source belong to which split, by the rules in the catalogue (those of the JMP paper's code).

The structures of a source are numbered through its parts in order. A random rule shuffles these numbers with
`numpy.random.RandomState(42)` and cuts the result: training, then validation, then test. Where the published rules
leave something open, this is what was chosen:

- fractions of 80/10/10 are rounded down for training and test, and validation has the rest;
- of ANI-1x, JMP drew the formulas with an unknown seed. Here they are shuffled like everything else, in the order they
  have in the source; validation takes the first until it has 495,600 frames, then test, and training has the rest. Of a
  source with fewer than 4,956,000 frames both take a tenth;
- rMD17 and MD22 are one molecule per file; of a folder, each file is divided by itself;
- in a split, structures keep the order of the source;
- files of a user's own are divided so that no split knows the others' structures almost by heart: see
  `choose_groups`.

Readers name a part FILE:START-STOP, FILE@PLACE:START-STOP or GROUP:START-STOP; the files and formulas of these rules
are what comes before the first ":" or "@".
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ejmp.catalog import (
    CATALOG,
    FileSplit,
    FormulaSplit,
    FractionSplit,
    HeldOutSplit,
    MoleculeSplit,
    PublishedSplit,
)
from ejmp.data.readers.format import Part

SEED = 42
LEAST_FRAMES = 10
"""Fewest frames that are divided, and fewest compositions of which whole ones are held out."""
BLOCKS = 20
"""Blocks of successive frames that each of few compositions is cut into."""
_FILE, _GROUP = re.compile("[:@]"), re.compile(":")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The structures of one part that belong to a split."""

    part: Part
    """Part of the source."""
    indices: Sequence[int]
    """Numbers of the structures within the part, ascending."""


def choose(format: str, parts: Sequence[Part], source_name: str) -> dict[str, list[Chosen]]:  # noqa: A002
    """Divide a source into splits by the rule its dataset has in the catalogue.

    Sources of a format that is not in the catalogue are divided as their parts say.

    Args:
        format: a name of `ejmp.data.read.FORMATS`, or any other.
        parts: all parts of the source, in order.
        source_name: what to call the source in messages.

    Returns:
        What belongs to each split, by the split's name, without splits that would be empty.

    Raises:
        ValueError: if the rule cannot be followed: too few structures, an unknown molecule, a part without a split.
    """
    if not any(part.count for part in parts):
        raise ValueError(f"{source_name}: expected structures, got none")
    match CATALOG[format].split if format in CATALOG else PublishedSplit():
        case PublishedSplit():
            chosen = _as_published(parts, source_name)
        case FormulaSplit() as rule:
            chosen = _by_formula(parts, rule)
        case FileSplit() | MoleculeSplit() as rule:
            chosen: dict[str, list[Chosen]] = {}
            for file, members in _grouped(parts, _FILE).items():
                for split, pieces in _at_random(members, file, rule).items():
                    chosen.setdefault(split, []).extend(pieces)
        case FractionSplit() | HeldOutSplit() as rule:
            chosen = _at_random(parts, source_name, rule)
    return {split: pieces for split, pieces in chosen.items() if pieces}


def choose_groups(formulas: Sequence[str], parts: Sequence[Part], source_name: str) -> dict[str, list[Chosen]]:
    """Divide frames of a user's own: 80% for training, and 10% each for validation and testing.

    Frames of one composition that follow each other may be steps of one trajectory, and almost equal. So whole
    compositions are held out where there are many; where there are few, each one's frames are cut into blocks of
    successive ones and whole blocks are held out. Which ones is random, with a fixed seed.

    Args:
        formulas: chemical formula of each structure, in the order of the source.
        parts: all parts of the source, in order.
        source_name: what to call the source in messages.

    Raises:
        ValueError: for fewer frames than can be divided.
    """
    _need(LEAST_FRAMES, len(formulas), source_name)
    count = Counter(formulas)
    blocks = 1 if len(count) >= LEAST_FRAMES else BLOCKS
    seen = dict.fromkeys(count, 0)
    groups: dict[tuple[str, int], list[int]] = {}
    for number, formula in enumerate(formulas):
        groups.setdefault((formula, seen[formula] * blocks // count[formula]), []).append(number)
        seen[formula] += 1
    members = list(groups.values())
    order = np.arange(len(members))
    np.random.RandomState(SEED).shuffle(order)
    numbers: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for group in order.tolist():
        split = next((name for name in ("val", "test") if len(numbers[name]) < len(formulas) // 10), "train")
        numbers[split] += members[group]
    if not numbers["train"]:
        raise ValueError(f"{source_name}: too few groups of frames to divide; say --split for each file")
    return {split: _locate(parts, np.array(found)) for split, found in numbers.items()}


def choose_all(parts: Sequence[Part], split: str) -> dict[str, list[Chosen]]:
    """Put a whole source into one split."""
    return {split: [Chosen(part=part, indices=range(part.count)) for part in parts if part.count]}


def _as_published(parts: Sequence[Part], source_name: str) -> dict[str, list[Chosen]]:
    chosen: dict[str, list[Chosen]] = {}
    for part in parts:
        if part.split is None:
            raise ValueError(
                f"split: {source_name} does not say what split {part.name} belongs to; say --split train, val or test"
            )
        if part.count:
            chosen.setdefault(part.split, []).append(Chosen(part=part, indices=range(part.count)))
    return chosen


def _grouped(parts: Sequence[Part], end_of_name: re.Pattern[str]) -> dict[str, list[Part]]:
    """Return the parts by the beginning of their names, in order of first appearance."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(end_of_name.split(part.name, maxsplit=1)[0], []).append(part)
    return groups


def _at_random(
    parts: Sequence[Part], name: str, rule: FileSplit | MoleculeSplit | FractionSplit | HeldOutSplit
) -> dict[str, list[Chosen]]:
    """Shuffle the structures of some parts, those of a source or file of that name, and cut them by a rule."""
    total = sum(part.count for part in parts)
    order = np.arange(total)
    np.random.RandomState(SEED).shuffle(order)
    train, val = _sizes(rule, total, name)
    cuts = {"train": order[:train], "val": order[train : train + val], "test": order[train + val :]}
    return {split: _locate(parts, numbers) for split, numbers in cuts.items()}


def _sizes(rule: FileSplit | MoleculeSplit | FractionSplit | HeldOutSplit, total: int, name: str) -> tuple[int, int]:
    """Return how many of so many structures are for training and for validation.

    Raises:
        ValueError: if there are too few of them, or the file is of an unknown molecule.
    """
    match rule:
        case FractionSplit():
            train, test = int(total * rule.train), int(total * rule.test)
            return train, total - train - test
        case HeldOutSplit():
            _need(rule.val + rule.test + 1, total, name)
            return total - rule.val - rule.test, rule.val
        case FileSplit():
            _need(rule.train + rule.val, total, name)
            return rule.train, rule.val
        case MoleculeSplit():
            molecule = name.removeprefix("md22_").removesuffix(".npz").removesuffix(".xyz")
            if molecule not in rule.sizes:
                known = ", ".join(rule.sizes)
                raise ValueError(
                    f"{name}: expected md22_MOLECULE.npz, MOLECULE one of {known}; for a molecule of your own, "
                    "say --split train, val or test, which all of it goes to"
                )
            _need(rule.sizes[molecule], total, name)
            val = int(rule.sizes[molecule] * rule.val)
            return rule.sizes[molecule] - val, val


def _need(least: int, total: int, source_name: str) -> None:
    if total < least:
        raise ValueError(
            f"{source_name}: its split rule needs {least} structures, got {total}; `ejmp data convert "
            "--split NAME` says which one all of it goes to"
        )


def _by_formula(parts: Sequence[Part], rule: FormulaSplit) -> dict[str, list[Chosen]]:
    formulas = _grouped(parts, _GROUP)
    names = np.array(list(formulas))
    np.random.RandomState(SEED).shuffle(names)
    wanted = min(rule.held_out, sum(part.count for part in parts) // 10)
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
