"""ejmp: JMP molecular foundation models, pruned, distilled, measured and fast."""

from ejmp.build import build_graph, graph_from_edges
from ejmp.checkpoint import load, save
from ejmp.config import JMPConfig, jmp_l, jmp_s
from ejmp.graph import AtomGraph, EdgeSet
from ejmp.model import JMP, Features, Output, gradient_forces
from ejmp.prune import prune
from ejmp.relevance import block_relevance
from ejmp.scaling import fit_scale_factors
from ejmp.structure import Structure

__version__ = "0.1.0"
__all__ = [
    "JMP",
    "AtomGraph",
    "EdgeSet",
    "Features",
    "JMPConfig",
    "Output",
    "Structure",
    "block_relevance",
    "build_graph",
    "fit_scale_factors",
    "gradient_forces",
    "graph_from_edges",
    "jmp_l",
    "jmp_s",
    "load",
    "prune",
    "save",
]
