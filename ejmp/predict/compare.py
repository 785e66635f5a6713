"""Two models on the same structures: how far apart they are, and how far from labels."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ejmp.markdown import markdown_table
from ejmp.predict.predictor import Prediction


@dataclass
class Comparison:
    """Predictions of two models, and labels, gathered structure by structure."""

    names: tuple[str, str]
    """Names of the two models."""
    atoms: list[int] = field(default_factory=list)
    """Number of atoms of each structure."""
    energies: dict[str, list[float]] = field(default_factory=dict)
    """Energy of each structure, eV, by model or "labels"; NaN where there is none."""
    forces: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Forces of each structure, [n, 3], eV/A, likewise."""

    def add(self, atoms: Any, predictions: Sequence[Prediction]) -> None:
        """Add a structure with the predictions of both models."""
        self.atoms.append(len(atoms))
        labels = atoms.calc.results if atoms.calc is not None else {}
        empty = np.full((len(atoms), 3), np.nan)
        rows = [(name, found.energy, found.forces) for name, found in zip(self.names, predictions, strict=True)]
        for name, energy, forces in [*rows, ("labels", labels.get("energy", np.nan), labels.get("forces"))]:
            self.energies.setdefault(name, []).append(float(energy))
            self.forces.setdefault(name, []).append(empty if forces is None else np.asarray(forces))

    def result(self) -> dict[str, Any]:
        """Return mean absolute differences of every pair that has something to compare, ready for JSON."""
        pairs = [self.names, *((name, "labels") for name in self.names)]
        rows = [{"model": a, "against": b, **self._errors(a, b)} for a, b in pairs]
        return {"structures": len(self.atoms), "rows": [row for row in rows if len(row) > 2]}

    def _errors(self, a: str, b: str) -> dict[str, float]:
        energy = np.subtract(self.energies[a], self.energies[b])
        known = ~np.isnan(energy)
        forces = self._components(a) - self._components(b)
        found = {}
        if known.any():
            found["energy_meV"] = 1e3 * float(np.abs(energy[known]).mean())
            found["energy_meV_per_atom"] = 1e3 * float(np.abs(energy / self.atoms)[known].mean())
        if not np.isnan(forces).all():
            found["forces_meV_per_A"] = 1e3 * float(np.nanmean(np.abs(forces)))
        return found

    def _components(self, name: str) -> np.ndarray:
        return np.concatenate(self.forces[name]).ravel()

    def picture(self, path: Path) -> None:
        """Draw energies per atom and force components of the first model over those of the second.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        import matplotlib as mpl  # noqa: PLC0415

        mpl.use("Agg")
        import matplotlib.pyplot as plt  # noqa: PLC0415

        small, full = self.names
        panels = [("energy, eV per atom", [np.divide(self.energies[name], self.atoms) for name in self.names])]
        forces = [self._components(name) for name in self.names]
        if not any(np.isnan(values).all() for values in forces):
            panels.append(("force components, eV/A", forces))
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4.5 * len(panels), 4.5), layout="constrained", squeeze=False
        )
        for ax, (title, (y, x)) in zip(axes[0], panels, strict=True):
            ends = [float(np.nanmin([x, y])), float(np.nanmax([x, y]))]
            ax.plot(ends, ends, color="gray", linewidth=0.8)
            ax.plot(x, y, ".", markersize=3)
            ax.set(xlabel=full, ylabel=small, title=title)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def table(result: dict[str, Any]) -> str:
    """Return what `Comparison.result` gives as a Markdown table."""
    columns = ("energy_meV", "energy_meV_per_atom", "forces_meV_per_A")
    rows = (
        [row["model"], row["against"], *(f"{row[name]:.4g}" if name in row else "-" for name in columns)]
        for row in result["rows"]
    )
    return markdown_table(["model", "against", *columns], rows, numbers=True)
