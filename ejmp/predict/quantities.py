"""Energies, forces and virials in eV and A: a model's raw outputs, put into the units of one of its tasks."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ejmp.graph.graph import AtomGraph
from ejmp.model.jmp import JMP
from ejmp.model.task import Task

ForceKind = Literal["direct", "gradient"]
"""How forces are predicted: by the force branch, or as the negative gradient of the energy."""


@dataclass(frozen=True, kw_only=True)
class Quantities:
    """What a model says of B structures with N atoms."""

    energy: Tensor
    """The task's target, [B] float64, in the task's unit (eV for energies)."""
    energies: Tensor
    """Contributions of the atoms, whose sum over a structure is its energy, [N] float64."""
    forces: Tensor | None
    """Forces, [N, 3] float64, eV/A; None if they were not asked for."""
    virial: Tensor | None
    """Derivative of the energy by the strain of the structure, [B, 3, 3] float64, eV, symmetric; None if it was not
    asked for. Over the volume of the cell it is the stress, with ASE's sign."""


def choose_forces(model: JMP, task: Task, forces: ForceKind | Literal["auto"] | None) -> ForceKind | None:
    """Return how forces are to be predicted: "auto" as the task was trained, None not at all.

    Raises:
        ValueError: if that cannot be had from the model and task.
    """
    if forces not in ("auto", "direct", "gradient", None):
        raise ValueError(f'forces: expected "auto", "direct", "gradient" or None, got {forces!r}')
    if forces == "auto":
        return task.forces
    if forces is not None and task.target != "energy":
        raise ValueError(f"forces: task {task.name} predicts {task.target}, which has none")
    if forces == "direct" and (task.forces != "direct" or not model.config.direct_forces):
        raise ValueError(f"forces: task {task.name} was not trained on direct forces")
    return forces


def quantities(
    model: JMP, graph: AtomGraph, task: Task, *, forces: ForceKind | None = None, virial: bool = False
) -> Quantities:
    """Run a model on a graph, and return what it says in physical units.

    Args:
        model: model with a head for the task.
        graph: a batch of structures that was made by the task's settings, of the model's dtype and device.
        task: what the head predicts. If it does not know its linear reference, energies lack it.
        forces: how forces are predicted; None: they are not.
        virial: whether to differentiate the energy by the strain; with direct forces the two need not agree.

    Raises:
        ValueError: if the task has no reference energy of an element.
    """
    by_gradient = forces == "gradient"
    with torch.set_grad_enabled(by_gradient or virial):
        moved, inputs = graph, []
        if by_gradient or virial:
            positions = graph.positions.detach().requires_grad_(by_gradient)
            strain = torch.zeros_like(graph.cell, dtype=torch.float64, requires_grad=True) if virial else None
            moved = graph.with_positions(positions, strain=strain)
            inputs = [x for x in (positions if by_gradient else None, strain) if x is not None]
        out = model(moved, direct_forces=forces == "direct")
        raw = out.energy[:, task.head]
        gradients = [-g * task.std for g in torch.autograd.grad(raw.sum(), inputs)] if inputs else []
    found = None
    if by_gradient:
        found = gradients[0].double()
    elif forces == "direct":
        found = out.forces[:, task.head].detach().double() * task.force_std
    per_atom = _per_atom(model, graph, task, out.energies[:, task.head].detach().double())
    return Quantities(
        energy=raw.detach().double() * task.std + task.mean + _summed(_reference(graph, task), graph),
        energies=per_atom,
        forces=found,
        virial=-0.5 * (gradients[-1] + gradients[-1].mT) if virial else None,
    )


def _per_atom(model: JMP, graph: AtomGraph, task: Task, raw: Tensor) -> Tensor:
    """Return the contributions of the atoms to the energy; the mean of the target is divided evenly among them."""
    size = graph.ptr.diff()[graph.batch].double()
    part = raw / size if model.config.energy_reduction == "mean" else raw
    return part * task.std + task.mean / size + _reference(graph, task)


def _reference(graph: AtomGraph, task: Task) -> Tensor:
    """Return the reference energy of each atom, [N] float64, eV."""
    if not task.linear_reference:
        return torch.zeros(graph.num_atoms, dtype=torch.float64, device=graph.device)
    found = torch.tensor(task.reference_row(), dtype=torch.float64, device=graph.device)[graph.atomic_numbers]
    if found.isnan().any():
        missing = sorted(set(graph.atomic_numbers[found.isnan()].tolist()))
        raise ValueError(f"task {task.name}: no reference energy of the elements with atomic numbers {missing}")
    return found


def _summed(per_atom: Tensor, graph: AtomGraph) -> Tensor:
    return per_atom.new_zeros(graph.num_structures).index_add_(0, graph.batch, per_atom)
