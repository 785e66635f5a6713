"""JMP: embed atoms and edges, run the blocks, read each block out, and turn that into energies and forces."""

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, get_args

import torch
from torch import Tensor, nn

from ejmp.graph.graph import AtomGraph
from ejmp.model.angle_tables import compute_geometry
from ejmp.model.backend import Backend, Kernels, resolve
from ejmp.model.backend import check as check_backend
from ejmp.model.bases import Bases
from ejmp.model.config import JMPConfig, Precision
from ejmp.model.interactions import BlockInputs, InteractionBlock, OutputBlock
from ejmp.model.layers import Dense, Residual, ScaledSiLU
from ejmp_kernels import specification
from ejmp_kernels.edge_embedding import edge_sum

if TYPE_CHECKING:
    from ejmp.graph.padding import Buckets
    from ejmp.model.compiled import Compiled, Mode
    from ejmp.model.fused import Fused

LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


@torch.compiler.assume_constant_result
def _resolve(backend: Backend, device: str, dtype: torch.dtype) -> Kernels:
    """Call `resolve`; torch.compile does it once, while it traces, and does not look inside."""
    return resolve(backend, device, dtype)


@dataclass(frozen=True, kw_only=True)
class Features:
    """What distillation and block relevance read; the embedding's output block comes first.

    Gradients of an output with respect to any of these are those of the model.
    """

    x_E: tuple[Tensor, ...]
    """blocks + 1 tensors [N, C]."""
    x_F: tuple[Tensor, ...]
    """blocks + 1 tensors [E, M] in the order of graph.main; empty without direct forces."""
    mlp_E: tuple[Tensor, ...]
    """Output of each layer of the final MLP, [N, C]; the heads read the last."""
    mlp_F: tuple[Tensor, ...]
    """The same on edges, [E, M]; empty without direct forces."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """Energies and direct forces of a batch."""

    energy: Tensor
    """[B, T], eV (per atom for energy_reduction="mean")."""
    forces: Tensor | None
    """[N, T, 3], eV/A; None without direct forces (use `ejmp.gradient_forces`)."""


class AtomEmbedding(nn.Module):
    """One row per element, Z - 1."""

    def __init__(self, config: JMPConfig) -> None:
        super().__init__()
        self.atom_embedding = nn.Embedding(config.num_elements, config.emb_size_atom)

    def forward(self, atomic_numbers: Tensor) -> Tensor:
        """Map [N] to [N, C]."""
        return self.atom_embedding(atomic_numbers - 1)


class FinalMLP(nn.Module):
    """Join the outputs of all blocks: Dense down to the size of one, then residuals (the paper's g)."""

    def __init__(self, num_outputs: int, size: int, num_layers: int) -> None:
        super().__init__()
        self.out_mlp = nn.ModuleList([Dense(num_outputs * size, size), *(Residual(size) for _ in range(num_layers))])

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Map blocks + 1 tensors [., size] to the output of each layer, [., size]."""
        value = torch.cat(x, dim=-1)
        outputs = []
        for layer in self.out_mlp:
            value = layer(value)
            outputs.append(value)
        return tuple(outputs)


class Backbone(nn.Module):
    """Everything between the atom embedding and the heads."""

    def __init__(self, config: JMPConfig) -> None:
        super().__init__()
        self.bases = Bases(config)
        self.int_blocks = nn.ModuleList(InteractionBlock(config) for _ in range(config.blocks))
        self.out_blocks = nn.ModuleList(OutputBlock(config) for _ in range(config.blocks + 1))
        num_outputs, num_layers = config.blocks + 1, config.num_global_out_layers
        self.out_mlp_E = FinalMLP(num_outputs, config.emb_size_atom, num_layers)
        if config.direct_forces:
            self.out_mlp_F = FinalMLP(num_outputs, config.emb_size_edge, num_layers)


def _head(size: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(size, size), ScaledSiLU()]
    return nn.Sequential(*layers, nn.Linear(size, 1, bias=False))


class Heads(nn.Module):
    """One head per task, on atoms for energies and on edges for direct forces."""

    def __init__(self, config: JMPConfig) -> None:
        super().__init__()
        self.out_energy = nn.ModuleList(_head(config.emb_size_atom) for _ in range(config.num_tasks))
        if config.direct_forces:
            self.out_forces = nn.ModuleList(_head(config.emb_size_edge) for _ in range(config.num_tasks))


class JMP(nn.Module):
    """A JMP model; its state dict has upstream's names, whatever the backend.

    Args:
        config: sizes; see `jmp_s`, `jmp_l`, `JMPConfig`.
        backend: "reference" is plain torch; "native" the C++ and CUDA kernels; "triton" those in Triton; "auto" takes
            the first that serves device and precision of: on a GPU triton, native; on the CPU native; reference. State
            dict and results (to rounding) do not depend on it.
        precision: type of the linear maps. "fp32" computes in the parameters' own dtype (also float64); "bf16" and
            "fp16" run the linear maps of embedding, blocks and final MLP in the low type and geometry, bases,
            neighbour sums, heads and the atoms' residual stream in float32 (the edges' stream is in the low type);
            "tf32" is float32 with TF32 products in the forward pass. All but "fp32" need float32 parameters.

    Raises:
        ValueError: for an unknown backend or precision; and, when called, for a precision the device does not have.
        RuntimeError: for a backend that cannot be had here, with the reason; and, when called, for one that does not
            serve the device or precision.
    """

    def __init__(
        self,
        config: JMPConfig,
        backend: Backend = "auto",
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        self.config = config
        self.requested_backend: Backend = check_backend(backend)
        if backend != "reference":
            importlib.import_module("ejmp.model.fused")  # registers its ops, before anybody counts or traces them
        self.precision: Precision = check_name(precision)
        self.embedding = AtomEmbedding(config)
        self.backbone = Backbone(config)
        self.output = Heads(config)

    compiled: "Compiled | None" = None
    """What `compile` made; never copied or saved."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was compiled."""
        return {name: value for name, value in super().__getstate__().items() if name != "compiled"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the parameters, as torch calls it; CUDA graphs of the old ones are of no use then."""
        if self.compiled is not None:
            self.compiled.forget()
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """Load as torch does, and forget CUDA graphs, whose parameters may be others now."""
        if self.compiled is not None:
            self.compiled.forget()
        return super().load_state_dict(*args, **options)

    def on(self, *, backend: Backend | None = None, precision: Precision | None = None) -> "JMP":
        """Return this model on another backend or at another precision; both share all parameters and buffers.

        Args:
            backend: as for `JMP`; None keeps the present one.
            precision: as for `JMP`; None keeps the present one.

        Raises:
            ValueError: for an unknown backend or precision.
            RuntimeError: for a backend that cannot be had here, with the reason.
        """
        other = copy.copy(self)
        other.compiled = None
        if backend is not None:
            other.requested_backend = check_backend(backend)
        if precision is not None:
            other.precision = check_name(precision)
        return other

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return self.embedding.atom_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embedding.atom_embedding.weight.device

    @property
    def backend(self) -> Kernels:
        """What runs the model where it is, at its precision."""
        return _resolve(self.requested_backend, self.device.type, LOW_PRECISION.get(self.precision, self.dtype))

    def compile(
        self, mode: "Mode" = "throughput", *, buckets: "Buckets | None" = None, compiler: str | None = "inductor"
    ) -> None:
        """Make `model(graph)` and `gradient_forces` fast, for batches of a few shapes; the one switch for it.

        Graphs are padded to the next shape of a ladder with atoms and edges that change nothing, and results cut back,
        so they are those of the plain model to rounding. Parameters and state dict stay as they are. Training goes on
        working: what autograd records is compiled too, to first derivatives; `gradient_forces(create_graph=True)` and
        `features` run plainly. Copies and pickles of the model are plain ones. Weights may change in place; after
        replacing a parameter by hand, compile again.

        Args:
            mode: "throughput" compiles the forward pass, once per shape; "latency" also records it, and the gradient
                forces, as a CUDA graph per shape, which a call replays without launching kernel by kernel (what
                autograd records goes as in "throughput", so predict under torch.no_grad()); "off" returns to the plain
                model.
            buckets: the ladder; default: one that grows with the graphs that come.
            compiler: torch.compile's backend; None leaves only padding and CUDA graphs.

        Raises:
            ValueError: for an unknown mode; and, when called, for a graph that fits in none of the buckets.
            RuntimeError: for "latency" without a GPU.
        """
        from ejmp.model.compiled import Compiled  # noqa: PLC0415 - only for those who ask

        self.compiled = None if mode == "off" else Compiled(self, mode, buckets, compiler)

    def forward(self, graph: AtomGraph, *, direct_forces: bool = True) -> Output:
        """Predict energies and, if the model has them, direct forces.

        Args:
            graph: a batch whose dtype and device are the model's.
            direct_forces: False skips the force branch of a model that has one.

        Raises:
            ValueError: if the graph's dtype or device is not the model's.
        """
        return (self.compiled or self.plain)(graph, direct_forces=direct_forces)

    def plain(self, graph: AtomGraph, *, direct_forces: bool = True) -> Output:
        """Do what `forward` does where the model is not compiled."""
        return self.heads(self.features(graph, direct_forces=direct_forces), graph)

    def features(self, graph: AtomGraph, *, direct_forces: bool = True) -> Features:
        """Run everything but the heads; `heads` turns the result into an `Output`. Arguments as for `forward`."""
        self.check(graph)
        forces = direct_forces and self.config.direct_forces
        if self.backend != "reference":
            return self._fused_features(graph, forces=forces)
        backbone = self.backbone
        bases = backbone.bases(graph)
        inputs = BlockInputs(graph=graph, bases=bases, geometry=compute_geometry(graph, self.config.num_spherical))
        x_e, x_f = [], []
        with self._linear_precision(graph.device):
            h = self.embedding(graph.atomic_numbers)
            m = backbone.bases.edge_emb(h, bases.radial, graph.main.source, graph.main.target)
            for i, out_block in enumerate(backbone.out_blocks):
                if i > 0:
                    h, m = backbone.int_blocks[i - 1](h, m, inputs)
                assert isinstance(out_block, OutputBlock)
                x_e.append(out_block.energy(h, m, bases.rbf_out, graph))
                if forces:
                    x_f.append(out_block.forces(m, bases.rbf_out))
        return self.final_mlp(tuple(x_e), tuple(x_f), graph)

    def final_mlp(self, x_E: tuple[Tensor, ...], x_F: tuple[Tensor, ...], graph: AtomGraph) -> Features:
        """Run the final MLP on outputs of blocks, the embedding's first: the end of `features`.

        Args:
            x_E: blocks + 1 tensors [N, C].
            x_F: blocks + 1 tensors [E, M], or none.
            graph: theirs.
        """
        backbone = self.backbone
        with self._linear_precision(graph.device):
            if self.backend != "reference":
                fused = self._fused(graph)
                mlp_e = fused.dense_residuals(backbone.out_mlp_E.out_mlp, torch.cat(x_E, dim=-1))
                mlp_f = fused.dense_residuals(backbone.out_mlp_F.out_mlp, torch.cat(x_F, dim=-1)) if x_F else ()
            else:
                mlp_e = backbone.out_mlp_E(x_E)
                mlp_f = backbone.out_mlp_F(x_F) if x_F else ()
        return Features(x_E=x_E, x_F=x_F, mlp_E=mlp_e, mlp_F=mlp_f)

    def _fused(self, graph: AtomGraph) -> "Fused":
        from ejmp.model.fused import Fused  # noqa: PLC0415 - not for the reference backend

        backend = self.backend
        assert backend != "reference"
        return Fused(graph, LOW_PRECISION.get(self.precision), backend)

    def _fused_features(self, graph: AtomGraph, *, forces: bool) -> Features:
        backbone = self.backbone
        with self._linear_precision(graph.device):
            fused = self._fused(graph)
            h = self.embedding(graph.atomic_numbers)
            m = fused.embed(backbone.bases, h)
            values = fused.bases(backbone.bases)
            x_e, x_f = [], []
            for i, out_block in enumerate(backbone.out_blocks):
                if i > 0:
                    block = backbone.int_blocks[i - 1]
                    assert isinstance(block, InteractionBlock)
                    h, m = fused.block(block, h, m, values)
                assert isinstance(out_block, OutputBlock)
                x_e.append(fused.energy(out_block, h, m, values))
                if forces:
                    x_f.append(fused.forces(out_block, m, values))
        return self.final_mlp(tuple(x_e), tuple(x_f), graph)

    def heads(self, features: Features, graph: AtomGraph) -> Output:
        """Turn the last layer of the final MLP into energies and direct forces, in the parameters' dtype."""
        atoms = features.mlp_E[-1].to(self.dtype)
        per_atom = torch.cat([head(atoms) for head in self.output.out_energy], dim=1)
        energy = self._sum(per_atom, graph.batch, graph.ptr)
        if self.config.energy_reduction == "mean":
            energy = energy / graph.ptr.diff()[:, None]
        if not features.mlp_F:
            return Output(energy=energy, forces=None)
        edges = features.mlp_F[-1].to(self.dtype)
        magnitude = torch.stack([head(edges) for head in self.output.out_forces], dim=1)
        parts = (magnitude * graph.main.vector[:, None]).flatten(1)
        forces = self._sum(parts, graph.main.target, graph.main.ptr).unflatten(1, (-1, 3))
        return Output(energy=energy, forces=forces)

    def _sum(self, x: Tensor, target: Tensor, ptr: Tensor) -> Tensor:
        """Sum rows by target, [E, M] to [N, M]; by the kernels' sums, because torch's on a GPU differ in every run."""
        if self.backend == "reference":
            return specification.segment_sum(x, target, len(ptr) - 1)
        return edge_sum(x, ptr, backend=self.backend)

    def check(self, graph: AtomGraph) -> None:
        """Do nothing if the model can run on a graph.

        Raises:
            ValueError: if the graph's dtype or device is not the model's, or the model's precision not to be had.
        """
        if graph.dtype != self.dtype:
            raise ValueError(f"graph: expected dtype {self.dtype} (the model's), got {graph.dtype}; use graph.to()")
        if graph.device != self.device:
            raise ValueError(f"graph: expected device {self.device} (the model's), got {graph.device}")
        if self.precision == "fp32" or torch.compiler.is_compiling():
            return
        if self.dtype != torch.float32:
            raise ValueError(f"precision={self.precision!r} needs float32 parameters, the model has {self.dtype}")
        check_precision(self.precision, graph.device)

    def _linear_precision(self, device: torch.device) -> AbstractContextManager:
        """Return a context for the linear maps; the fused ops take their type from their operands instead."""
        if self.precision == "tf32":  # no compiler can look into it: `Compiled` sets it around what is traced
            return nullcontext() if torch.compiler.is_compiling() else tf32_products()
        if self.precision == "fp32" or self.backend != "reference":
            return nullcontext()
        return torch.autocast(device.type, dtype=LOW_PRECISION[self.precision])


def check_name(precision: Precision) -> Precision:
    """Return the precision if there is one of that name.

    Raises:
        ValueError: if there is not.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision: expected one of {get_args(Precision)}, got {precision!r}")
    return precision


def check_precision(precision: Precision, device: torch.device) -> None:
    """Do nothing if a device has a precision.

    Raises:
        ValueError: tf32 needs an NVIDIA GPU of compute capability 8.0 or newer, and bf16 such a GPU or a CPU.
    """
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if not capable and (precision == "tf32" or (precision == "bf16" and device.type == "cuda")):
        raise ValueError(f'precision="{precision}" needs CUDA and compute capability 8.0, the model is on {device}')


@contextmanager
def tf32_products() -> Iterator[None]:
    """Use TF32 in float32 matrix products on CUDA for a while."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def gradient_forces(model: JMP, graph: AtomGraph, task: int = 0, *, create_graph: bool = False) -> Tensor:
    """Return forces as the negative gradient of one task's energy, [N, 3] in eV/A.

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
    if model.compiled is not None and not create_graph:
        return model.compiled.gradient_forces(graph, task)
    run = model if model.compiled is None else model.plain  # torch.compile differentiates once only
    with torch.enable_grad():
        positions = graph.positions if graph.positions.requires_grad else graph.positions.detach().requires_grad_()
        energy = run(graph.with_positions(positions), direct_forces=False).energy[:, task].sum()
        (gradient,) = torch.autograd.grad(energy, positions, create_graph=create_graph)
    return -gradient.to(model.dtype)
