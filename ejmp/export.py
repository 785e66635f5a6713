"""Models as files that run without ejmp: AOTInductor packages (.pt2) for a ladder of shapes, checked before they count.

A folder that `export` writes has

- `bundle/`: the model as `ejmp.save` writes it;
- `shape-0.pt2`, `shape-1.pt2`, ...: the plain-torch backend as compiled code, each for graphs of one shape, smallest
  first; torch alone loads them;
- `export.json`: inputs and outputs with types, shapes and units, the shapes, the task with its graph settings.

A graph is padded to a shape with atoms and edges that change nothing (`ejmp.graph.padding`). `load` does this; a
program without ejmp makes the 25 input tensors by itself, in the order of "inputs" in export.json, and calls
`torch._inductor.aoti_load_package("shape-0.pt2")(*inputs)`.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ejmp.graph.build import build_graph
from ejmp.graph.graph import EDGE_SETS, AtomGraph, EdgeSet, edge_geometry
from ejmp.graph.padding import Buckets, GraphShape, pad_graph
from ejmp.graph.structure import MAX_ATOMIC_NUMBER, to_list
from ejmp.model.checkpoint import save
from ejmp.model.jmp import JMP
from ejmp.model.task import Task, read_tasks, tasks_text
from ejmp.predict.quantities import ForceKind, Quantities, choose_forces, quantities

FORMAT = "ejmp-export-1"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference from the model that is exported, relative to the largest value, by the type of its weights."""
ATOMS = {
    "positions": "[N, 3] float64, A",
    "atomic_numbers": "[N] int64",
    "batch": "[N] int64: structure of each atom",
    "ptr": "[B + 1] int64: first atom of each structure, and the number of all",
}
EDGES = {
    "source": "[E] int64: atom that each edge starts from",
    "target": "[E] int64, ascending: atom that each edge ends in",
    "image": "[E] int64: cell offset (x * 2**20 + y) * 2**20 + z of the source",
    "shift": "[E, 3] float64, A: offset . cell; an edge's vector is r_target - r_source - shift",
    "ptr": "[N + 1] int64: first edge into each atom",
}
INPUTS = {
    **ATOMS,
    **{f"{edges}.{name}": text for edges in EDGE_SETS for name, text in EDGES.items()},
    "main.swap": "[E] int64: counter-edge of each main edge",
}
"""The inputs of the compiled code, in their order."""
OUTPUTS = {
    "energy": "[B] float64, in the task's unit",
    "energies": "[N] float64: contributions of the atoms to it",
    "forces": "[N, 3] float64, eV/A",
}
"""The outputs of the compiled code, in their order; without forces there are the first two."""


def export(
    model: JMP,
    path: str | Path,
    structures: Any,
    *,
    task: str | None = None,
    forces: ForceKind | Literal["auto"] | None = "auto",
    growth: float = 1.5,
) -> None:
    """Write a folder with a model as compiled code for the device it is on.

    Compiling takes a minute or more per shape. Nothing is written unless what the code gives for the structures is what
    the model gives.

    Args:
        model: any JMP model; the plain-torch backend with its weights is exported.
        path: folder to write; it must not exist.
        structures: structures like those the code will be used for: the shapes are made for them, one at a time.
        task: name of one of the model's tasks; None is enough if there is only one.
        forces: as for `ejmp.Predictor`.
        growth: factor from one shape to the next, in main edges; larger: fewer shapes and more padding.

    Raises:
        FileExistsError: if the path exists.
        ValueError: if the model does not say what it predicts, has no such task or forces, or the compiled code differs
            from it.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another folder")
    chosen = model.task(task)
    kind = choose_forces(model, chosen, forces)
    plain = model.on(backend="reference", precision="fp32").eval()
    graphs = [
        build_graph(one, settings=chosen.graph, device=model.device, dtype=model.dtype) for one in to_list(structures)
    ]
    buckets = Buckets.from_graphs(graphs, growth=growth)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        save(model, new / "bundle")
        for number, shape in enumerate(buckets.shapes):
            fitting = next((graph for graph in graphs if buckets.choose(graph) == shape), graphs[0])
            _compile(plain, chosen, kind, pad_graph(fitting, shape), new / f"shape-{number}.pt2")
        (new / "export.json").write_text(json.dumps(_description(model, chosen, kind, buckets), indent=1) + "\n")
        _verify(Exported(new), plain, graphs)
        new.rename(path)


def _description(model: JMP, task: Task, forces: ForceKind | None, buckets: Buckets) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "forces": forces,
        "task": json.loads(tasks_text([task]))[0],
        "inputs": INPUTS,
        "outputs": dict(list(OUTPUTS.items())[: 2 if forces is None else 3]),
        "shapes": [dataclasses.asdict(shape) for shape in buckets.shapes],
    }


def _compile(model: JMP, task: Task, forces: ForceKind | None, graph: AtomGraph, path: Path) -> None:
    """Trace a model on a padded graph, gradients included, compile the trace, and write it."""
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415

    inputs = _flat(graph)
    run = _function(model, task, forces, GraphShape.of(graph))
    traced = make_fx(run)(*inputs)
    program = torch.export.export(traced, tuple(inputs))
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))  # noqa: SLF001 - it has no other name


def _flat(graph: AtomGraph) -> list[Tensor]:
    """Return the inputs of the compiled code, in order."""
    places = [name.rpartition(".") for name in INPUTS]
    return [getattr(getattr(graph, edges) if edges else graph, name) for edges, _, name in places]


def _function(model: JMP, task: Task, forces: ForceKind | None, shape: GraphShape) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function of tensors alone that computes what `quantities` does, for one shape."""
    table = torch.zeros(MAX_ATOMIC_NUMBER + 1, dtype=torch.float64)
    if task.linear_reference:
        table.fill_(torch.nan)
        for number, energy in task.linear_reference.items():
            table[number] = energy
    table = table.to(model.device)
    mean_of_atoms = model.config.energy_reduction == "mean"

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(forces == "gradient"):
            positions = tensors[0].detach()
            if forces == "gradient":
                positions.requires_grad_()
            graph = _graph([positions, *tensors[1:]], shape, model.dtype)
            features = model.run(model.executor(graph), direct_forces=forces == "direct")
            out = model.heads(features, graph)
            assert out.energies is not None
            raw = out.energy[:, task.head]
            found = []
            if forces == "gradient":
                found = [-task.std * torch.autograd.grad(raw.sum(), positions)[0].double()]
            elif out.forces is not None:
                found = [task.force_std * out.forces[:, task.head].double()]
        reference = table.index_select(0, graph.atomic_numbers)
        size = graph.ptr.diff().double()
        of_atom = size.index_select(0, graph.batch)
        part = out.energies[:, task.head].detach().double()
        energies = (part / of_atom if mean_of_atoms else part) * task.std + task.mean / of_atom + reference
        total = torch.zeros_like(size).index_add(0, graph.batch, reference)
        return (raw.detach().double() * task.std + task.mean + total, energies, *(f.detach() for f in found))

    return run


def _graph(tensors: Sequence[Tensor], shape: GraphShape, dtype: torch.dtype) -> AtomGraph:
    """Return the graph that the inputs of the compiled code describe, as far as the model looks at it."""
    given = dict(zip(INPUTS, tensors, strict=True))
    positions, ptr = given["positions"], given["ptr"]
    sets = {}
    for name in EDGE_SETS:
        own = {field: given[f"{name}.{field}"] for field in EDGES}
        distance, vector = edge_geometry(positions, own["source"], own["target"], own["shift"])
        sets[name] = EdgeSet(
            **own,
            offset=own["image"].new_zeros(0, 3, dtype=torch.int32),
            distance=distance.to(dtype),
            vector=vector.to(dtype),
            max_degree=shape.edges(name)[1],
            swap=given["main.swap"] if name == "main" else None,
        )
    cell = positions.new_zeros(len(ptr) - 1, 3, 3)
    atoms = {name: given[name] for name in ATOMS}
    return AtomGraph(**atoms, **sets, tags=given["atomic_numbers"], cell=cell.detach(), pbc=cell[:, 0].detach().bool())


class Exported:
    """A folder that `export` wrote: computes energies and forces by compiled code. Make one with `load`."""

    def __init__(self, path: Path) -> None:
        description = json.loads((path / "export.json").read_text())
        if description.get("format") != FORMAT:
            raise ValueError(f"{path / 'export.json'}: expected format {FORMAT!r}, got {description.get('format')!r}")
        (self.task,) = read_tasks(json.dumps([description["task"]]))
        self.device, self.dtype = torch.device(description["device"]), getattr(torch, description["dtype"])
        self.buckets = Buckets([GraphShape(**shape) for shape in description["shapes"]], growth=None)
        self._path = path
        self._loaded: dict[int, Callable[..., Sequence[Tensor]]] = {}

    def __call__(self, graph: AtomGraph) -> Quantities:
        """Return energies and forces of a graph, in eV and A.

        Raises:
            ValueError: if it is of another type or device, or fits in none of the shapes.
        """
        if graph.dtype != self.dtype or graph.device.type != self.device.type:
            raise ValueError(
                f"graph: expected {self.dtype} on {self.device.type}, got {graph.dtype} on {graph.device.type}"
            )
        number = self.buckets.shapes.index(shape := self.buckets.choose(graph))
        if number not in self._loaded:
            package = str(self._path / f"shape-{number}.pt2")
            self._loaded[number] = torch._inductor.aoti_load_package(package)  # noqa: SLF001 - it has no other name
        energy, energies, *forces = self._loaded[number](*_flat(pad_graph(graph, shape)))
        return Quantities(
            energy=energy[: graph.num_structures],
            energies=energies[: graph.num_atoms],
            forces=forces[0][: graph.num_atoms] if forces else None,
            virial=None,
        )


def load(path: str | Path) -> Exported:
    """Load what `export` wrote; the result takes graphs made with its task's settings.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it is of another format.
    """
    return Exported(Path(path))


def _verify(exported: Exported, model: JMP, graphs: Sequence[AtomGraph]) -> None:
    """Raise ValueError if the compiled code differs from the model on one of the graphs."""
    kind = json.loads((exported._path / "export.json").read_text())["forces"]  # noqa: SLF001 - of this module
    bare = dataclasses.replace(exported.task, linear_reference={}, mean=0.0)
    for number, graph in enumerate(graphs):
        found, expected = exported(graph), quantities(model, graph, exported.task, forces=kind)
        scales = quantities(model, graph, bare, forces=kind)  # without references, which are large
        for name in ("energy", "energies", "forces"):
            a, b, scale = (getattr(x, name) for x in (found, expected, scales))
            if b is None:
                continue
            error = ((a - b).abs().max() / scale.abs().max().clamp_min(1e-30)).item()
            if not error <= TOLERANCE[model.dtype]:
                raise ValueError(f"export: {name} of structure {number} differs from the model's, relative {error:.1e}")
