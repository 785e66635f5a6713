"""How graphs are made of structures: the settings that belong to a model as much as its weights do."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

MAX_CUTOFF, MAX_NEIGHBORS = 1_000.0, 1_000_000
"""Largest cutoff (A) and number of neighbours that are accepted."""
MAX_PAIRS = 100_000_000
"""Most pairs of atoms within the cutoff that the structures of one graph may have. They are estimated from how densely
atoms lie, before the search takes any time or memory; it needs up to 150 bytes for each."""


def max_pairs() -> int:
    """Return MAX_PAIRS, or what the environment variable EJMP_MAX_PAIRS says instead.

    Raises:
        ValueError: if that is not a positive number.
    """
    given = os.environ.get("EJMP_MAX_PAIRS", "").strip()
    if not given:
        return MAX_PAIRS
    try:
        number = int(float(given))
    except (ValueError, OverflowError):
        number = 0
    if not 0 < number < 1 << 60:
        raise ValueError(f"EJMP_MAX_PAIRS: expected a positive number, got {given!r}")
    return number


@dataclass(frozen=True, kw_only=True)
class GraphSettings:
    """How graphs are made of structures. Defaults are those of JMP for catalysts (12 A, 30 neighbours).

    A JMP model has one cutoff and one number of neighbours k per dataset: the three smaller or larger edge sets share
    the cutoff and keep int(k*20/30), int(k*8/30) and int(k*1000/30) neighbours (GemNet-OC, arXiv 2204.02782). Models of
    fairchem 1.x have four independent pairs of numbers, the pairs of atoms with the largest ones: main, atom and quad
    edges are chosen from these pairs.

    Raises:
        ValueError: naming the setting that is out of range.
    """

    cutoff: float = 12.0
    """Longest main edge, A."""
    max_neighbors: int = 30
    """Most main edges into one atom, before each edge gets its counter-edge."""
    fewer_above: tuple[tuple[int, int], ...] = ()
    """Pairs of a number of atoms and the `max_neighbors` that larger structures get instead, in ascending order."""
    atom_edges: tuple[float, int] | None = None
    """Cutoff (A) and number of neighbours of the edges between atoms and edges; None: as JMP derives them."""
    quad_edges: tuple[float, int] | None = None
    """Cutoff (A) and number of neighbours of the middle edges of quadruplets; None: as JMP derives them."""
    atom_pairs: tuple[float, int] | None = None
    """Cutoff (A) and number of neighbours of the pairs of atoms; None: as JMP derives them."""
    quad_tags: tuple[int, ...] = (1, 2)
    """Tags of the atoms around which quadruplets are formed."""
    tags: Literal["oc20", "none"] = "oc20"
    """What tags mean: "oc20": 0 bulk, 1 surface, 2 adsorbate or molecule (structures without tags: 2); "none": the
    model was trained without tags, so every atom counts as 2 whatever the structure says."""
    periodic: Literal["given", "all"] = "given"
    """Periodic directions: those the structure names, or every one that has a lattice vector (fairchem 1.x)."""
    ties: Literal["cut", "keep"] = "cut"
    """What happens at the distance where the number of neighbours is reached: "cut" keeps exactly the number (JMP);
    "keep" keeps all that are at most 0.01 A farther than the first one beyond it, so that no shell of a perfect crystal
    is cut in two (fairchem's `enforce_max_neighbors_strictly: false`, which for pairs compares squares, with 0.01 A^2).
    """

    def __post_init__(self) -> None:
        """Check the settings."""
        pairs = {"cutoff, max_neighbors": (self.cutoff, self.max_neighbors)}
        pairs |= {name: getattr(self, name) for name in ("atom_edges", "quad_edges", "atom_pairs")}
        for name, pair in pairs.items():
            if pair is not None:
                _check_reach(name, *pair)
        for atoms, neighbors in self.fewer_above:
            if atoms < 1 or neighbors < 1:
                raise ValueError(f"GraphSettings.fewer_above: expected positive numbers, got {self.fewer_above}")
        if sorted(self.fewer_above) != list(self.fewer_above):
            raise ValueError(f"GraphSettings.fewer_above: expected ascending numbers of atoms, got {self.fewer_above}")
        for num_atoms in (1, *(atoms + 1 for atoms, _ in self.fewer_above)):
            _check_nested(*self.reach(num_atoms))
        if not set(self.quad_tags) <= {0, 1, 2}:
            raise ValueError(f"GraphSettings.quad_tags: expected some of 0, 1, 2, got {self.quad_tags}")
        choices = {"tags": ("oc20", "none"), "periodic": ("given", "all"), "ties": ("cut", "keep")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"GraphSettings.{name}: expected one of {allowed}, got {getattr(self, name)!r}")

    def neighbors_of(self, num_atoms: int) -> int:
        """Return the most main edges into one atom of a structure with that many atoms."""
        fewer = [neighbors for atoms, neighbors in self.fewer_above if num_atoms > atoms]
        return fewer[-1] if fewer else self.max_neighbors

    def reach(self, num_atoms: int) -> list[tuple[float, int]]:
        """Return cutoff (A) and number of neighbours of pairs, main, atom and quad edges of a structure, in this order.

        Args:
            num_atoms: number of atoms of the structure.
        """
        k = self.neighbors_of(num_atoms)
        derived = ((self.atom_pairs, 1000), (None, 30), (self.atom_edges, 20), (self.quad_edges, 8))
        return [(self.cutoff, k * share // 30) if pair is None else pair for pair, share in derived]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Return the settings whose fields JSON has kept, with lists for tuples.

        Raises:
            TypeError: for a field that does not exist.
            ValueError: for a value out of range.
        """
        return cls(**{name: _tuples(value) for name, value in fields.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _check_reach(name: str, cutoff: float, neighbors: int) -> None:
    """Raise ValueError if a cutoff or a number of neighbours is out of range."""
    number = isinstance(cutoff, int | float) and not isinstance(cutoff, bool) and math.isfinite(cutoff)
    if not number or not 0 < cutoff <= MAX_CUTOFF:
        raise ValueError(f"GraphSettings.{name}: expected a cutoff up to {MAX_CUTOFF:g} A, got {cutoff!r}")
    if type(neighbors) is not int or not 0 < neighbors <= MAX_NEIGHBORS:
        raise ValueError(f"GraphSettings.{name}: expected 1..{MAX_NEIGHBORS} neighbours, got {neighbors!r}")


def _check_nested(pairs: tuple[float, int], *others: tuple[float, int]) -> None:
    """Raise ValueError if an edge set reaches farther than the pairs that it is chosen from."""
    if any(cutoff > pairs[0] or neighbors > pairs[1] for cutoff, neighbors in others):
        raise ValueError(
            f"GraphSettings.atom_pairs: expected the largest cutoff and number of neighbours, got {pairs} "
            f"beside main, atom and quad edges {others}"
        )
