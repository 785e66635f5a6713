"""The distillation loss: distances of a student's outputs and features from those of its teacher."""

import torch
from torch import Tensor

from ejmp.compress.config import EDGE_TERMS, DistillConfig
from ejmp.compress.losses import Losses
from ejmp.graph.graph import AtomGraph
from ejmp.model.jmp import Features, Output
from ejmp_kernels import specification

Prediction = tuple[Features, Output]
"""What `JMP.features` and `JMP.heads` return for one graph."""


def distill_loss(student: Prediction, teacher: Prediction, graph: AtomGraph, config: DistillConfig) -> Losses:
    """Compare a student with its teacher on one graph, in all heads; for some of them, give outputs of only those.

    Args:
        student: features and output of the student, with their autograd graph.
        teacher: features and output of the teacher on the same graph; they are detached here, and compared in the
            student's precision (float32 at least).
        graph: graph that both models saw; only the terms that average over edges read it.
        config: weights of the terms.

    Returns:
        Losses whose total is the weighted sum, not yet times `config.teacher` (see `combine`), and whose parts are
        the terms before weighting, as "kd_" + name.

    Raises:
        ValueError: if widths, depths of the final MLP or heads of the two differ, or a term needs the force branch and
            one of the two has none.
    """
    total = torch.zeros((), device=graph.device)
    parts = {}
    for name, pairs in _pairs(student, teacher, graph, config).items():
        term = torch.stack([distance(a, b, name) for a, b in pairs]).sum()
        parts[f"kd_{name}"] = term.detach()
        total = total + getattr(config, name) * term
    return Losses(total=total, parts=parts)


def combine(labels: Losses | None, teacher: Losses, config: DistillConfig) -> Losses:
    """Return lambda0 * L0 + lambda * L_KD and the parts of both (Ghunaim et al., equation 6).

    Args:
        labels: loss on the labels, L0; None if `config.labels` is 0.
        teacher: distillation loss, L_KD.
        config: weights lambda0 (`labels`) and lambda (`teacher`).

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
"""What a term compares: tensors of the student, each with that of the teacher."""


def _pairs(student: Prediction, teacher: Prediction, graph: AtomGraph, config: DistillConfig) -> dict[str, Pairs]:
    """Return, for each term with a weight, the tensors it compares.

    Raises:
        ValueError: if a term needs the force branch and one of the two has none, or the final MLPs differ in depth.
    """
    (student_features, student_out), (teacher_features, teacher_out) = student, teacher
    wanted: dict[str, Pairs] = {}
    if config.energy:
        wanted["energy"] = [(student_out.energy, teacher_out.energy)]
    if config.forces:
        if student_out.forces is None or teacher_out.forces is None:
            _refuse("forces", student=student_out.forces is None)
        else:
            wanted["forces"] = [(student_out.forces, teacher_out.forces)]
    if config.node:
        wanted["node"] = _layers(student_features.mlp_E, teacher_features.mlp_E, "node")
    for name in EDGE_TERMS:
        if getattr(config, name):
            if not student_features.mlp_F or not teacher_features.mlp_F:
                _refuse(name, student=not student_features.mlp_F)
            layers = _layers(student_features.mlp_F, teacher_features.mlp_F, name)
            wanted[name] = [(_onto(a, graph, name), _onto(b.detach(), graph, name)) for a, b in layers]
    return wanted


def _refuse(name: str, *, student: bool) -> None:
    who = "student" if student else "teacher"
    raise ValueError(
        f"{name}: the {who} has no force branch, so no direct forces; set DistillConfig.{name} to 0, or say "
        "--terms energy=1,node=1"
    )


def _layers(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], name: str) -> Pairs:
    if len(student) != len(teacher):
        raise ValueError(f"{name}: the student's final MLP has {len(student)} layers, the teacher's {len(teacher)}")
    return list(zip(student, teacher, strict=True))


def _onto(x: Tensor, graph: AtomGraph, name: str) -> Tensor:
    """Return edge features [E, M] in the form in which a term compares them: as they are, or averaged over edges."""
    if name == "edge":
        return x
    x = x.to(torch.promote_types(x.dtype, graph.dtype))
    if name == "vector_to_vector":
        x = x[:, None] * graph.main.vector[..., None].to(x.dtype)
    degree = graph.main.ptr.diff().clamp_min(1).to(x.dtype)
    summed = specification.segment_sum(x, graph.main.target, graph.num_atoms)
    return summed / degree.view(-1, *[1] * (x.ndim - 1))


def distance(student: Tensor, teacher: Tensor, name: str) -> Tensor:
    """Return the mean absolute difference of two tensors, in float32 at least; the teacher's is detached.

    Raises:
        ValueError: if their shapes differ, naming the term.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"{name}: the student's are {[*student.shape]}, the teacher's {[*teacher.shape]}")
    dtype = torch.promote_types(student.dtype, torch.float32)
    difference = student.to(dtype) - teacher.detach().to(dtype)
    return difference.abs().sum() / max(difference.numel(), 1)
