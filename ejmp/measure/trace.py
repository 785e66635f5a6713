"""A picture of some forward passes over time: torch's profiler, with the parts of the model as spans."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ejmp.graph.graph import AtomGraph
from ejmp.measure.timing import synchronize
from ejmp.model.jmp import JMP
from ejmp.model.regions import observed_by


class Spans:
    """Observes the regions of a forward pass: each becomes a span of the trace."""

    def __init__(self) -> None:
        self.inside: list[record_function] = []

    def enter(self, name: str) -> None:
        """Begin a span."""
        self.inside.append(record_function(name))
        self.inside[-1].__enter__()

    def leave(self) -> None:
        """End the span that began last."""
        self.inside.pop().__exit__(None, None, None)


@torch.no_grad()
def write_trace(model: JMP, graph: AtomGraph, path: Path, *, steps: int = 3) -> None:
    """Write a Chrome trace of forward passes, for chrome://tracing or https://ui.perfetto.dev.

    Spans are "step 0", "step 1", ..., the parts of the model (`ejmp.model.regions`) in them, the ops in these, and on
    CUDA the kernels. One pass before the first warms up and is not in the trace.

    Args:
        model: model to run, at its precision, on its backend.
        graph: batch to run it on.
        path: JSON file to write, or one compressed by gzip if its name ends in .gz.
        steps: number of passes.

    Raises:
        OSError: if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("a").close()  # torch would only log that it cannot be written
    model.forward(graph)
    synchronize(graph.device)
    cuda = [ProfilerActivity.CUDA] if graph.device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as profiler, observed_by(Spans()):
        for step in range(steps):
            with record_function(f"step {step}"):
                model.forward(graph)
                synchronize(graph.device)
    profiler.export_chrome_trace(str(path))
