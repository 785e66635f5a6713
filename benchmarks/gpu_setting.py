"""Where the GPU campaign runs and how much of it: the device, the model's sizes, the batches."""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ejmp
from ejmp.measure import bench, workloads
from ejmp.measure.flops import GraphSizes, graph_sizes
from ejmp.measure.rates import precisions_of

NAMED = ("fp32", "tf32", "fp16", "bf16")
"""Precisions in the order of the tables."""
NARROW = ("atom", "edge", "trip_in", "trip_out", "quad_in", "quad_out", "pair_in", "pair_out", "rbf")
TINY = ejmp.JMPConfig(
    num_tasks=1,
    direct_forces=False,
    emb_size_cbf=4,
    emb_size_sbf=4,
    num_radial=16,
    num_spherical=3,
    num_before_skip=1,
    num_after_skip=0,
    num_concat=1,
    num_atom=1,
    num_output_after_atom=0,
    num_atom_emb_layers=0,
    num_global_out_layers=1,
    **{f"emb_size_{name}": 16 for name in NARROW},
)
"""Sizes of the dry run's model: every kind of layer, each as small as Triton's products allow."""
PEROXIDE = ((8, 8, 1, 1), ((0.0, 0.73, 0), (0, -0.73, 0), (0.8, 0.9, 0.5), (-0.75, -0.95, 0.5)))
"""The smallest molecule with quadruplets: atomic numbers, and positions in A."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where the campaign runs, and how much of it."""

    device: torch.device
    """Device that is measured."""
    dry: bool
    """Whether this is a dry run: on the CPU, with tiny sizes."""
    out: Path
    """Folder of the results."""
    seconds: float
    """Budget of a step, in s; it starts no more rows after it."""

    @property
    def config(self) -> ejmp.JMPConfig:
        """Sizes of the model that is measured."""
        return TINY if self.dry else ejmp.jmp_l(scalar=True)

    @property
    def model_name(self) -> str:
        """Name of that model, for the results."""
        return "tiny model of the dry run" if self.dry else "JMP-L scalar"

    @property
    def precisions(self) -> list[str]:
        """Precisions to measure, in the tables' order; a dry run takes one, because the interpreter has no bf16."""
        found = precisions_of(self.device)
        return ["fp32"] if self.dry else [p for p in NAMED if p in found]

    def workload(self, structures: int) -> workloads.Workload:
        """Return a batch of at most four different structures, repeated, so that sizes are exact multiples."""
        if self.dry:
            found = [ejmp.Structure(numbers=PEROXIDE[0], positions=PEROXIDE[1])] * structures
            return workloads.Workload(name="peroxide", structures=found, cutoff=6.0, max_neighbors=[8] * structures)
        made = workloads.rocksalt(min(structures, 4))
        found = list(itertools.islice(itertools.cycle(made.structures), structures))
        return dataclasses.replace(made, structures=found, max_neighbors=[30] * structures)

    def graph(self, structures: int, **options: Any) -> ejmp.AtomGraph:
        """Build the graph of that batch on the device; options as for `ejmp.build_graph`."""
        return bench.workload_graph(self.workload(structures), device=self.device, **options)

    def sizes(self, structures: int) -> GraphSizes:
        """Count a part of that batch and multiply, because counting lists all quadruplets."""
        part = min(structures, 4)
        if structures % part:
            return graph_sizes(self.graph(structures))
        found = dataclasses.asdict(graph_sizes(self.graph(part)))
        return GraphSizes(**{name: value * structures // part for name, value in found.items()})


def make_model(setting: Setting, blocks: int = 6, *, forces: bool = False) -> ejmp.JMP:
    """Return a model with random weights, the same for every call."""
    torch.manual_seed(0)
    model = ejmp.JMP(dataclasses.replace(setting.config, blocks=blocks, direct_forces=forces))
    return model.to(setting.device).eval()
