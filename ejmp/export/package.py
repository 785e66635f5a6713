"""Models as AOTInductor packages (.pt2), which need torch but not ejmp.

A package has dynamic shapes: one serves every number of structures, atoms and edges from two on, so graphs are padded
(`ejmp.graph.padding`), which adds what every set of edges must have and changes no result. It is plain torch: the
kernels of the native and Triton backends are not in it. Loading one takes only torch:

    import json, torch
    package = torch._inductor.aoti_load_package("model.pt2")
    about = json.loads(package.get_metadata()["ejmp"])  # inputs in order, outputs, units, settings of the graphs
    energy, *forces = package(*inputs)

Inputs are plain tensors that C++ makes as well: see `INPUTS`, `EDGE_INPUTS`.
"""

import copy
import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ejmp.graph.build import build_graph
from ejmp.graph.graph import EDGE_SETS, IMAGE_BASE, AtomGraph, EdgeSet, edge_geometry
from ejmp.graph.padding import GraphShape, pad_graph
from ejmp.graph.structure import Structure
from ejmp.model.jmp import JMP
from ejmp.model.task import Task
from ejmp.predict.quantities import ForceKind, choose_forces, quantities

FORMAT = "ejmp-package-1"
INPUTS = {
    "positions": "[N, 3] float64, A",
    "atomic_numbers": "[N] int64",
    "cell": "[B, 3, 3] float64, A: lattice vectors as rows, zero where not periodic",
    "batch": "[N] int64, ascending: structure of each atom",
}
"""The first inputs of a package."""
EDGE_INPUTS = {
    "source": "[E] int64: atom that each edge starts from; edges are sorted by target",
    "ptr": "[N + 1] int64: the edges into atom i are ptr[i] .. ptr[i + 1] - 1",
    "offset": "[E, 3] int32: cells by which the source is shifted",
    "slots": "[K] float32, values are not read: K is at least the largest number of edges into one atom",
}
"""What follows for each of main, atom_edges, quad_edges and atom_pairs; the last input is main_swap."""
SWAP = "[E] int64: counter-edge of each main edge"
PADDING = (
    "B, N and every E and K must be at least 2. Add structures, atoms and edges behind the real ones: an additional "
    "atom is hydrogen at the origin of a cubic cell of 1000 A of its own, its edges go to its own images (main edges "
    "in pairs). Drop the additional rows of the outputs."
)
ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest difference from the model itself, relative to the largest value, by the type of the parameters."""


class Packaged(nn.Module):
    """The function in a package: from plain tensors to the target [B] and the forces [N, 3], in physical units."""

    reference: Tensor

    def __init__(self, model: JMP, task: Task, forces: ForceKind | None) -> None:
        super().__init__()
        self.model, self.task, self.forces = model, task, forces
        self.register_buffer("reference", torch.tensor(task.reference_row(), dtype=torch.float64, device=model.device))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Predict; see `INPUTS` and `EDGE_INPUTS` for the inputs."""
        by_gradient, task = self.forces == "gradient", self.task
        positions = inputs[0].detach().requires_grad_() if by_gradient else inputs[0]
        graph = _graph(positions, inputs[1:], self.model.dtype)
        # not `forward`, whose checks read values
        features = self.model.run(self.model.executor(graph), direct_forces=self.forces == "direct")
        out = self.model.heads(features, graph)
        raw = out.energy[:, task.head]
        per_atom = self.reference[graph.atomic_numbers]
        zero = per_atom.new_zeros(graph.cell.shape[0]).index_add(0, graph.batch, per_atom)
        energy = raw.detach().double() * task.std + task.mean + zero
        if by_gradient:
            (gradient,) = torch.autograd.grad(raw.sum(), positions)
            return energy, -gradient.double() * task.std
        if self.forces == "direct":
            assert out.forces is not None
            return energy, out.forces[:, task.head].double() * task.force_std
        return (energy,)


def _graph(positions: Tensor, inputs: Sequence[Tensor], dtype: torch.dtype) -> AtomGraph:
    """Make a graph of plain tensors without reading a value, so that sizes stay symbols while it is traced."""
    atomic_numbers, cell, batch, *rest, swap = inputs
    sets = {}
    for i, name in enumerate(EDGE_SETS):
        source, ptr, offset, slots = rest[4 * i : 4 * i + 4]
        edges = torch.arange(source.shape[0], device=positions.device)
        target = torch.searchsorted(ptr, edges, right=True) - 1
        shift = (offset.double()[:, None] @ cell[batch[target]])[:, 0]
        x, y, z = offset.long().unbind(1)
        distance, vector = edge_geometry(positions, source, target, shift)
        sets[name] = EdgeSet(
            source=source,
            target=target,
            offset=offset,
            image=(x * IMAGE_BASE + y) * IMAGE_BASE + z,
            shift=shift,
            ptr=ptr,
            distance=distance.to(dtype),
            vector=vector.to(dtype),
            max_degree=slots.shape[0],
            swap=swap if name == "main" else None,
        )
    sizes = torch.zeros_like(cell[:, 0, 0], dtype=torch.int64).index_add(0, batch, torch.ones_like(batch))
    return AtomGraph(
        positions=positions,
        atomic_numbers=atomic_numbers,
        tags=torch.full_like(atomic_numbers, 2),  # read when edges are made, not by the model
        cell=cell,
        pbc=torch.ones_like(cell[:, 0], dtype=torch.bool),
        batch=batch,
        ptr=torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]),
        **sets,
    )


def inputs_of(graph: AtomGraph) -> tuple[Tensor, ...]:
    """Return the inputs of a package for a graph, which is padded first: no set of edges may be empty."""
    shape = GraphShape.of(graph)
    least = {name: max(2, getattr(shape, name)) for name in EDGE_SETS}
    least |= {f"{name}_degree": max(2, shape.edges(name)[1]) for name in EDGE_SETS}
    padded = pad_graph(graph, GraphShape.holding(dataclasses.replace(shape, **least)))
    inputs = [padded.positions.detach(), padded.atomic_numbers, padded.cell, padded.batch]
    for name in EDGE_SETS:
        edges: EdgeSet = getattr(padded, name)
        slots = torch.zeros(edges.max_degree, device=graph.device)
        inputs += [edges.source, edges.ptr, edges.offset, slots]
    assert padded.main.swap is not None
    return (*inputs, padded.main.swap)


class Package:
    """A package that was loaded; `load` makes one.

    Args:
        path: file written by `write_package`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a package.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        self._run = torch._inductor.aoti_load_package(os.fspath(path))  # noqa: SLF001 - documented under this name
        self.about: dict[str, Any] = json.loads(self._run.get_metadata().get("ejmp", "{}"))
        if self.about.get("format") != FORMAT:
            raise ValueError(f"{path}: expected a package of format {FORMAT!r}, got {self.about.get('format')!r}")

    def __call__(self, graph: AtomGraph) -> dict[str, Tensor]:
        """Return the outputs for a graph: the target [B] under its name, and "forces" [N, 3] in eV/A if it has any.

        Args:
            graph: a batch of structures that was made by the settings in `about["graph"]`.

        Raises:
            ValueError: if the graph is on another type of device.
        """
        if graph.device.type != self.about["device"]:
            raise ValueError(f"graph: expected device {self.about['device']} (the package's), got {graph.device}")
        found = self._run(*inputs_of(graph))
        sizes = graph.num_structures, graph.num_atoms
        return {name: x[:size] for name, x, size in zip(self.about["outputs"], found, sizes, strict=False)}


def load(path: str | os.PathLike[str]) -> Package:
    """Load a package as a function of an `ejmp.AtomGraph`, which it pads.

    Args:
        path: file written by `write_package`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a package.
    """
    return Package(path)


def write_package(
    model: JMP,
    path: str | os.PathLike[str],
    *,
    task: str | None = None,
    forces: ForceKind | Literal["auto"] | None = "auto",
    atoms: Sequence[int] = (3, 12, 40),
    overwrite: bool = False,
) -> dict[str, float]:
    """Compile a model to a package and write it, after comparing it with the model; minutes for a large one.

    Args:
        model: model on the device the package is for; its parameters' type is the package's.
        path: the file, .pt2.
        task: name of one of its tasks; None is enough if there is only one.
        forces: "direct", "gradient", None for none; "auto": as the task was trained.
        atoms: numbers of atoms of the structures on which both are compared, with and without periodicity, in batches
            of 5, 1, 2, 5, ...
        overwrite: whether to replace a file.

    Returns:
        The largest relative difference from the model, by output.

    Raises:
        FileExistsError: if there is such a file and overwrite is False.
        ValueError: for a model of another backend or precision, without such a task or such forces.
        RuntimeError: if the package differs from the model by more than `ALLOWED`; nothing is written then.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    if path.suffix != ".pt2":
        raise ValueError(f"path: expected a name that ends in .pt2, got {path.name}")
    if model.requested_backend not in ("auto", "reference") or model.precision != "fp32":
        raise ValueError(
            'model: a package holds plain torch, expected backend "reference" and precision "fp32", got '
            f'"{model.requested_backend}" and "{model.precision}"; export model.on(backend="reference", '
            'precision="fp32"), which has the same parameters'
        )
    if not atoms or min(atoms) < 1:
        raise ValueError(f"atoms: expected positive numbers, got {tuple(atoms)}")
    model = model.for_task(task)
    chosen = model.task()
    kind = choose_forces(model, chosen, forces)
    plain = copy.deepcopy(model.on(backend="reference")).requires_grad_(requires_grad=False).eval()
    graphs = [_example(plain, chosen, n, count) for n, count in zip(atoms, itertools.cycle((5, 1, 2)))]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        new = Path(scratch, "new.pt2")
        _compile(Packaged(plain, chosen, kind), inputs_of(graphs[-1]), new, _about(plain, chosen, kind))
        differences = _compare(Package(new), plain, chosen, kind, graphs)
        if not all(value <= ALLOWED[plain.dtype] for value in differences.values()):
            raise RuntimeError(f"{path}: not written: the package differs from the model, relatively by {differences}")
        new.replace(path)
    return differences


def _about(model: JMP, task: Task, forces: ForceKind | None) -> dict[str, Any]:
    inputs = dict(INPUTS)
    for name in EDGE_SETS:
        inputs |= {f"{name}_{field}": text for field, text in EDGE_INPUTS.items()}
    outputs = {task.target: f"[B] float64, {task.unit}"} | ({"forces": "[N, 3] float64, eV/A"} if forces else {})
    return {
        "format": FORMAT,
        "task": task.name,
        "forces": forces,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "inputs": inputs | {"main_swap": SWAP},
        "outputs": outputs,
        "graph": dataclasses.asdict(task.graph),
        "padding": PADDING,
        "linear_reference_known": task.linear_reference is not None,
    }


def _example(model: JMP, task: Task, num_atoms: int, count: int) -> AtomGraph:
    """Return a graph of crystals and clusters of the task's elements by turns, on a shaken cubic lattice."""
    random = torch.Generator().manual_seed(num_atoms)
    known = [z for z in (task.linear_reference or (1, 6, 8)) if z <= model.config.num_elements]
    side = next(n for n in range(1, num_atoms + 1) if n**3 >= num_atoms)
    lattice = torch.cartesian_prod(*[torch.arange(side)] * 3).reshape(-1, 3)[:num_atoms] * 1.8
    structures = []
    for number in range(count):
        periodic = number % 2 == 0
        shaken = lattice + 0.3 * torch.rand(num_atoms, 3, generator=random, dtype=torch.float64)
        numbers = torch.tensor(known)[torch.randint(len(known), (num_atoms,), generator=random)]
        cell = (1.8 * side + 1) * torch.eye(3, dtype=torch.float64) + 0.1 if periodic else torch.zeros(3, 3)
        structure = Structure(numbers=numbers.numpy(), positions=shaken.numpy(), cell=cell.numpy(), pbc=periodic)
        structures.append(structure)
    return build_graph(structures, settings=task.graph, dtype=model.dtype, device=model.device)


def _compile(function: Packaged, inputs: tuple[Tensor, ...], path: Path, about: dict[str, Any]) -> None:
    from torch.fx.experimental import _config  # noqa: PLC0415 - a second of imports
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415

    traced: nn.Module = function
    if function.forces == "gradient":  # torch.export does not differentiate; this writes the derivative out
        settings: Any = _config  # its functions are made at run time
        with settings.patch(use_duck_shape=False):  # sizes that are equal in the example need not be so elsewhere
            traced = make_fx(function.forward, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
    sizes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    with torch.set_grad_enabled(function.forces == "gradient"):
        nested = (sizes,) if traced is function else sizes  # the one takes *inputs, the other has a name for each
        program = torch.export.export(traced, inputs, dynamic_shapes=nested)
        options = {"aot_inductor.metadata": {"ejmp": json.dumps(about)}}
        torch._inductor.aoti_compile_and_package(  # noqa: SLF001 - documented under this name
            program, package_path=os.fspath(path), inductor_configs=options
        )


def _compare(
    package: Package, model: JMP, task: Task, forces: ForceKind | None, graphs: Sequence[AtomGraph]
) -> dict[str, float]:
    """Return the largest difference of each output from the model's, relative to the largest value, or NaN.

    Energies count without mean and reference, which are large and say nothing of the model.
    """
    found: dict[str, list[Tensor]] = {}
    bare = dataclasses.replace(task, mean=0.0, linear_reference={})
    for graph in graphs:
        expected = quantities(model, graph, task, forces=forces)
        energy = quantities(model, graph, bare).energy
        pairs = {task.target: (expected.energy, energy, task.std)}
        if expected.forces is not None:
            pairs["forces"] = (expected.forces, expected.forces, task.force_std)
        outputs = package(graph)
        for name, (wanted, values, unit) in pairs.items():
            scale = values.abs().max().clamp(min=1e-3 * unit)
            found.setdefault(name, []).append((outputs[name] - wanted).abs().max() / scale)
    return {name: float(torch.stack(differences).max()) for name, differences in found.items()}
