"""What a pruned student is taught by the model it was cut from: distances between outputs and between features."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ejmp.compress.losses import Losses
from ejmp.graph.graph import AtomGraph
from ejmp.model.jmp import Features, Output
from ejmp_kernels import specification

Prediction = tuple[Features, Output]
"""What `JMP.features` and `JMP.heads` return for one graph."""
EDGE_TERMS = ("edge", "edge_to_node", "vector_to_vector")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Weights of the terms; 0 leaves a term out. The defaults are the paper's (Ghunaim et al., equation 6).

    Each term is a mean absolute difference of student and teacher over all elements, where the paper writes the L1
    norm: so it depends neither on the widths nor on how many atoms are in a batch. Feature terms are summed over the
    layers of the final MLP.

    Raises:
        ValueError: for a negative weight, or if all of the terms are 0.
    """

    energy: float = 0.0
    """Of the energies of all heads, raw."""
    forces: float = 1.0
    """Of the direct forces of all heads, raw."""
    node: float = 1.0
    """Of the features of atoms, in the energy branch."""
    edge: float = 1.0
    """Of the features of edges, in the force branch."""
    edge_to_node: float = 0.0
    """Of the edges' features averaged over the edges into each atom. Kelvinius et al. (arXiv 2306.14818) compare such
    averages of the teacher with atom features of a student without edges, through a learnt map; ours has edges."""
    vector_to_vector: float = 0.0
    """Of the same averages after each edge's features are multiplied with its unit vector, [N, 3, M]: the equivariant
    features that GemNet-OC has none of by itself, and that their vector-to-vector term compares."""
    labels: float = 0.0
    """Of the loss on the labels, lambda0 in lambda0 * L0 + lambda * L_KD. 0: labels are not used."""
    teacher: float = 1.0
    """lambda."""

    def __post_init__(self) -> None:
        """Check the weights."""
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"DistillConfig.{name}: expected 0 or more, got {value!r}")
        if not any((self.energy, self.forces, self.node, *(getattr(self, name) for name in EDGE_TERMS))):
            raise ValueError("DistillConfig: expected at least one term with a positive weight")


def distill_loss(student: Prediction, teacher: Prediction, graph: AtomGraph, config: DistillConfig) -> Losses:
    """Compare a student with its teacher on one graph, in all heads; for some of them, give outputs of only those.

    Args:
        student: with its autograd graph.
        teacher: of the same graph; detached here, and compared in the student's precision (float32 at least).
        graph: what both saw; only the terms that average over edges read it.
        config: weights.

    Returns:
        The weighted sum, without `labels` and `teacher` (see `combine`); the terms before weighting, as "kd_" + name.

    Raises:
        ValueError: if widths, depths of the final MLP or heads of the two differ, or a term needs the force branch and
            one of the two has none.
    """
    total = torch.zeros((), device=graph.device)
    parts = {}
    for name, pairs in _pairs(student, teacher, graph, config).items():
        term = torch.stack([_distance(of_student, of_teacher, name) for of_student, of_teacher in pairs]).sum()
        parts[f"kd_{name}"] = term.detach()
        total = total + getattr(config, name) * term
    return Losses(total=total, parts=parts)


def combine(labels: Losses | None, teacher: Losses, config: DistillConfig) -> Losses:
    """Return lambda0 * L0 + lambda * L_KD and the parts of both.

    Raises:
        ValueError: if config.labels is positive and there is no loss on labels.
    """
    if labels is None:
        if config.labels:
            raise ValueError(f"labels: expected a loss for the weight {config.labels}, got None")
        return Losses(total=config.teacher * teacher.total, parts=teacher.parts)
    total = config.teacher * teacher.total
    if config.labels:  # 0 * NaN is NaN
        total = config.labels * labels.total + total
    return Losses(total=total, parts={**labels.parts, **teacher.parts})


Pairs = list[tuple[Tensor, Tensor]]


def _pairs(student: Prediction, teacher: Prediction, graph: AtomGraph, config: DistillConfig) -> dict[str, Pairs]:
    """Return for each wanted term what of the student is compared with what of the teacher."""
    (own, own_out), (his, his_out) = student, teacher
    wanted: dict[str, Pairs] = {}
    if config.energy:
        wanted["energy"] = [(own_out.energy, his_out.energy)]
    if config.forces:
        if own_out.forces is None or his_out.forces is None:
            _refuse("forces", student=own_out.forces is None)
        else:
            wanted["forces"] = [(own_out.forces, his_out.forces)]
    if config.node:
        wanted["node"] = _layers(own.mlp_E, his.mlp_E, "node")
    for name in EDGE_TERMS:
        if getattr(config, name):
            if not own.mlp_F or not his.mlp_F:
                _refuse(name, student=not own.mlp_F)
            layers = _layers(own.mlp_F, his.mlp_F, name)
            wanted[name] = [(_onto(a, graph, name), _onto(b.detach(), graph, name)) for a, b in layers]
    return wanted


def _refuse(name: str, *, student: bool) -> None:
    who = "student" if student else "teacher"
    raise ValueError(f"{name}: the {who} has no force branch; set DistillConfig.{name} to 0")


def _layers(own: tuple[Tensor, ...], his: tuple[Tensor, ...], name: str) -> Pairs:
    if len(own) != len(his):
        raise ValueError(f"{name}: the student's final MLP has {len(own)} layers, the teacher's {len(his)}")
    return list(zip(own, his, strict=True))


def _onto(x: Tensor, graph: AtomGraph, name: str) -> Tensor:
    """Return edge features [E, M] as the term compares them."""
    if name == "edge":
        return x
    x = x.to(torch.promote_types(x.dtype, graph.dtype))
    if name == "vector_to_vector":
        x = x[:, None] * graph.main.vector[..., None].to(x.dtype)
    degree = graph.main.ptr.diff().clamp_min(1).to(x.dtype)
    summed = specification.segment_sum(x, graph.main.target, graph.num_atoms)
    return summed / degree.view(-1, *[1] * (x.ndim - 1))


def _distance(student: Tensor, teacher: Tensor, name: str) -> Tensor:
    if student.shape != teacher.shape:
        raise ValueError(f"{name}: the student's are {[*student.shape]}, the teacher's {[*teacher.shape]}")
    dtype = torch.promote_types(student.dtype, torch.float32)
    difference = student.to(dtype) - teacher.detach().to(dtype)
    return difference.abs().sum() / max(difference.numel(), 1)
