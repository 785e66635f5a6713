"""ejmp: JMP molecular foundation models, pruned, distilled, measured and fast.

The public names are imported when they are first used, so that `launch/distill.py --help` need not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ejmp import data as data
    from ejmp import export as export
    from ejmp import pyg as pyg
    from ejmp import train as train
    from ejmp.compress.pruning import prune
    from ejmp.compress.relevance import block_relevance
    from ejmp.graph.build import build_graph, graph_from_edges
    from ejmp.graph.graph import AtomGraph, EdgeSet
    from ejmp.graph.settings import GraphSettings
    from ejmp.graph.structure import Structure
    from ejmp.model.checkpoint import load, save
    from ejmp.model.config import JMPConfig, jmp_l, jmp_s
    from ejmp.model.jmp import JMP, Features, Output, gradient_forces
    from ejmp.model.scale_factors import fit_scale_factors
    from ejmp.model.task import Task
    from ejmp.predict.calculator import Calculator
    from ejmp.predict.predictor import Prediction, Predictor

__version__ = "0.1.0"
__all__ = [
    "JMP",
    "AtomGraph",
    "Calculator",
    "EdgeSet",
    "Features",
    "GraphSettings",
    "JMPConfig",
    "Output",
    "Prediction",
    "Predictor",
    "Structure",
    "Task",
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
_MODULES = {
    "graph.build": ("build_graph", "graph_from_edges"),
    "model.checkpoint": ("load", "save"),
    "model.config": ("JMPConfig", "jmp_l", "jmp_s"),
    "graph.graph": ("AtomGraph", "EdgeSet"),
    "model.jmp": ("JMP", "Features", "Output", "gradient_forces"),
    "compress.pruning": ("prune",),
    "compress.relevance": ("block_relevance",),
    "model.scale_factors": ("fit_scale_factors",),
    "graph.settings": ("GraphSettings",),
    "graph.structure": ("Structure",),
    "model.task": ("Task",),
    "predict.calculator": ("Calculator",),
    "predict.predictor": ("Prediction", "Predictor"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in ("data", "export", "pyg", "train"):
        return importlib.import_module(f"ejmp.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'ejmp' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ejmp.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__", "data", "export", "pyg", "train"]
