"""The compiled model: padded graphs of few shapes, torch.compile without graph breaks, CUDA graphs.

`JMP.compile` says what it does for its caller. A `Compiled` wraps a model: one call pads the graph
(`ejmp.graph.padding`), runs traced code or replays a CUDA graph, and cuts the result back to the real structures and
atoms. Nothing in it waits for the device.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor, nn

from ejmp.graph.graph import AtomGraph, EdgeSet
from ejmp.graph.padding import Buckets, GraphShape, pad_graph
from ejmp.model.config import JMPConfig, Precision
from ejmp.model.outputs import Features, Output
from ejmp.model.precision import tf32_products
from ejmp_kernels.derived import RecordedCopies
from ejmp_kernels.registry import is_recorded

Mode = Literal["throughput", "latency", "off"]
Location = tuple[Mapping[str, Tensor | None], str]
"""Where a module keeps a parameter or buffer: its dictionary of them, and the name there."""
Value = TypeVar("Value", AtomGraph, EdgeSet)
Result = tuple[Tensor, ...]
WARM_UP = 3
"""Number of runs before a CUDA graph is recorded: they compile, load and choose what is compiled, loaded and chosen
once."""
_SHAPES = 1 << 10
"""Number of shapes that are traced, more than torch.compile would by default."""


class Recorder(Protocol):
    """Runs a function that launches kernels, and returns its result and how to launch the same again."""

    def __call__(self, function: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Record one run."""
        ...


class Compilable(Protocol):
    """What is asked of a model; `ejmp.JMP` is one."""

    config: JMPConfig
    precision: Precision

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        ...

    def check_graph(self, graph: AtomGraph) -> None:
        """Raise ValueError if the model cannot run on a graph."""
        ...

    def forward(self, graph: AtomGraph, *, direct_forces: bool) -> Output:
        """Run the model as it is, without what `Compiled` adds."""
        ...

    def as_graph(self, given: Any) -> AtomGraph:
        """Make a graph of structures."""
        ...

    def features(self, graph: AtomGraph, *, direct_forces: bool) -> Features:
        """Run everything but the heads."""
        ...

    def heads(self, features: Features, graph: AtomGraph) -> Output:
        """Run the heads."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Return the model and all modules in it."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return all parameters."""
        ...

    def buffers(self) -> Iterator[Tensor]:
        """Return all buffers."""
        ...


class Compiled:
    """A model that runs padded graphs through traced code or CUDA graphs; `JMP.compile` makes one.

    Args:
        model: whose parameters are used.
        mode: "throughput" or "latency".
        buckets: shapes; default: a ladder that grows.
        compiler: of torch.compile, or None for none.
    """

    def __init__(self, model: Compilable, mode: Mode, buckets: Buckets | None, compiler: str | None) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode: expected one of {get_args(Mode)}, got {mode!r}")
        self.record: Recorder | None = None
        if mode == "latency":
            if model.device.type != "cuda":
                raise RuntimeError(f'mode="latency" needs a CUDA device, the model is on {model.device}')
            self.record = CudaGraphs()
        self.model = model
        self.buckets = Buckets() if buckets is None else buckets
        self._forward, self._features, self._heads = (_traced(f, compiler) for f in (_forward, _features, _heads))
        self._seen: set[tuple] = set()
        self._frozen: Compilable | None = None
        self._replays: dict[tuple, Replay] = {}
        self._copies = RecordedCopies()
        self._locations = list(_locations(model))
        self._addresses = self._where()

    def __call__(self, graph: Any, *, direct_forces: bool = True) -> Output:
        """Return what the model's `forward` returns."""
        graph = self.model.as_graph(graph)
        self._prepare(graph)
        shape = self.buckets.choose(graph)
        forces = direct_forces and self.model.config.direct_forces

        def run(padded: AtomGraph) -> Result:
            out = self._run(self.model, padded, shape, forces=forces)
            return tuple(value for value in (out.energy, out.energies, out.forces) if value is not None)

        padded = pad_graph(graph, shape)
        result = run(padded) if self._recorded(graph) else self._replayed(("forward", shape, forces), run, padded)
        sizes = graph.num_structures, graph.num_atoms, graph.num_atoms
        energy, energies, *direct = [value[:size] for value, size in zip(result, sizes, strict=False)]
        return Output(energy=energy, forces=direct[0] if direct else None, energies=energies)

    def gradient_forces(self, graph: AtomGraph, task: int) -> Tensor:
        """Return what `ejmp.gradient_forces` returns, for forces that nobody differentiates, [N, 3]."""
        self._prepare(graph)
        shape = self.buckets.choose(graph)
        if self._frozen is None:
            self._frozen, self._addresses = frozen(self.model), self._where()
        model = self._frozen

        def run(padded: AtomGraph) -> Result:
            with torch.enable_grad():
                positions = padded.positions.detach().requires_grad_()
                moved = padded.with_positions(positions)
                energy = self._run(model, moved, shape, forces=False).energy[:, task].sum()
                return torch.autograd.grad(energy, positions)

        with torch.no_grad():
            padded = pad_graph(graph, shape)
            (gradient,) = self._replayed(("gradient", shape, task), run, padded)
        return -gradient[: graph.num_atoms].to(self.model.dtype)

    def _prepare(self, graph: AtomGraph) -> None:
        """Check what traced code does not, and drop what holds on to where the parameters were."""
        self.model.check_graph(graph)
        if isinstance(self.record, CudaGraphs) and graph.device.type != "cuda":
            raise RuntimeError(f'mode="latency" needs a CUDA device, the graph is on {graph.device}')
        if self.record is None and self._frozen is None:
            return  # traced code asks the modules for their parameters
        addresses = self._where()
        if addresses != self._addresses:  # moved, converted, or loaded by assignment
            self._addresses = addresses
            self._frozen = None
            self._replays.clear()
            self._copies = RecordedCopies()

    def _where(self) -> list[int]:
        """Return the addresses of all parameters and buffers, in some 0.1 ms."""
        tensors = (tensors[name] for tensors, name in self._locations)
        return [x.data_ptr() for x in tensors if x is not None]

    def _recorded(self, graph: AtomGraph) -> bool:
        """Return whether autograd records a call."""
        given = (graph.positions, graph.main.distance, graph.main.vector)
        return is_recorded(*given, *self.model.parameters())

    def _run(self, model: Compilable, graph: AtomGraph, shape: GraphShape, *, forces: bool) -> Output:
        """Run traced code, and trace it for a new shape."""
        key = (shape, forces, model is self.model, torch.is_grad_enabled())
        if key in self._seen:
            return self._traced_run(model, graph, forces=forces)
        self._seen.add(key)
        with torch._dynamo.config.patch(recompile_limit=_SHAPES):  # noqa: SLF001 - documented under this name
            return self._traced_run(model, graph, forces=forces)

    def _traced_run(self, model: Compilable, graph: AtomGraph, *, forces: bool) -> Output:
        if model.precision != "tf32":
            return self._forward(model, graph, forces)
        with tf32_products():  # not the heads
            features = self._features(model, graph, forces)
        return self._heads(model, features, graph)

    def _replayed(self, key: tuple, run: Callable[[AtomGraph], Result], graph: AtomGraph) -> Result:
        """Run, or replay a CUDA graph of it."""
        if self.record is None:
            return run(graph)
        if key not in self._replays:
            with self._copies.used():
                self._replays[key] = Replay(run, graph, self.record)
        self._copies.refresh()
        return self._replays[key](graph)


def _forward(model: Compilable, graph: AtomGraph, forces: bool) -> Output:
    return model.forward(graph, direct_forces=forces)


def _features(model: Compilable, graph: AtomGraph, forces: bool) -> Features:
    return model.features(graph, direct_forces=forces)


def _heads(model: Compilable, features: Features, graph: AtomGraph) -> Output:
    return model.heads(features, graph)


def _traced(function: Callable[..., Any], compiler: str | None) -> Callable[..., Any]:
    return function if compiler is None else torch.compile(function, backend=compiler, fullgraph=True, dynamic=False)


def _locations(model: Compilable) -> Iterator[Location]:
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):  # noqa: SLF001 - .to() and loading replace what is in them
            yield from ((tensors, name) for name in tensors)


def frozen(model: Compilable) -> Compilable:
    """Return a model on the same memory whose parameters take no gradients, so that nothing computes them."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, shared)


class Replay:
    """A function of a graph that is recorded once and replayed on other graphs of the same shape.

    Args:
        function: what to record; it waits for nothing.
        graph: an example.
        record: how.
    """

    def __init__(self, function: Callable[[AtomGraph], Result], graph: AtomGraph, record: Recorder) -> None:
        with torch.inference_mode(mode=False):  # or else nobody could write to them outside it
            self._graph = _cloned(graph)
        self._inputs = _by_type(self._graph)
        with torch.cuda.device_of(graph.positions):
            self._outputs, self._launch = record(lambda: function(self._graph))

    def __call__(self, graph: AtomGraph) -> Result:
        """Return the function's result for a graph, in new memory."""
        with torch.no_grad(), torch.cuda.device_of(graph.positions):
            given = _by_type(graph)
            for dtype, inputs in self._inputs.items():  # a launch per type: one each would take longer than the replay
                torch._foreach_copy_(inputs, given[dtype])  # pyright: ignore[reportPrivateImportUsage]
            self._launch()
            return tuple(value.clone() for value in self._outputs)


class CudaGraphs:
    """Records functions as CUDA graphs of the current device.

    All of them share one pool of memory per device: whoever uses them replays one at a time, and copies its results.
    """

    def __init__(self) -> None:
        self._pools: dict[int, Any] = {}

    def __call__(self, function: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Record a function, after runs on a stream of their own."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        device = torch.cuda.current_device()
        if device not in self._pools:
            self._pools[device] = torch.cuda.graph_pool_handle()
        cuda_graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(cuda_graph, pool=self._pools[device]):
            result = function()
        return result, cuda_graph.replay


def _by_type(graph: AtomGraph) -> dict[torch.dtype, list[Tensor]]:
    """Return the tensors of a graph by type: torch copies many tensors in one launch only if they are of one type."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in _tensors(graph):
        found.setdefault(tensor.dtype, []).append(tensor)
    return found


def _tensors(value: AtomGraph | EdgeSet) -> Iterator[Tensor]:
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if isinstance(item, EdgeSet):
            yield from _tensors(item)
        elif isinstance(item, Tensor):
            yield item


def _cloned(value: Value) -> Value:
    items = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    new = {name: _cloned(item) for name, item in items.items() if isinstance(item, EdgeSet)}
    new |= {name: item.detach().clone() for name, item in items.items() if isinstance(item, Tensor)}
    return dataclasses.replace(value, **new)
