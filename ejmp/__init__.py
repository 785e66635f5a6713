"""ejmp: JMP molecular foundation models, pruned, distilled, measured and fast."""

from ejmp.build import build_graph, graph_from_edges
from ejmp.graph import AtomGraph, EdgeSet
from ejmp.structure import Structure

__version__ = "0.1.0"
__all__ = ["AtomGraph", "EdgeSet", "Structure", "build_graph", "graph_from_edges"]
