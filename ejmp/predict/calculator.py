"""A model as a calculator of ASE, the Atomic Simulation Environment (https://ase-lib.org)."""

import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from ejmp.data.readers.files import import_optional
from ejmp.graph.build import build_graph
from ejmp.graph.graph import AtomGraph
from ejmp.graph.shells import cut_shells
from ejmp.graph.structure import TAGS, Structure, are_layer_numbers
from ejmp.model.config import Precision
from ejmp.model.jmp import JMP
from ejmp.predict.predictor import VOIGT, prepare
from ejmp.predict.quantities import ForceKind, choose_forces, quantities

ase = import_optional("ase.calculators.calculator", extra="ase")


class Calculator(ase.Calculator):
    """Energy, forces, stress and energies per atom of `ase.Atoms`, in eV and A.

        atoms.calc = ejmp.Calculator("runs/finetune/final")

    The graph is built anew for every structure: the nearest neighbours change too often for a list with a skin, and
    building it takes no longer than choosing among such a list's candidates. The stress is the derivative of the energy
    by the strain of the cell, also where forces are predicted directly.

    Args:
        model: a model, or what `ejmp.load` reads.
        task: name of one of its tasks, such as "oc20"; None is enough if there is only one.
        forces: "direct" by the force branch, "gradient" of the energy; "auto": as the task was trained.
        device: where the model runs; None: where it is, or for a file a GPU if there is one.
        precision: as for `JMP`, or "fp64"; None: as it is.
        compile: whether to call `JMP.compile` first, which pays off after many steps.

    Raises:
        ValueError: if the model does not say what it predicts, has no such task or no such forces, or the task's target
            is not the energy.
        ImportError: if ASE is not installed.
    """

    def __init__(
        self,
        model: JMP | str | os.PathLike[str],
        task: str | None = None,
        *,
        forces: ForceKind | Literal["auto"] = "auto",
        device: torch.device | str | None = None,
        precision: Precision | Literal["fp64"] | None = None,
        compile: bool = False,  # noqa: A002 - what torch calls it
    ) -> None:
        super().__init__()
        self.model, self.task = prepare(model, task, device, precision)
        if self.task.target != "energy":
            raise ValueError(f"task {self.task.name} predicts {self.task.target}; ejmp.Predictor returns that")
        self.forces: ForceKind | None = choose_forces(self.model, self.task, forces)
        known = ["energy", "free_energy", "energies", *(["forces"] if self.forces else []), "stress"]
        self.implemented_properties = known
        self._said: set[str] = set()
        self._stress = False
        if compile:
            self.model = self.model.on()  # the caller's stays as it is
            self.model.compile()

    def calculate(
        self,
        atoms: Any = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(ase.all_changes),
    ) -> None:
        """Compute the energy with its parts and the forces, and the stress if it is asked for; ASE calls this.

        Once the stress was asked for, it is computed with the forces of every periodic structure, so that a relaxation
        of the cell takes one pass per step.

        Raises:
            ValueError: for what `build_graph` refuses.
            ase.calculators.calculator.PropertyNotImplementedError: for the stress of a structure that is not periodic
                in three directions.
        """
        super().calculate(atoms, properties, system_changes)
        periodic = bool(self.atoms.pbc.all())
        if "stress" in properties and not periodic:
            raise ase.PropertyNotImplementedError("stress: the structure is not periodic in three directions")
        self._stress |= "stress" in properties
        with torch.inference_mode(mode=False):  # gradients are needed, whatever surrounds the call
            graph = self.graph(self.atoms)
            found = quantities(self.model, graph, self.task, forces=self.forces, virial=self._stress and periodic)
        energy = float(found.energy[0])
        self.results = {"energy": energy, "free_energy": energy, "energies": found.energies.cpu().numpy()}
        if found.forces is not None:
            self.results["forces"] = found.forces.cpu().numpy()
        if found.virial is not None:
            self.results["stress"] = found.virial[0].cpu().numpy()[VOIGT] / self.atoms.get_volume()

    def check_state(self, atoms: Any, tol: float = 1e-15) -> list[str]:
        """Return what differs from the last call; ASE itself does not look at tags.

        Args:
            atoms: an ase.Atoms.
            tol: largest difference of numbers that counts as none.
        """
        changes = super().check_state(atoms, tol)
        if self.atoms is not None and self.task.graph.tags == "oc20":
            old, new = (item.get_tags() if item.has("tags") else None for item in (self.atoms, atoms))
            same = old is new if old is None or new is None else np.array_equal(old, new)
            if not same:
                changes.append("tags")
        return changes

    def graph(self, atoms: Any) -> AtomGraph:
        """Return the graph that the model gets of some atoms."""
        settings = self.task.graph
        tags = self._tags(atoms) if settings.tags == "oc20" else None
        structure = Structure(
            numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell.array, pbc=atoms.pbc, tags=tags
        )
        graph = build_graph(structure, settings=settings, device=self.model.device, dtype=self.model.dtype)
        if settings.ties == "cut" and "shells" not in self._said and atoms.pbc.any():
            self._said.add("shells")
            cut = max((len(found) for found in cut_shells(graph, settings).values()), default=0)
            if 2 * cut >= len(atoms):
                warnings.warn(
                    f"ejmp: the limit on neighbours cuts a shell of equal distances at {cut} of {len(atoms)} atoms, "
                    "which breaks the crystal's symmetry; a task with GraphSettings(ties='keep') keeps whole shells",
                    stacklevel=2,
                )
        return graph

    def _tags(self, atoms: Any) -> np.ndarray[Any, Any] | None:
        """Return tags 0, 1, 2 (bulk, surface, adsorbate) if the atoms have such; say once what is done if not.

        A molecule without tags has the right ones anyway. The layer numbers of ASE's slab builders are no such tags.
        """
        tags = atoms.get_tags() if atoms.has("tags") else None
        layers = tags is not None and are_layer_numbers(atoms)
        if tags is not None and np.isin(tags, TAGS).all() and not layers:
            return tags
        if tags is None and not atoms.pbc.any():
            return None
        if "tags" not in self._said:
            self._said.add("tags")
            have = "no tags" if tags is None else "layer numbers as tags" if layers else "tags other than 0, 1, 2"
            warnings.warn(
                f"ejmp: the atoms have {have}, so each counts as an adsorbate's or molecule's (tag 2); the model was "
                "trained with 0 for atoms below the surface, 1 for the surface and 2 for the adsorbate",
                stacklevel=2,
            )
        return None
