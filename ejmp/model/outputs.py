"""What a model returns."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Features:
    """What distillation and block relevance read; the embedding's output block comes first.

    Gradients of an output with respect to any of these are those of the model.
    """

    x_E: tuple[Tensor, ...]
    """Outputs of the output blocks on atoms: blocks + 1 tensors [N, C]."""
    x_F: tuple[Tensor, ...]
    """Outputs of the output blocks on edges: blocks + 1 tensors [E, M] in the order of graph.main; empty without
    direct forces."""
    mlp_E: tuple[Tensor, ...]
    """Output of each layer of the final MLP on atoms, [N, C]; the energy heads read the last."""
    mlp_F: tuple[Tensor, ...]
    """Output of each layer of the final MLP on edges, [E, M]; empty without direct forces."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """Energies and direct forces of a batch, as the heads give them: in the normalised units of each task."""

    energy: Tensor
    """Energies by structure and task, [B, T] (per atom for energy_reduction="mean"); a task's mean, standard deviation
    and element references turn them into eV."""
    forces: Tensor | None
    """Direct forces by atom and task, [N, T, 3]; a task's force standard deviation turns them into eV/A. None without
    direct forces (use `ejmp.gradient_forces`)."""
    energies: Tensor | None = None
    """Contributions of the atoms to the energies, [N, T], in the same units: their sum over a structure, or their mean
    for energy_reduction="mean", is its energy. None from a model that does not tell."""
