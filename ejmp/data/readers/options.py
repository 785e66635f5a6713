"""What a reader may be told about a source, and what it reports: which array became which label, what is left out.

A reader that takes options is a `Format` with `configure`. Everything it leaves out or chooses is said once on stderr.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ejmp.data.info import LabelRow
from ejmp.data.readers.units import unit_name

if TYPE_CHECKING:
    from ejmp.graph.structure import Structure

NOT_READ = "not read"
LEFT_OUT = "none"
"""Key by which a label is left out on purpose."""
_MOST_LISTED = 20
Rows = tuple[tuple[str, str, str], ...]
"""What the arrays of a structure became: for each, its name, "atom" or "structure", and the label."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Which arrays of a source are its labels, their units, what its tags mean, and what happens to unreadable files.

    Raises:
        ValueError: naming the option that is impossible.
    """

    energy_key: str | None = None
    """Name of the total energy; "none": leave energies out; None: the names that the format's reader knows."""
    forces_key: str | None = None
    """Name of the forces [n, 3], or of three columns as "fx,fy,fz"; "none": leave forces out; None: as for energy."""
    targets: Mapping[str, str] = field(default_factory=dict)
    """Names of the other labels in the source, and the name that each gets; empty: all single numbers, as named."""
    unit_energy: str | None = None
    """Unit of the energy, a name of ENERGY_UNITS; forces are in it per length; None: as the file or the format says."""
    unit_length: str | None = None
    """Unit of positions and cell, a name of LENGTH_UNITS; None: as the file or the format says."""
    tags: Literal["oc20", "none", "infer"] | None = None
    """What tags are: "oc20": 0 bulk, 1 surface, 2 adsorbate; "none": left out; "infer": made from constraints and
    elements; None: "oc20" for the formats of OC20 and OC22, "none" for every other."""
    on_error: Literal["raise", "skip"] = "raise"
    """What an unreadable file of a folder does: "raise" ends with it, "skip" lists it and goes on without."""

    def __post_init__(self) -> None:
        """Check the options."""
        if self.tags not in (None, "oc20", "none", "infer"):
            raise ValueError(f"tags: expected oc20, none or infer, got {self.tags!r}")
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f'on_error: expected "raise" or "skip", got {self.on_error!r}')
        for kind, unit in (("energy", self.unit_energy), ("length", self.unit_length)):
            if unit is not None:
                unit_name(kind, unit, f"unit_{kind}")
        names = list(self.targets.values())
        twice = sorted({name for name in names if names.count(name) > 1 or name in ("", "energy", "forces")})
        if twice:
            raise ValueError(f"targets: expected a name of its own for each, none energy or forces, got {twice}")

    @property
    def named_labels(self) -> list[str]:
        """Names of the options about labels and units that are set, which only some formats take."""
        names = ("energy_key", "forces_key", "targets", "unit_energy", "unit_length")
        return [name for name in names if getattr(self, name)]


class Survey:
    """What reading a source has found: how many structures had which arrays, and what each array became."""

    def __init__(self, *, quiet: bool = False) -> None:
        """Begin with nothing found.

        Args:
            quiet: whether nothing is written to stderr, as on all ranks but one.
        """
        self.quiet = quiet
        self.skipped: list[tuple[Path, str]] = []
        self._said: set[str] = set()
        self._last: Rows | None = None
        self._counts: Counter[Rows] = Counter()

    def say(self, text: str, once: str = "") -> None:
        """Write a line to stderr, the first time it is said, or the first time that `once` is."""
        if (once or text) not in self._said:
            self._said.add(once or text)
            if not self.quiet:
                sys.stderr.write(f"{text}\n")

    def has_said(self, once: str) -> bool:
        """Return whether what is said once has been said."""
        return once in self._said

    def skip(self, file: Path, problem: str) -> None:
        """Note that a file is left out, and say so."""
        if (file, problem) not in self.skipped:
            self.skipped.append((file, problem))
            self.say(f"left out, {len(self.skipped)} so far: {problem}")

    def saw(self, rows: Rows) -> None:
        """Note what the arrays of the structure became that a reader is about to yield."""
        self._last = rows

    def counted(self, structures: "Iterable[Structure]") -> "Iterator[Structure]":
        """Yield structures, and count those that are taken; of a reader that reports nothing, count the labels."""
        for structure in structures:
            self._counts[_labels_of(structure) if self._last is None else self._last] += 1
            yield structure

    def take(self) -> list[LabelRow]:
        """Return the table of what was counted since the last call."""
        found = [
            LabelRow(array=array, per=per, label=label, structures=count)
            for rows, count in self._counts.items()
            for array, per, label in rows
        ]
        self._counts.clear()
        return join_rows(found)


_SURVEY: ContextVar[Survey | None] = ContextVar("ejmp survey", default=None)


@contextmanager
def surveying(survey: Survey) -> Iterator[None]:
    """Let readers that take no options report to a survey, in the `with` block, what they find."""
    token = _SURVEY.set(survey)
    try:
        yield
    finally:
        _SURVEY.reset(token)


def current_survey() -> Survey:
    """Return the survey that readers report to here, or one that nobody reads."""
    return _SURVEY.get() or Survey()


def report(rows: Rows) -> None:
    """Report what the arrays of the structures that a reader yields from here on became, if anybody surveys."""
    current_survey().saw(rows)


def rows_of(shapes: Mapping[str, tuple[int, ...]], labels: Mapping[str, str], n: int) -> Rows:
    """Return what the arrays of a structure became.

    Args:
        shapes: shape of each array by its name.
        labels: the label that an array became, by its name; all others are not read.
        n: number of atoms.
    """
    return tuple(
        (name, "atom" if n in shape[:2] and n > 1 else "structure", labels.get(name, NOT_READ))
        for name, shape in shapes.items()
    )


def _labels_of(structure: "Structure") -> Rows:
    rows = [("energy", "structure", "energy")] * (structure.energy is not None)
    rows += [(name, "structure", f"target {name}") for name in structure.targets]
    per_atom = [name for name in ("forces", "tags", "fixed") if getattr(structure, name) is not None]
    return (*rows, *((name, "atom", name) for name in per_atom))


def join_rows(rows: Iterable[LabelRow]) -> list[LabelRow]:
    """Return a table in order, in which every array occurs once with each label it became."""
    found: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        found[row.array, row.per, row.label] += row.structures
    order = sorted(found, key=lambda row: (row[2].startswith(NOT_READ), row[1] == "atom", row))
    return [LabelRow(array=a, per=p, label=b, structures=found[a, p, b]) for a, p, b in order]


def table_lines(rows: Iterable[LabelRow]) -> list[str]:
    """Return a table of labels as lines of text; empty if nothing is known."""
    rows = list(rows)
    if not rows:
        return []
    width = min(max(len(row.array) for row in rows), 40)
    label = max(len(row.label) for row in rows)
    lines = [f"{'array':{width}}  per        {'became':{label}}  structures"]
    return lines + [f"{row.array:{width}}  {row.per:9}  {row.label:{label}}  {row.structures:10d}" for row in rows]


def listed(names: Iterable[str]) -> str:
    """Return names as one text, at most so many of them."""
    names = list(names)
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return (", ".join(names[:_MOST_LISTED]) or "none")[:1000] + more
