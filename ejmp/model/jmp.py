"""JMP: embed atoms and edges, run the blocks, read each block out, and turn that into energies and forces."""

import copy
import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ejmp.graph.build import build_graph
from ejmp.graph.graph import AtomGraph
from ejmp.graph.padding import Buckets
from ejmp.model.backend import Backend, Kernels, check_backend, resolve
from ejmp.model.bases import Bases
from ejmp.model.compiled import Compiled, Mode
from ejmp.model.config import SIZES, JMPConfig, Precision
from ejmp.model.executor import Executor
from ejmp.model.fused_executor import FusedExecutor
from ejmp.model.heads import Heads
from ejmp.model.interactions import InteractionBlock, OutputBlock
from ejmp.model.layers import FinalMLP
from ejmp.model.outputs import Features, Output
from ejmp.model.precision import EIGHT_BITS, LOW_PRECISION, check_name, check_precision, products
from ejmp.model.quantized_executor import check_layers, in_eight_bits
from ejmp.model.reference_executor import ReferenceExecutor
from ejmp.model.regions import region
from ejmp.model.task import Task, check_tasks
from ejmp_kernels.derived import forget
from ejmp_kernels.registry import is_recorded

if TYPE_CHECKING:
    from collections.abc import Sequence


@torch.compiler.assume_constant_result
def _resolve(backend: Backend, device: str, dtype: torch.dtype) -> Kernels:
    """Call `resolve`; torch.compile does it once, while it traces, and does not look inside."""
    return resolve(backend, device, dtype)


class AtomEmbedding(nn.Module):
    """The features of atoms before the first block: a row per element, number Z - 1."""

    def __init__(self, config: JMPConfig) -> None:
        super().__init__()
        self.atom_embedding = nn.Embedding(config.num_elements, config.emb_size_atom)

    def forward(self, atomic_numbers: Tensor) -> Tensor:
        """Map [N] to [N, C]."""
        return self.atom_embedding(atomic_numbers - 1)


class Backbone(nn.Module):
    """The parameters of everything between the atom embedding and the heads."""

    def __init__(self, config: JMPConfig) -> None:
        super().__init__()
        self.bases = Bases(config)
        blocks = nn.ModuleList(InteractionBlock(config) for _ in range(config.blocks))
        self.int_blocks = cast("Sequence[InteractionBlock]", blocks)
        blocks = nn.ModuleList(OutputBlock(config) for _ in range(config.blocks + 1))
        self.out_blocks = cast("Sequence[OutputBlock]", blocks)
        num_outputs, num_layers = config.blocks + 1, config.num_global_out_layers
        self.out_mlp_E = FinalMLP(num_outputs, config.emb_size_atom, num_layers)
        if config.direct_forces:
            self.out_mlp_F = FinalMLP(num_outputs, config.emb_size_edge, num_layers)


class JMP(nn.Module):
    """A JMP model; its state dict has upstream's names, whatever the backend.

    Args:
        config: sizes; see `jmp_s`, `jmp_l`, `JMPConfig`; or "jmp-s" or "jmp-l", the sizes by name, with random weights
            (`ejmp.load` loads trained ones).
        backend: "reference" is plain torch; "native" the C++ and CUDA kernels; "triton" those in Triton; "auto" takes
            the first that serves device and precision of: on a GPU triton, native; on the CPU native; reference. State
            dict and results (to rounding) do not depend on it.
        precision: type of the linear maps. "fp32" computes in the parameters' own dtype (also float64); "bf16" and
            "fp16" run the linear maps of embedding, blocks and final MLP in the low type and geometry, bases,
            neighbour sums, heads and the atoms' residual stream in float32 (the edges' stream is in the low type);
            "tf32" is float32 with TF32 products in the forward pass; "int8" is "bf16" with the dense layers' products
            in 8-bit integers on CPUs with VNNI, and "fp8" with these in e4m3 on GPUs, for energies and direct forces,
            without derivatives; a model at "int8" in training mode rounds as these do and has derivatives. All but
            "fp32" need float32 parameters.
        tasks: what the heads predict, in which units and of which graphs; `ejmp.save` keeps them with the weights.

    Raises:
        ValueError: for an unknown size, backend or precision, or tasks that do not fit the heads; and, when called, for
            a precision the device does not have.
        RuntimeError: for a backend that cannot be had here, with the reason; and, when called, for one that does not
            serve the device or precision.
    """

    def __init__(
        self,
        config: JMPConfig | str,
        backend: Backend = "auto",
        precision: Precision = "fp32",
        *,
        tasks: Iterable[Task] = (),
    ) -> None:
        super().__init__()
        if isinstance(config, str):
            if config not in SIZES:
                raise ValueError(f"config: expected a JMPConfig or one of {', '.join(SIZES)}, got {config!r}")
            config = SIZES[config]()
        self.config = config
        self.tasks = tasks
        self.requested_backend: Backend = check_backend(backend)
        self.precision: Precision = check_name(precision)
        self.embedding = AtomEmbedding(config)
        self.backbone = Backbone(config)
        self.output = Heads(config)
        check_layers(config.bf16_layers, self)

    def on(self, *, backend: Backend | None = None, precision: Precision | None = None) -> "JMP":
        """Return this model on another backend or at another precision; both share all parameters and buffers.

        Args:
            backend: as for `JMP`; None keeps the present one.
            precision: as for `JMP`; None keeps the present one.

        Raises:
            ValueError: for an unknown backend or precision.
            RuntimeError: for a backend that cannot be had here, with the reason.
        """
        other = copy.copy(self)  # shallow, and never compiled
        if backend is not None:
            other.requested_backend = check_backend(backend)
        if precision is not None:
            other.precision = check_name(precision)
        return other

    def for_task(self, name: str | None = None) -> "JMP":
        """Return this model with the heads of one task alone, its number 0; both share all parameters and buffers.

        With direct forces, the heads of three other tasks take about as long as an interaction block in 16 bits.

        Args:
            name: name of the task; None is enough if there is only one.

        Raises:
            ValueError: as `task`.
        """
        task = self.task(name)
        other = self.on()
        other.config = dataclasses.replace(self.config, num_tasks=1)
        other.tasks = [dataclasses.replace(task, head=0)]
        heads = self.output.alone(task.head)
        other._modules = self._modules | {"output": heads}  # noqa: SLF001 - which a shallow copy would share
        return other

    def train(self, mode: bool = True) -> "JMP":
        """Set training mode; copies of weights that are held for evaluation are dropped, as `derived` says."""
        forget(self.parameters())
        return super().train(mode)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What the heads predict, in which units and of which graphs; empty if nobody said."""
        return self._tasks

    @tasks.setter
    def tasks(self, tasks: Iterable[Task]) -> None:
        self._tasks = check_tasks(tasks, self.config)

    def task(self, name: str | None = None) -> Task:
        """Return one of the model's tasks.

        Args:
            name: name of the task; None is enough if there is only one.

        Raises:
            ValueError: if the model does not say what its heads predict, or has no such task, naming those it has.
        """
        if not self.tasks:
            raise ValueError("model: it does not say what its heads predict; set model.tasks (see ejmp.Task)")
        found = [task for task in self.tasks if name in (None, task.name)]
        if len(found) != 1:
            names = ", ".join(task.name for task in self.tasks)
            raise ValueError(f"task: expected one of {names}, got {name!r}")
        return found[0]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return self.embedding.atom_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.embedding.atom_embedding.weight.device

    @property
    def backend(self) -> Kernels:
        """The backend that runs the model on its device, at its precision."""
        return _resolve(self.requested_backend, self.device.type, LOW_PRECISION.get(self.precision, self.dtype))

    def compile(
        self, mode: Mode = "throughput", *, buckets: Buckets | None = None, compiler: str | None = "auto"
    ) -> None:
        """Make `model(graph)` and `gradient_forces` fast for batches of a few shapes; this is the one switch for it.

        Graphs are padded to the next shape of a ladder with atoms and edges that change nothing, and results cut back,
        so they are those of the model as it is, to rounding. Parameters and state dict stay as they are. Training goes
        on working: what autograd records is compiled too, to first derivatives; `gradient_forces(create_graph=True)`
        and `features` run as before. Copies and pickles of the model are not compiled. Weights may change, move or be
        replaced; after replacing a whole layer, compile again.

        Args:
            mode: "throughput" compiles the forward pass, once per shape; "latency" also records it, and the gradient
                forces, as a CUDA graph per shape, which a call replays without launching kernel by kernel (what
                autograd records goes as in "throughput", so predict under torch.no_grad()); "off" undoes
                it.
            buckets: the ladder; default: one that grows with the graphs that come.
            compiler: torch.compile's backend; None leaves only padding and CUDA graphs. "auto" is inductor, but for
                "latency" on kernels None: inductor cannot look into them, and would cast weights in each replay.

        Raises:
            ValueError: for an unknown mode, or a model in 8 bits; and, when called, for a graph that fits in none of
                the buckets.
            RuntimeError: for "latency" without a GPU.
        """
        if self.precision in EIGHT_BITS and mode != "off":
            raise ValueError(f'compile: a model at precision="{self.precision}" runs as it is, and cannot be compiled')
        if compiler == "auto":
            compiler = None if mode == "latency" and self.backend != "reference" else "inductor"
        # where nn.Module.compile puts what it made: a call takes it, `forward` does not, no copy and no pickle has it
        self._compiled_call_impl = None if mode == "off" else Compiled(self, mode, buckets, compiler)

    @property
    def compiled(self) -> Compiled | None:
        """The wrapper that `compile` made, or None."""
        return cast("Compiled | None", self._compiled_call_impl)

    def forward(self, graph: Any, *, direct_forces: bool = True) -> Output:
        """Predict energies and, if the model has them, direct forces.

        Args:
            graph: a batch whose dtype and device are the model's; or ase.Atoms, an `ejmp.Structure` or a list of them,
                for a model with one task, whose graph settings make the graph.
            direct_forces: False skips the force branch of a model that has one.

        Raises:
            ValueError: if the graph's dtype or device is not the model's; for structures that no graph can be made of,
                or given to a model that does not have exactly one task.
        """
        graph = self.as_graph(graph)
        return self.heads(self.features(graph, direct_forces=direct_forces), graph)

    def as_graph(self, given: Any) -> AtomGraph:
        """Return a graph as it is, and one of structures as the model's only task makes it. Raises as `forward`."""
        if isinstance(given, AtomGraph):
            return given
        if len(self.tasks) != 1:
            names = ", ".join(task.name for task in self.tasks) or "none"
            raise ValueError(
                f"graph: expected an AtomGraph, got {type(given).__name__}, and the model's tasks ({names}) do not say "
                "which graph to make of it; use ejmp.build_graph(structures, settings=...), or ejmp.Predictor(model, "
                "task=...) for results in eV"
            )
        return build_graph(given, settings=self.tasks[0].graph, device=self.device, dtype=self.dtype)

    def features(self, graph: AtomGraph, *, direct_forces: bool = True) -> Features:
        """Run everything but the heads; `heads` turns the result into an `Output`. Arguments as for `forward`."""
        self.check_graph(graph)
        return self.run(self.executor(graph), direct_forces=direct_forces)

    def executor(self, graph: AtomGraph) -> Executor:
        """Return what computes the steps of a forward pass on a graph: the one place that asks for the backend."""
        backend, low = self.backend, LOW_PRECISION.get(self.precision)
        if self.precision in EIGHT_BITS:
            exact = [self.get_submodule(name) for name in self.config.bf16_layers]
            recorded = is_recorded(graph.positions, *self.parameters())
            kind = "int8 training" if self._trains_for_8_bits else self.precision
            return in_eight_bits(graph, kind, backend, exact, recorded=recorded)
        if backend == "reference":
            return ReferenceExecutor(graph, low)
        return FusedExecutor(graph, low, backend, hold=not self.training)

    @property
    def _trains_for_8_bits(self) -> bool:
        return self.precision == "int8" and self.training and torch.is_grad_enabled()

    def run(self, executor: Executor, *, direct_forces: bool = True) -> Features:
        """Take the steps of a forward pass, up to the heads, on an executor.

        Args:
            executor: whose graph is the model's input.
            direct_forces: as for `forward`.
        """
        backbone, forces = self.backbone, direct_forces and self.config.direct_forces
        x_E, x_F = [], []
        with products(self.precision), executor.linear_maps():
            with region("embedding"):
                h = self.embedding(executor.graph.atomic_numbers)
            m = executor.embed(backbone.bases, h)
            for i, out_block in enumerate(backbone.out_blocks):
                if i > 0:
                    with region(f"block {i - 1}"):
                        h, m = executor.block(backbone.int_blocks[i - 1], h, m)
                with region(f"output block {i}"):
                    x_E.append(executor.energy(out_block, h, m))
                    if forces:
                        x_F.append(executor.forces(out_block, m))
        return self._final_mlp(executor, tuple(x_E), tuple(x_F))

    def final_mlp(self, x_E: tuple[Tensor, ...], x_F: tuple[Tensor, ...], graph: AtomGraph) -> Features:
        """Run the final MLP on outputs of blocks, the embedding's first: the end of `features`.

        Of the first blocks alone, it gives what the model pruned to these gives: missing outputs count as zero, and
        the first layer, which has no bias, takes no notice of them.

        Args:
            x_E: blocks + 1 tensors [N, C], or fewer.
            x_F: blocks + 1 tensors [E, M], or as many as there are of x_E, or none.
            graph: the batch whose atoms and edges these are.
        """
        return self._final_mlp(self.executor(graph), x_E, x_F)

    def _final_mlp(self, executor: Executor, x_E: tuple[Tensor, ...], x_F: tuple[Tensor, ...]) -> Features:
        backbone = self.backbone
        with products(self.precision), executor.linear_maps(), region("final_mlp"):
            missing = self.config.blocks + 1 - len(x_E)
            mlp_E = executor.final_mlp(backbone.out_mlp_E, x_E + (torch.zeros_like(x_E[0]),) * missing)
            mlp_F = ()
            if x_F:
                mlp_F = executor.final_mlp(backbone.out_mlp_F, x_F + (torch.zeros_like(x_F[0]),) * missing)
        return Features(x_E=x_E, x_F=x_F, mlp_E=mlp_E, mlp_F=mlp_F)

    def heads(self, features: Features, graph: AtomGraph) -> Output:
        """Turn the last layer of the final MLP into energies and direct forces, in the parameters' dtype."""
        executor = self.executor(graph)
        with region("heads"):
            atoms = features.mlp_E[-1].to(self.dtype)
            per_atom = torch.cat([executor.head(head, atoms) for head in self.output.out_energy], dim=1)
            energy = executor.sum_by_target(per_atom, graph.batch, graph.ptr)
            if self.config.energy_reduction == "mean":
                energy = energy / graph.ptr.diff()[:, None]
            if not features.mlp_F:
                return Output(energy=energy, forces=None, energies=per_atom)
            edges = features.mlp_F[-1].to(self.dtype)
            magnitude = torch.stack([executor.head(head, edges) for head in self.output.out_forces], dim=1)
            if self.config.forces_coupled:
                assert graph.main.swap is not None
                magnitude = 0.5 * (magnitude + magnitude.index_select(0, graph.main.swap))
            parts = (magnitude * graph.main.vector[:, None]).flatten(1)
            forces = executor.sum_by_target(parts, graph.main.target, graph.main.ptr).unflatten(1, (-1, 3))
            return Output(energy=energy, forces=forces, energies=per_atom)

    def check_graph(self, graph: AtomGraph) -> None:
        """Raise ValueError if the model cannot run on a graph.

        Raises:
            ValueError: if the graph's dtype or device is not the model's, it has an element that the model does not
                know (this is seen on the CPU only), or the model's precision is not to be had.
        """
        if graph.dtype != self.dtype:
            raise ValueError(f"graph: expected dtype {self.dtype} (the model's), got {graph.dtype}; use graph.to()")
        if graph.device != self.device:
            raise ValueError(f"graph: expected device {self.device} (the model's), got {graph.device}")
        if graph.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would wait for the device
            heaviest = int(graph.atomic_numbers.max())
            if heaviest > self.config.num_elements:
                raise ValueError(
                    f"graph: atomic number {heaviest} is beyond the {self.config.num_elements} elements of the model"
                )
        if self.precision == "fp32" or torch.compiler.is_compiling():
            return
        if self.dtype != torch.float32:
            raise ValueError(f"precision={self.precision!r} needs float32 parameters, the model has {self.dtype}")
        check_precision("bf16" if self._trains_for_8_bits else self.precision, graph.device)


def gradient_forces(model: JMP, graph: AtomGraph, task: int = 0, *, create_graph: bool = False) -> Tensor:
    """Return the negative gradient of one task's raw energy, [N, 3]; times the task's std they are forces in eV/A.

    Args:
        model: any JMP model; its direct-force branch is not run.
        graph: a batch.
        task: which energy head.
        create_graph: keep the autograd graph, to differentiate the forces again (training on forces).

    Raises:
        ValueError: if the task does not exist.
    """
    if not 0 <= task < model.config.num_tasks:
        raise ValueError(f"task: expected 0..{model.config.num_tasks - 1}, got {task}")
    compiled = model.compiled
    if compiled is not None and not create_graph:
        return compiled.gradient_forces(graph, task)
    run = model if compiled is None else model.forward  # torch.compile differentiates once only
    with torch.enable_grad():
        positions = graph.positions if graph.positions.requires_grad else graph.positions.detach().requires_grad_()
        energy = run(graph.with_positions(positions), direct_forces=False).energy[:, task].sum()
        (gradient,) = torch.autograd.grad(energy, positions, create_graph=create_graph)
    return -gradient.to(model.dtype)
