"""What pruning and distillation are told, and how the command line writes it; needs no torch."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

FinalMLPStart = Literal["sliced", "random", "refit"]
"""How the first layer of a pruned model's final MLP is made; see `ejmp.prune`."""
FINAL_MLPS: tuple[FinalMLPStart, ...] = get_args(FinalMLPStart)
REFIT_STRUCTURES = 1000
"""Structures that the final MLP is refitted on if nothing is said."""
RESIDUALS = {"before_skip": "layers_before_skip", "after_skip": "layers_after_skip", "concat": "residual_m"}
"""Places of a block's residual layers of edges, as `prune` calls them, and what they are called in the model."""
EDGE_TERMS = ("edge", "edge_to_node", "vector_to_vector")
"""Names of the terms that compare features of edges, which need the force branch."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Weights of the distillation loss; 0 leaves a term out. The defaults are Ghunaim et al.'s, equation 6.

    Each term is a mean absolute difference of student and teacher over all elements, where the paper writes the L1
    norm: so it depends neither on the widths nor on how many atoms are in a batch. Feature terms are summed over the
    layers of the final MLP.

    Raises:
        ValueError: for a negative weight, or if all of the terms are 0.
    """

    energy: float = 0.0
    """Weight of the difference of energies: the raw outputs of all heads."""
    forces: float = 1.0
    """Weight of the difference of forces: the raw outputs of all heads, or the gradients of each structure's task."""
    node: float = 1.0
    """Weight of the difference of atom features, in the energy branch."""
    edge: float = 1.0
    """Weight of the difference of edge features, in the force branch."""
    edge_to_node: float = 0.0
    """Weight of the difference of edge features averaged over the edges into each atom. Kelvinius et al. (arXiv
    2306.14818) compare such averages of the teacher with atom features of a student without edges, through a learnt
    map; ours has edges."""
    vector_to_vector: float = 0.0
    """Weight of the difference of edge features multiplied with their edge's unit vector and averaged over the edges
    into each atom, [N, 3, M]: equivariant features, of which GemNet-OC has none by itself, and which the
    vector-to-vector term of Kelvinius et al. compares."""
    hessian: float = 0.0
    """Weight of the difference of rows of the energy's Hessian, for models with gradient forces (Amin et al., arXiv
    2501.09009). It falls linearly over a run, to 0 at its end."""
    hessian_rows: int = 1
    """Rows per structure and step, chosen at random; each costs as much as the step without any."""
    labels: float = 0.0
    """Weight of the loss on the labels, lambda0 in lambda0 * L0 + lambda * L_KD; 0: labels are not used."""
    teacher: float = 1.0
    """Weight of all terms above together, lambda in lambda0 * L0 + lambda * L_KD."""

    def __post_init__(self) -> None:
        """Check the weights."""
        if type(self.hessian_rows) is not int or self.hessian_rows < 1:
            raise ValueError(f"DistillConfig.hessian_rows: expected 1 or more, got {self.hessian_rows!r}")
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"DistillConfig.{name}: expected 0 or more, got {value!r}")
        if not any((self.energy, self.forces, self.node, self.hessian, *(getattr(self, name) for name in EDGE_TERMS))):
            raise ValueError("DistillConfig: expected at least one term with a positive weight")


def parse_terms(text: str) -> DistillConfig:
    """Return the weights that a flag like "forces=1,node=1" gives; terms that are not named are left out.

    Raises:
        ValueError: for text of another form, or a term that does not exist.
    """
    names = [field.name for field in dataclasses.fields(DistillConfig)]
    weights: dict[str, Any] = {name: 0.0 for name in names if name not in ("teacher", "hessian_rows")}
    for item in text.split(","):
        name, found, value = item.partition("=")
        try:
            weights[name] = int(value) if name == "hessian_rows" else float(value)
        except ValueError as error:
            raise ValueError(f"terms: expected NAME=WEIGHT,..., got {item!r}") from error
        if not found or name not in names:
            raise ValueError(f"terms: expected some of {', '.join(names)}, got {item!r}")
    return DistillConfig(**weights)


def parse_residuals(text: str) -> dict[str, int]:
    """Return the numbers of layers that a flag like --residuals before_skip=1,concat=2 gives.

    Raises:
        ValueError: for text of another form, or a place that does not exist.
    """
    numbers = {}
    for item in text.split(","):
        place, _, number = item.partition("=")
        if place not in RESIDUALS or not number.isdecimal():
            places = ", ".join(RESIDUALS)
            raise ValueError(f"--residuals: expected PLACE=NUMBER,... with some of {places}, got {item!r}")
        numbers[place] = int(number)
    return numbers


def parse_blocks(text: str) -> tuple[int, ...]:
    """Return the block numbers that a flag like --keep 0,1,2 gives.

    Raises:
        ValueError: if they are not numbers with commas.
    """
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"--keep: expected numbers with commas, such as 0,1,2, got {text!r}") from None
