"""What a model is: one frozen dataclass, checked when made, and the presets of the JMP paper."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from ejmp.limits import check_limit
from ejmp.model.upstream import sizes_from_upstream

Precision = Literal["fp32", "tf32", "bf16", "fp16", "int8", "fp8"]
"""Type of the linear maps; see `ejmp.JMP`."""
HEADS = ("mlp", "mlp-no-bias", "linear")
"""Kinds of heads; see `JMPConfig.head`."""
MOST = 65_536
"""Most channels, Gaussians, blocks, layers or heads of a model; `Limits` bounds what they make together."""
MOST_SPHERICAL = 64
"""Most Legendre polynomials of an angle."""


@dataclass(frozen=True, kw_only=True)
class JMPConfig:
    """Sizes of a JMP model (GemNet-OC, arXiv 2204.02782; JMP, arXiv 2310.16802). Defaults are JMP-L.

    Raises:
        ValueError: if a size is not positive or beyond all models, `kept_blocks` does not name `blocks` blocks in
            order, or `depths` are not ascending numbers up to `blocks`.
        LimitError: if the model would have more parameters or weights than `ejmp.limits` allows.
    """

    blocks: int = 6
    """Interaction blocks, 1..6 in the published models."""
    num_tasks: int = 4
    """T, the number of heads, each for energies and, with direct forces, for forces."""
    direct_forces: bool = True
    """Whether the model has the edge branch that predicts forces without a gradient."""
    energy_reduction: Literal["sum", "mean"] = "sum"
    """How atoms make a structure's value: "sum", or "mean" for intensive targets (QMOF, Matbench)."""
    head: Literal["mlp", "mlp-no-bias", "linear"] = "mlp"
    """What turns features into a task's energies and forces: "mlp" is JMP's five layers, "mlp-no-bias" these without
    biases (JMP's energy head for fine-tuning on forces), "linear" the one map without bias of fairchem 1.x."""
    forces_coupled: bool = False
    """Whether the direct forces along an edge and its counter-edge are averaged (fairchem 1.x)."""
    kept_blocks: tuple[int, ...] | None = None
    """Which blocks of the unpruned model these are; None if the model was never pruned."""
    kept_force_channels: tuple[int, ...] | None = None
    """Which channels of the unpruned model's final MLP these are, in the force branch; None if none was removed."""
    depths: tuple[int, ...] | None = None
    """Numbers of first blocks, ascending up to all of them, of which each was trained to do alone: `prune(blocks=b)`
    then gives a trained model. None: only all blocks together were trained."""

    bf16_layers: tuple[str, ...] = ()
    """Dense layers that stay in bfloat16 at the precisions in 8 bits, by their names among the model's modules, as
    `ejmp quantize --keep` chooses them. A model with fewer blocks or layers has none of them."""

    emb_size_atom: int = 256
    """C, the channels of atoms."""
    emb_size_edge: int = 1024
    """M, the channels of edges."""
    emb_size_trip_in: int = 64
    """Channels that are summed over triplets; `_out`: after the mixing that follows. So also for the next two."""
    emb_size_trip_out: int = 128
    emb_size_quad_in: int = 64
    emb_size_quad_out: int = 32
    emb_size_pair_in: int = 64
    emb_size_pair_out: int = 64
    emb_size_rbf: int = 32
    """Width of a projected radial basis; cbf: circular, sbf: spherical."""
    emb_size_cbf: int = 16
    emb_size_sbf: int = 64
    num_radial: int = 128
    """R, the Gaussians of the radial basis."""
    num_spherical: int = 7
    """S, the Legendre polynomials of an angle."""
    num_before_skip: int = 2
    """Residual layers before the skip connection; the numbers below are of residual layers elsewhere."""
    num_after_skip: int = 2
    num_concat: int = 4
    num_atom: int = 3
    num_output_after_atom: int = 3
    """Residual layers of an output block after the atoms' features were added, which the public code does not do if
    there is none: so its models with 0 of them are refused."""
    num_atom_emb_layers: int = 2
    num_global_out_layers: int = 2
    num_elements: int = 120
    """Rows of the atom embedding."""
    rbf_cutoff: float = 12.0
    """Distance in A at which the radial basis of main edges ends, whatever the graph's cutoff is."""
    rbf_cutoff_atom_edges: float | None = None
    """Where the radial basis of atom edges ends, A. None, here and below: at `rbf_cutoff`, as in JMP."""
    rbf_cutoff_quad_edges: float | None = None
    rbf_cutoff_atom_pairs: float | None = None
    envelope_exponent: int = 5
    """Exponent of the polynomial that takes every radial function smoothly to zero at its end."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        may_be_zero = {
            "num_before_skip",
            "num_after_skip",
            "num_concat",
            "num_atom",
            "num_output_after_atom",
            "num_atom_emb_layers",
            "num_global_out_layers",
        }
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least, most = field.name not in may_be_zero, MOST_SPHERICAL if field.name == "num_spherical" else MOST
            if field.type is int and (type(value) is not int or not least <= value <= most):
                raise ValueError(f"JMPConfig.{field.name}: expected a positive integer up to {most:,}, got {value!r}")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"JMPConfig.{field.name}: expected True or False, got {value!r}")
        for edges, cutoff in self.rbf_cutoffs.items():
            if not isinstance(cutoff, int | float) or not 0 < cutoff < float("inf"):
                raise ValueError(f"JMPConfig.rbf_cutoff: expected a positive number for {edges}, got {cutoff!r}")
        for name, choices in {"energy_reduction": ("sum", "mean"), "head": HEADS}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"JMPConfig.{name}: expected one of {choices}, got {getattr(self, name)!r}")
        self._check_what_was_kept()
        parameters, tensors = self.count_parameters()
        check_limit("JMPConfig", "parameters", parameters, "parameters")
        check_limit("JMPConfig", "tensors", tensors, "weights")

    def _check_what_was_kept(self) -> None:
        layers = self.bf16_layers
        if type(layers) is not tuple or not all(type(name) is str for name in layers):
            raise ValueError(f"JMPConfig.bf16_layers: expected a tuple of names, got {str(layers)[:80]}")
        for name, count in {"kept_blocks": self.blocks, "kept_force_channels": self.emb_size_edge}.items():
            kept = getattr(self, name)
            if kept is not None and (
                len(kept) != count
                or not all(type(number) is int for number in kept)
                or list(kept) != sorted(set(kept))
                or kept[0] < 0
            ):
                raise ValueError(f"JMPConfig.{name}: expected {count} ascending numbers, got {kept[:20]}")
        depths = self.depths
        if depths is not None and (
            not all(type(depth) is int for depth in depths)
            or list(depths) != sorted(set(depths))
            or not depths
            or not 1 <= depths[0] <= depths[-1] == self.blocks
        ):
            raise ValueError(f"JMPConfig.depths: expected ascending numbers up to {self.blocks}, got {depths[:20]}")

    def count_parameters(self) -> tuple[int, int]:
        """Return how many parameters a model of these sizes has, and in how many tensors, without making it."""
        atom, edge, rbf, cbf, radial = (
            self.emb_size_atom, self.emb_size_edge, self.emb_size_rbf, self.emb_size_cbf, self.num_radial,
        )  # fmt: skip
        quad_in, quad_out, pair_in, pair_out = (
            self.emb_size_quad_in, self.emb_size_quad_out, self.emb_size_pair_in, self.emb_size_pair_out,
        )  # fmt: skip

        def residuals(number: int, size: int) -> tuple[int, int]:
            return 2 * number * size**2, 2 * number

        def triplets(size: int, out: int, projections: int) -> tuple[int, int]:
            trip_in, trip_out = self.emb_size_trip_in, self.emb_size_trip_out
            inner = size**2 + rbf * size + cbf * trip_in * trip_out + size * trip_in
            return inner + projections * trip_out * out, 4 + projections

        def head(size: int) -> tuple[int, int]:
            biases = self.head == "mlp"
            return (size, 1) if self.head == "linear" else (4 * size * (size + biases) + size, 5 + 4 * biases)

        update = [(rbf * edge + edge * atom, 2), residuals(self.num_atom, atom)]
        quadruplets = edge**2 + rbf * edge + cbf * quad_in + self.emb_size_sbf * quad_in * quad_out
        block = [
            (edge**2, 1), triplets(edge, edge, 2), triplets(atom, edge, 2), triplets(edge, atom, 1),
            (quadruplets + edge * quad_in + 2 * quad_out * edge, 7),
            (rbf * pair_in * pair_out + atom * (pair_in + pair_out), 3),
            residuals(self.num_before_skip + self.num_after_skip + self.num_concat, edge),
            residuals(self.num_atom_emb_layers, atom), *update, ((2 * atom + edge) * edge, 1),
        ]  # fmt: skip
        readout = [*update, residuals(self.num_output_after_atom, atom)]
        branches = [atom, edge] if self.direct_forces else [atom]
        if self.direct_forces:
            readout += [residuals(self.num_atom, edge), (rbf * edge, 1)]
        bases = radial * (7 * rbf + 4 * self.num_spherical * cbf + self.num_spherical**2 * self.emb_size_sbf)
        parts = [(1, (self.num_elements * atom, 1)), (1, (bases + (2 * atom + radial) * edge, 13))]
        parts += [(self.blocks, part) for part in block] + [(self.blocks + 1, part) for part in readout]
        for size in branches:
            parts += [(1, ((self.blocks + 1) * size**2, 1)), (1, residuals(self.num_global_out_layers, size))]
            parts.append((self.num_tasks, head(size)))
        return sum(times * part[0] for times, part in parts), sum(times * part[1] for times, part in parts)

    @property
    def rbf_cutoffs(self) -> dict[str, float]:
        """Distance at which the radial basis of each edge set ends, A."""
        given = {name: getattr(self, f"rbf_cutoff_{name}") for name in ("atom_edges", "quad_edges", "atom_pairs")}
        return {"main": self.rbf_cutoff} | {n: self.rbf_cutoff if c is None else c for n, c in given.items()}

    @classmethod
    def from_upstream(cls, config: Mapping[str, Any], *, num_tasks: int = 4) -> Self:
        """Translate upstream's size names (its `BackboneConfig` as a dict).

        Args:
            config: upstream's names and values.
            num_tasks: number of heads; upstream keeps it elsewhere.

        Raises:
            ValueError: if a size is missing, or a setting asks for something JMP does not use.
        """
        return cls(num_tasks=num_tasks, **sizes_from_upstream(config))


def jmp_l(*, blocks: int = 6, scalar: bool = False) -> JMPConfig:
    """Return JMP-L: 6 blocks, 1024 edge channels.

    Args:
        blocks: interaction blocks.
        scalar: the fine-tuning model without force branch and with one energy head.
    """
    return JMPConfig(blocks=blocks, direct_forces=not scalar, num_tasks=1 if scalar else 4)


def jmp_s(*, blocks: int = 4, scalar: bool = False) -> JMPConfig:
    """Return JMP-S: 4 blocks, 512 edge channels.

    Args:
        blocks: interaction blocks.
        scalar: the fine-tuning model without force branch and with one energy head.
    """
    return dataclasses.replace(
        jmp_l(blocks=blocks, scalar=scalar),
        emb_size_edge=512,
        emb_size_trip_out=64,
        emb_size_quad_in=32,
        emb_size_rbf=16,
        emb_size_sbf=32,
        num_concat=1,
    )


SIZES: dict[str, Callable[..., JMPConfig]] = {"jmp-l": jmp_l, "jmp-s": jmp_s}
"""The published sizes by name."""
