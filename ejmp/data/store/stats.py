"""Linear reference of the energies, means and standard deviations, from one pass that several processes can share.

The energies' least squares on element counts is done by the triangle R of a QR decomposition of the rows
[counts of each element | 1 | energy]: R has at most as many rows as columns, two of them stacked and decomposed again
are the R of both, and R keeps the condition of the rows where the normal equations would square it. Mean and variance
of what the reference leaves follow from R alone.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ejmp.data.info import Statistics
from ejmp.graph.structure import MAX_ATOMIC_NUMBER, Structure

_ONE, _ENERGY = MAX_ATOMIC_NUMBER + 1, MAX_ATOMIC_NUMBER + 2
_COLUMNS = MAX_ATOMIC_NUMBER + 3
_ROWS = 4096
_SMALLEST = 1e-10
"""Singular values below this share of the largest count as zero: the solution of smallest norm is found."""


class Tally:
    """Running sums over structures, from which statistics follow. Forces on atoms held in place do not count."""

    def __init__(self) -> None:
        self.num_energies = 0
        self._triangle: np.ndarray[Any, Any] = np.zeros((0, _COLUMNS))
        self._rows: list[np.ndarray] = []
        self._forces = np.zeros(2)  # components, sum of squares
        self._targets: dict[str, np.ndarray] = {}  # structures, mean, sum of squared deviations

    def watch(self, structures: Iterable[Structure]) -> Iterator[Structure]:
        """Yield the structures as they come, and add each."""
        for structure in structures:
            self.add(structure)
            yield structure

    def add(self, structure: Structure) -> None:
        """Add a structure to the sums.

        Raises:
            ValueError: if a label is NaN or infinite.
        """
        if structure.energy is not None:
            row = np.bincount(np.asarray(structure.numbers), minlength=_COLUMNS).astype(np.float64)
            row[_ONE], row[_ENERGY] = 1, _finite(structure, "energy", structure.energy)
            self.num_energies += 1
            self._rows.append(row)
            if len(self._rows) == _ROWS:
                self._fold()
        if structure.forces is not None:
            forces = _finite(structure, "forces", structure.forces)
            free = forces if structure.fixed is None else forces[~np.asarray(structure.fixed, bool)]
            self._forces += (free.size, np.sum(free * free))
        for name, value in structure.targets.items():
            self._targets[name] = _joined(self._targets.get(name), np.array([1.0, _finite(structure, name, value), 0]))

    def merge(self, other: "Tally") -> None:
        """Add all structures that another tally has seen."""
        self.num_energies += other.num_energies
        self._rows += [*other._triangle, *other._rows]  # noqa: SLF001
        self._fold()
        self._forces += other._forces  # noqa: SLF001
        for name, moments in other._targets.items():  # noqa: SLF001
            self._targets[name] = _joined(self._targets.get(name), moments)

    def to_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the tally as arrays, for `from_arrays`."""
        self._fold()
        return {
            "num_energies": np.array(self.num_energies),
            "triangle": self._triangle,
            "force_moments": self._forces,
            "target_names": np.array(list(self._targets), dtype=np.str_),
            "target_moments": np.array(list(self._targets.values())).reshape(-1, 3),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray[Any, Any]]) -> "Tally":
        """Return the tally whose `to_arrays` these are."""
        tally = cls()
        tally.num_energies = int(arrays["num_energies"])
        tally._triangle, tally._forces = arrays["triangle"], arrays["force_moments"]
        tally._targets = dict(zip(arrays["target_names"].tolist(), arrays["target_moments"], strict=True))
        return tally

    def linear_reference(self) -> dict[int, float]:
        """Return the energy of each element, eV by atomic number: the least squares solution of smallest norm."""
        elements, energies = self._fit()
        return dict(zip(elements.tolist(), energies.tolist(), strict=True))

    def statistics(self) -> dict[str, Statistics]:
        """Return mean and standard deviation (divided by n, not n - 1) of every label that was seen.

        The linear reference is subtracted from the energy first; the mean of the forces is zero by definition.
        """
        found = {}
        if self.num_energies:
            elements, energies = self._fit()
            rest = self._triangle[:, _ENERGY] - self._triangle[:, elements] @ energies
            mean = float(self._triangle[:, _ONE] @ rest) / self.num_energies
            variance = float(rest @ rest) / self.num_energies - mean**2
            found["energy"] = Statistics(mean=mean, std=max(variance, 0.0) ** 0.5, unit="eV")
        if self._forces[0]:
            found["forces"] = Statistics(mean=0.0, std=float(self._forces[1] / self._forces[0]) ** 0.5, unit="eV/A")
        for name, (count, mean, deviations) in sorted(self._targets.items()):
            found[name] = Statistics(mean=float(mean), std=float(deviations / count) ** 0.5, unit="")
        return found

    def _fit(self) -> tuple[np.ndarray, np.ndarray]:
        self._fold()
        elements = np.flatnonzero(self._triangle[:, :_ONE].any(0))
        energies = np.linalg.lstsq(self._triangle[:, elements], self._triangle[:, _ENERGY], rcond=_SMALLEST)[0]
        return elements, energies

    def _fold(self) -> None:
        """Decompose the rows so far: of the columns of elements that occur, as the others stay zero."""
        if self._rows:
            rows = np.vstack([self._triangle, *self._rows])
            used = np.flatnonzero(rows.any(0))
            triangle = np.asarray(np.linalg.qr(rows[:, used], mode="r"))
            self._triangle = np.zeros((len(triangle), _COLUMNS))
            self._triangle[:, used] = triangle
            self._rows = []


def _finite(structure: Structure, name: str, value: Any) -> np.ndarray[Any, Any]:
    values = np.asarray(value, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{structure.id}: {name}: expected finite numbers, got NaN or infinity")
    return values


def _joined(one: np.ndarray | None, other: np.ndarray) -> np.ndarray:
    """Return count, mean and sum of squared deviations of two groups together (Chan, Golub and LeVeque 1983)."""
    if one is None:
        return other
    count = one[0] + other[0]
    shift = other[1] - one[1]
    mean = one[1] + shift * other[0] / count
    return np.array([count, mean, one[2] + other[2] + shift**2 * one[0] * other[0] / count])
