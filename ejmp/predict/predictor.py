"""Predictions for lists of structures of any length, in batches that fit into memory."""

import copy
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ejmp.graph.build import build_graph
from ejmp.graph.graph import AtomGraph
from ejmp.graph.structure import to_list
from ejmp.model.checkpoint import load
from ejmp.model.config import Precision
from ejmp.model.jmp import JMP
from ejmp.model.task import Task
from ejmp.predict.quantities import ForceKind, Quantities, choose_forces, quantities

MOST_EDGES = 20_000
"""Most main edges per batch if nobody says; larger batches are no faster."""
VALUES_PER_EDGE = 40
"""Roughly how many tensors as wide as an edge's features a forward pass holds at once."""
VOIGT = ((0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1))
"""Rows and columns of xx, yy, zz, yz, xz, xy, ASE's order."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model says of one structure with n atoms."""

    energy: float
    """The task's target, in `unit`."""
    unit: str
    """Unit of the target: eV for energies."""
    energies: np.ndarray[Any, Any]
    """Contributions of the atoms, whose sum is the energy, [n]."""
    forces: np.ndarray[Any, Any] | None
    """Forces, [n, 3], eV/A; None if they were not asked for."""
    stress: np.ndarray[Any, Any] | None
    """Stress xx, yy, zz, yz, xz, xy with ASE's sign, [6], eV/A^3; None if it was not asked for, or the structure is not
    periodic in three directions."""


def prepare(
    model: JMP | str | os.PathLike[str],
    task: str | None,
    device: torch.device | str | None,
    precision: Precision | Literal["fp64"] | None,
) -> tuple[JMP, Task]:
    """Return a model that is ready to predict, with the heads of that task alone unless it is compiled, and the task.

    Args:
        model: a model, which is not changed, or what `ejmp.load` reads.
        task: name of one of its tasks; None is enough if there is only one.
        device: where it runs; None: where it is, or for a file a GPU if there is one.
        precision: as for `JMP`, or "fp64"; None: as it is.

    Raises:
        ValueError: if the model does not say what it predicts, or has no such task.
    """
    if not isinstance(model, JMP):
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load(model, device=place).requires_grad_(requires_grad=False)
    chosen = model.task(task)
    if chosen.linear_reference is None:
        warnings.warn(
            f"ejmp: task {chosen.name}: the model's file does not say which energy per element was subtracted from its "
            "training data; differences between structures of one composition are right, energies themselves are not",
            stacklevel=3,
        )
    other_type = precision == "fp64" and model.dtype != torch.float64
    if other_type or (device is not None and torch.device(device) != model.device):
        model = copy.deepcopy(model).to(device, torch.float64 if other_type else None)
    if precision not in (None, "fp64"):
        model = model.on(precision=precision)
    model = model.eval() if model.training else model
    if model.config.num_tasks == 1 or model.compiled is not None:
        return model, chosen
    model = model.for_task(chosen.name)
    return model, model.task()


class Predictor:
    """Predicts energies, forces and stresses of structures, in eV and A.

        predictor = ejmp.Predictor("runs/finetune/final")
        for prediction in predictor(list_of_atoms): ...

    Args:
        model: a model, or what `ejmp.load` reads.
        task: name of one of its tasks; None is enough if there is only one.
        forces: "direct" by the force branch, "gradient" of the energy, None for no forces; "auto": as the task was
            trained.
        stress: whether to predict the stress of structures that are periodic in three directions.
        max_edges: most main edges in a batch, as estimated; "auto": what fits into half of the free memory, at most
            20,000. It is halved when memory runs out.
        device: where the model runs; None: where it is, or for a file a GPU if there is one.
        precision: as for `JMP`, or "fp64"; None: as it is.

    Raises:
        ValueError: if the model does not say what it predicts, has no such task or no such forces.
    """

    def __init__(
        self,
        model: JMP | str | os.PathLike[str],
        task: str | None = None,
        *,
        forces: ForceKind | Literal["auto"] | None = "auto",
        stress: bool = False,
        max_edges: int | Literal["auto"] = "auto",
        device: torch.device | str | None = None,
        precision: Precision | Literal["fp64"] | None = None,
    ) -> None:
        if max_edges != "auto" and (type(max_edges) is not int or max_edges < 1):
            raise ValueError(f'max_edges: expected a positive integer or "auto", got {max_edges!r}')
        self.model, self.task = prepare(model, task, device, precision)
        self.forces: ForceKind | None = choose_forces(self.model, self.task, forces)
        if stress and self.task.target != "energy":
            raise ValueError(f"stress: task {self.task.name} predicts {self.task.target}, which has none")
        self.stress = stress
        gradient = stress or self.forces == "gradient"
        self.max_edges = automatic_edges(self.model, gradient=gradient) if max_edges == "auto" else max_edges

    def __call__(self, structures: Any) -> list[Prediction]:
        """Return a prediction for each structure, in order.

        Args:
            structures: an ase.Atoms, an ejmp.Structure, or a list of them.

        Raises:
            ValueError: for what `build_graph` refuses.
            RuntimeError: if a structure alone does not fit into memory.
        """
        return list(self.predict(structures))

    def predict(self, structures: Any) -> Iterator[Prediction]:
        """Yield a prediction for each structure, in order, as soon as its batch is done; as `__call__` otherwise."""
        listed = to_list(structures)
        first = 0
        while first < len(listed):
            count = self._fitting(listed, first)
            try:
                found = self._batch(listed[first : first + count])
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                if count == 1:
                    atoms = len(listed[first].numbers)
                    raise RuntimeError(f"structure {first}: {atoms} atoms alone do not fit into memory") from error
                self.max_edges = max(1, sum(map(self._edges, listed[first : first + count])) // 2)
                continue
            except ValueError as error:
                raise ValueError(_renumbered(str(error), first)) from error
            yield from found
            first += count

    def _edges(self, structure: Any) -> int:
        """Return about how many main edges a structure has."""
        atoms = len(structure.numbers)
        most = self.task.graph.neighbors_of(atoms)
        return atoms * (most if np.any(getattr(structure, "pbc", False)) else min(most, atoms - 1)) + 1

    def _fitting(self, structures: Sequence[Any], first: int) -> int:
        """Return how many structures from the first on make a batch, at least one."""
        total = 0
        for number in range(first, len(structures)):
            total += self._edges(structures[number])
            if total > self.max_edges and number > first:
                return number - first
        return len(structures) - first

    def _batch(self, structures: Sequence[Any]) -> list[Prediction]:
        model = self.model
        with torch.inference_mode(mode=False):  # gradients are needed, whatever surrounds the call
            graph = build_graph(structures, settings=self.task.graph, device=model.device, dtype=model.dtype)
            found = quantities(model, graph, self.task, forces=self.forces, virial=self.stress)
        return list(_divided(found, graph, self.task.unit))


def _divided(found: Quantities, graph: AtomGraph, unit: str) -> Iterator[Prediction]:
    """Yield what belongs to each structure of a batch, as NumPy arrays."""
    sizes = graph.ptr.diff().tolist()
    whole = [None] * len(sizes)
    forces = whole if found.forces is None else _arrays(found.forces.split(sizes))
    stresses = whole if found.virial is None else list(_stresses(found.virial, graph))
    rows = zip(found.energy.tolist(), _arrays(found.energies.split(sizes)), forces, stresses, strict=True)
    for energy, energies, force, stress in rows:
        yield Prediction(energy=energy, unit=unit, energies=energies, forces=force, stress=stress)


def _arrays(parts: Iterable[Tensor]) -> list[np.ndarray[Any, Any]]:
    return [part.cpu().numpy() for part in parts]


def _stresses(virial: Tensor, graph: AtomGraph) -> Iterator[np.ndarray[Any, Any] | None]:
    volumes = torch.linalg.det(graph.cell).abs()  # zero where a direction is not periodic
    for one, volume in zip(virial.cpu(), volumes.tolist(), strict=True):
        yield (one[VOIGT] / volume).numpy() if volume else None


def automatic_edges(model: JMP, *, gradient: bool) -> int:
    """Return how many main edges of a batch fit into half of the memory that is free, roughly.

    Args:
        model: the model, on its device.
        gradient: whether the energy is differentiated, for which all blocks keep what they computed.
    """
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # not on every system
            free = 1 << 30
    layers = model.config.blocks + 1 if gradient else 1
    edge = VALUES_PER_EDGE * layers * model.config.emb_size_edge * model.dtype.itemsize
    return max(1, min(MOST_EDGES, free // (2 * edge)))


def _renumbered(text: str, first: int) -> str:
    """Return a message about a structure of a batch with its number among all."""
    return re.sub(r"\bstructure (\d+)", lambda match: f"structure {int(match[1]) + first}", text)


def _out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        text in str(error).lower() for text in ("out of memory", "can't allocate memory", "not enough memory")
    )
