"""A model for torch-sim, which relaxes and simulates many systems at once (https://github.com/TorchSim/torch-sim).

Importing this module imports torch-sim: `pip install ejmp[torchsim]`. Versions from 0.6 on need Python 3.12; on
Python 3.11 pip installs 0.3, which works as well.
"""

import os
from typing import Any, Literal

import torch
from torch import Tensor

from ejmp.data.readers.files import import_optional
from ejmp.graph.build import build_graph
from ejmp.graph.graph import AtomGraph
from ejmp.graph.structure import Structure
from ejmp.model.config import Precision
from ejmp.model.jmp import JMP
from ejmp.predict.predictor import prepare
from ejmp.predict.quantities import ForceKind, choose_forces, quantities

interface = import_optional("torch_sim.models.interface", extra="torchsim")


class JMPModel(interface.ModelInterface):
    """Energy, forces and stress of the systems of a torch-sim state, in eV and A.

    States should be in float64, whatever the model's own type is: neighbours are chosen by distances rounded to
    1e-6 A, which float32 coordinates do not have. torch-sim's states have no tags, so each atom counts as an
    adsorbate's or molecule's.

    Args:
        model: a model, or what `ejmp.load` reads.
        task: name of one of its tasks; None is enough if there is only one.
        forces: "direct" by the force branch, "gradient" of the energy; "auto": as the task was trained.
        stress: whether to compute the stress, by the derivative of the energy with respect to the strain.
        device: where the model runs; None: where it is, or for a file a GPU if there is one.
        precision: as for `ejmp.JMP`, or "fp64"; None: as it is.

    Raises:
        ValueError: if the model does not say what it predicts, has no such task or no such forces, or the task's target
            is not the energy.
        ImportError: if torch-sim is not installed.
    """

    def __init__(
        self,
        model: JMP | str | os.PathLike[str],
        task: str | None = None,
        *,
        forces: ForceKind | Literal["auto"] = "auto",
        stress: bool = True,
        device: torch.device | str | None = None,
        precision: Precision | Literal["fp64"] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.task = prepare(model, task, device, precision)
        if self.task.target != "energy":
            raise ValueError(f"task {self.task.name} predicts {self.task.target}, not the energy")
        self.forces: ForceKind | None = choose_forces(self.model, self.task, forces)
        self._device, self._dtype = self.model.device, torch.float64
        self._compute_forces, self._compute_stress = self.forces is not None, stress
        self._memory_scales_with = "n_atoms"  # the number of neighbours is limited

    @property
    def compute_stress(self) -> bool:
        """Whether the stress is computed."""
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, value: bool) -> None:
        self._compute_stress = value

    def forward(self, state: Any, **_: Any) -> dict[str, Tensor]:
        """Return "energy" [B] in eV, "forces" [N, 3] in eV/A and "stress" [B, 3, 3] in eV/A^3, in the state's type.

        The stress of a system whose cell has no volume is NaN.

        Args:
            state: a torch-sim state of B systems with N atoms.

        Raises:
            ValueError: for what `ejmp.build_graph` refuses.
        """
        cells = state.cell.double().mT  # torch-sim keeps lattice vectors as columns
        found = quantities(
            self.model, self._graph(state, cells), self.task, forces=self.forces, virial=self._compute_stress
        )
        outputs = {"energy": found.energy, "forces": found.forces}
        if found.virial is not None:
            volume = torch.linalg.det(cells).abs()
            volume = torch.where(volume > 0, volume, torch.nan)[:, None, None]
            outputs["stress"] = found.virial / volume.to(found.virial.device)
        return {name: value.to(state.positions) for name, value in outputs.items() if value is not None}

    def _graph(self, state: Any, cells: Tensor) -> AtomGraph:
        sizes = torch.bincount(state.system_idx).tolist()
        parts = zip(
            state.atomic_numbers.long().split(sizes), state.positions.detach().double().split(sizes), cells, strict=True
        )
        structures = [Structure(numbers=z, positions=r, cell=cell, pbc=state.pbc) for z, r, cell in parts]
        return build_graph(structures, settings=self.task.graph, device=self.model.device, dtype=self.model.dtype)
