r"""ejmp beside your own checkout of the public JMP code: the same weights and structures, by turns, in one process.

    python benchmarks/compare_upstream.py PATH_TO_JMP_CHECKOUT [--output OUT.json]

The checkout's own dependencies must be installed beside ejmp: torch-scatter, torch-sparse, torch-geometric and what
else it asks for; what is missing is named. Both models have the same random weights, and the outputs of both are
compared before anything is timed. Atoms are moved by 0.01 A, so that no two neighbours are equally far and both build
the same graphs. Heads are left out: what is compared ends with the final MLP, on atoms and edges.
"""

import argparse
import dataclasses
import importlib
import json
import math
import site
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ase
import numpy as np
import torch
from ase.build import molecule
from torch import Tensor

import ejmp
from ejmp.markdown import markdown_table
from ejmp.measure.memory import peak_memory, tensors_of
from ejmp.measure.timing import Rounds, by_turns
from ejmp.measure.workloads import BUILT_IN, Workload, from_files
from ejmp.model.upstream import FIXED, NAMES
from ejmp.provenance import provenance
from ejmp.track.verdict import interval
from ejmp_kernels.allocator import keep_freed_memory

CPU = torch.device("cpu")
MODULES = ("models.gemnet.backbone", "models.gemnet.config", "utils.goc_graph")
AGREE = {"fp32": 1e-3, "bf16": 0.2}
"""Largest difference of the two models' outputs, as a share of the largest output."""
WHAT = ("graph", "forward", "training step")
"""What is compared: building the graph of structures; energies and forces of a graph; and their training."""
SIZES = {"jmp-s": ejmp.jmp_s, "jmp-l": ejmp.jmp_l}


def import_upstream(checkout: Path) -> SimpleNamespace:
    """Import what is needed from a checkout.

    Raises:
        SystemExit: if the folder is no checkout of JMP, another is installed, or a package that it needs is missing.
    """
    source = checkout / "src"
    if not (source / "jmp" / "models" / "gemnet" / "backbone.py").is_file():
        raise SystemExit(f"{checkout}: no checkout of JMP: src/jmp/models/gemnet/backbone.py is missing")
    site.addsitedir(str(source.resolve()))
    np.__dict__.setdefault("math", math)  # the public code asks for a name that numpy 2 has no longer
    try:
        found = {name.rpartition(".")[2]: importlib.import_module(f"jmp.{name}") for name in MODULES}
    except ImportError as error:
        raise SystemExit(
            f"{checkout}: its code needs a package that is not installed here ({error}); see its environment.yml"
        ) from error
    there = Path(str(found["backbone"].__file__)).resolve()
    if source.resolve() not in there.parents:
        raise SystemExit(f"{checkout}: another copy of the package jmp comes before it: {there}")
    return SimpleNamespace(**found)


class Upstream:
    """The public model with the weights of one of ours.

    Args:
        jmp: its modules, as `import_upstream` returns them.
        model: our model.
    """

    def __init__(self, jmp: SimpleNamespace, model: ejmp.JMP) -> None:
        self.jmp = jmp
        sizes = {theirs: getattr(model.config, ours) for theirs, ours in NAMES.items()}
        config = jmp.config.BackboneConfig(
            **sizes, **FIXED, direct_forces=True, regress_forces=True, dropout=None, edge_dropout=None
        )
        with redirect_stdout(sys.stderr):  # it prints while it is made
            self.backbone = jmp.backbone.GemNetOCBackbone(config, **dict(config))
        state = {name.removeprefix("backbone."): value for name, value in model.state_dict().items()}
        wanted = self.backbone.state_dict()
        self.backbone.load_state_dict({name: state[name] for name in wanted})
        self.embedding = model.embedding.atom_embedding.weight.detach()
        self.backbone.eval()

    def data(self, workload: Workload) -> Any:
        """Return structures as the public code takes them, before any graph."""
        geometric = importlib.import_module("torch_geometric.data")
        found = []
        for atoms in workload.structures:
            cell = atoms.cell.array if atoms.pbc.any() else [[1000.0, 0, 0], [0, 1000.0, 0], [0, 0, 1000.0]]
            found.append(
                geometric.Data(
                    pos=torch.tensor(atoms.positions, dtype=torch.float32),
                    atomic_numbers=torch.tensor(atoms.numbers),
                    cell=torch.tensor(cell, dtype=torch.float32)[None],
                    natoms=torch.tensor([len(atoms)]),
                    tags=torch.full((len(atoms),), 2),
                )
            )
        return found

    def graph(self, structures: Sequence[Any], workload: Workload) -> Any:
        """Return a batch of structures with their graphs."""
        build, geometric = self.jmp.goc_graph, importlib.import_module("torch_geometric.data")
        found = []
        for data, most in zip(structures, workload.max_neighbors, strict=True):
            graphs = build.generate_graphs(
                data,
                cutoffs=build.Cutoffs.from_constant(workload.cutoff),
                max_neighbors=build.MaxNeighbors.from_goc_base_proportions(most),
                pbc=True,
            )
            found.append(build.graphs_to_batch(data.clone(), graphs))
        return geometric.Batch.from_data_list(found)

    def features(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the outputs of the final MLP: of atoms [N, C], and of edges, added at their target atoms [N, M]."""
        h = self.embedding[batch.atomic_numbers - 1]
        out = self.backbone(batch, h=h)
        return out["energy"], _at_atoms(out["forces"], out["idx_t"], len(h))


def our_features(model: ejmp.JMP, graph: ejmp.AtomGraph) -> tuple[Tensor, Tensor]:
    """Return what `Upstream.features` does, of our model."""
    found = model.features(graph)
    return found.mlp_E[-1], _at_atoms(found.mlp_F[-1], graph.main.target, graph.num_atoms)


def _at_atoms(edges: Tensor, target: Tensor, atoms: int) -> Tensor:
    return edges.new_zeros(atoms, edges.shape[1]).index_add(0, target, edges)


def moved(structures: Sequence[Any]) -> list[ase.Atoms]:
    """Return structures as ase.Atoms, each atom moved a little."""
    found = [atoms.copy() if isinstance(atoms, ase.Atoms) else ase.Atoms(atoms) for atoms in structures]
    for number, atoms in enumerate(found):
        atoms.rattle(0.01, seed=number)
    return found


def workload_of(name: str) -> Workload:
    """Return a workload: a built-in one, a molecule that ase.build knows, or a file."""
    if name in BUILT_IN:
        found = BUILT_IN[name]()
    elif Path(name).exists():
        found = from_files(Path(name))
    else:
        found = Workload(name=name, structures=[molecule(name)], cutoff=8.0, max_neighbors=[30])
    return dataclasses.replace(found, structures=moved(found.structures))


Call = Callable[[], Any]


class Sides:
    """Both models on one workload, and what is timed of them.

    Args:
        upstream: the public model.
        model: ours, with the same weights.
        workload: structures.
        precision: "fp32", or "bf16": the public one under torch.autocast.
    """

    def __init__(self, upstream: Upstream, model: ejmp.JMP, workload: Workload, precision: str) -> None:
        self.upstream, self.model, self.workload = upstream, model, workload
        self.precision = precision
        self.structures = upstream.data(workload)
        self.batch, self.graph = self.their_graph(), self.our_graph()

    def their_graph(self) -> Any:
        """Build the public code's graphs."""
        return self.upstream.graph(self.structures, self.workload)

    def our_graph(self) -> ejmp.AtomGraph:
        """Build our graph."""
        work = self.workload
        return ejmp.build_graph(work.structures, work.cutoff, work.max_neighbors)

    def their_features(self) -> tuple[Tensor, Tensor]:
        """Run the public model."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            return self.upstream.features(self.batch)

    def our_features(self) -> tuple[Tensor, Tensor]:
        """Run our model."""
        return our_features(self.model, self.graph)

    def difference(self) -> float:
        """Return the largest difference of outputs on atoms or edges, as a share of the largest output."""
        with torch.no_grad():
            pairs = zip(self.their_features(), self.our_features(), strict=True)
            return max(float((a.float() - b.float()).abs().max() / a.float().abs().max()) for a, b in pairs)

    def calls(self) -> dict[str, tuple[Call, Call]]:
        """Return what is timed, the public code first."""

        def without_gradients(call: Call) -> Call:
            return torch.no_grad()(call)

        def step(features: Callable[[], tuple[Tensor, Tensor]], module: torch.nn.Module) -> Call:
            def run() -> None:
                module.zero_grad(set_to_none=True)
                torch.stack([each.float().square().mean() for each in features()]).sum().backward()

            return run

        pairs = (
            (self.their_graph, self.our_graph),
            (without_gradients(self.their_features), without_gradients(self.our_features)),
            (step(self.their_features, self.upstream.backbone), step(self.our_features, self.model)),
        )
        return dict(zip(WHAT, pairs, strict=True))

    def known(self) -> list[Any]:
        """Return tensors that are there before a call."""
        theirs = [*self.batch.to_dict().values(), *self.upstream.backbone.state_dict().values()]
        return [*theirs, *tensors_of(self.model, self.graph), self.upstream.embedding]


def compare(sides: Sides, only: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Time both by turns; return a row for each thing that is compared."""
    rows, known, calls = [], sides.known(), sides.calls()
    for what in only:
        theirs, ours = calls[what]
        seconds = by_turns({"upstream": theirs, "ejmp": ours}, CPU, Rounds(least=rounds))
        logs = [math.log(a / b) for a, b in zip(seconds["upstream"], seconds["ejmp"], strict=True)]
        found = interval(logs, 0.05)
        row = {
            "workload": sides.workload.name,
            "precision": sides.precision,
            "what": what,
            **{f"{name}_ms": 1e3 * statistics.median(each) for name, each in seconds.items()},
            "faster": math.exp(found.mean),
            "interval_95": [math.exp(found.lower), math.exp(found.upper)],
        }
        if what != "graph":
            row |= {
                f"{name}_peak_mib": peak_memory(call, CPU, known) / 2**20
                for name, call in {"upstream": theirs, "ejmp": ours}.items()
            }
        rows.append(row)
    return rows


def text_of(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    titles = ["structures", "precision", "what", "JMP, ms", "ejmp, ms", "times as fast", "memory, MiB"]
    cells = []
    for row in rows:
        low, high = row["interval_95"]
        memory = f"{row['upstream_peak_mib']:.0f} -> {row['ejmp_peak_mib']:.0f}" if "ejmp_peak_mib" in row else ""
        times = f"{row['faster']:.2f} ({low:.2f} to {high:.2f})"
        name = [row["workload"], row["precision"], row["what"]]
        cells.append([*name, f"{row['upstream_ms']:.1f}", f"{row['ejmp_ms']:.1f}", times, memory])
    return markdown_table(titles, cells)


def main() -> int:
    """Compare on every workload and at every precision; return 1 if the outputs differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of the public code")
    parser.add_argument("--model", choices=SIZES, default="jmp-l", help="sizes (default: jmp-l)")
    parser.add_argument("--blocks", type=int, default=6, help="interaction blocks (default: 6)")
    text = (
        f"structures: {', '.join(BUILT_IN)}, a molecule that ase.build knows, or a file (default: framework CH3CH2OH)"
    )
    parser.add_argument("--workloads", nargs="+", default=["framework", "CH3CH2OH"], help=text)
    parser.add_argument("--precisions", nargs="+", choices=AGREE, default=["fp32", "bf16"])
    text = "what to compare (default: all); a training step of JMP-L on the framework takes 20 GB"
    parser.add_argument("--only", nargs="+", choices=WHAT, default=WHAT, help=text)
    parser.add_argument("--rounds", type=int, default=10, help="of measuring each by turns (default: 10)")
    parser.add_argument("--output", type=Path, metavar="JSON")
    options = parser.parse_args()
    jmp = import_upstream(options.checkout)
    keep_freed_memory()
    torch.manual_seed(0)
    result: dict[str, Any] = {"command": " ".join(sys.argv), "provenance": provenance(CPU), "rows": []}
    model = ejmp.JMP(SIZES[options.model](blocks=options.blocks)).eval()
    upstream = Upstream(jmp, model)
    for name in options.workloads:
        workload = workload_of(name)
        for precision in options.precisions:
            sides = Sides(upstream, model.on(precision=precision), workload, precision)
            difference = sides.difference()
            print(f"{name}, {precision}: outputs differ by {difference:.1e} of the largest", file=sys.stderr)
            if difference > AGREE[precision]:
                print(f"{name}: more than {AGREE[precision]:g}: these are not the same models", file=sys.stderr)
                return 1
            rows = compare(sides, options.only, options.rounds)
            result["rows"] += [{**row, "difference": difference} for row in rows]
    print(text_of(result["rows"]))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
