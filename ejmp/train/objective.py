"""What a step minimises: modules that turn a batch into losses."""

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ejmp.compress.config import RESIDUALS, DistillConfig
from ejmp.compress.distill import Prediction, combine, distance, distill_loss
from ejmp.compress.hessian import STEP, hessian_rows, one_atom_moved
from ejmp.compress.losses import Losses, mean_losses
from ejmp.compress.narrowing import shared_channels
from ejmp.data.readers.impossible import LEAST
from ejmp.data.sampling.batch import Batch
from ejmp.graph.graph import AtomGraph
from ejmp.model.jmp import JMP, Features
from ejmp.train.dropout import drop_edges, scaled_outputs
from ejmp.train.loss import multitask_loss
from ejmp.train.task import Tasks


def predict(model: JMP, batch: Batch, tasks: Tasks, *, create_graph: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return raw energies [B, T] and raw forces: direct [N, T, 3], gradient [N, 3], or None.

    Args:
        model: model with a head for each task.
        batch: structures of the tasks' datasets.
        tasks: tasks by dataset number; forces of all must be predicted in one way.
        create_graph: keep the autograd graph of gradient forces, to train on them.

    Raises:
        ValueError: if some tasks have direct and others gradient forces, or the model has no force branch.
    """
    kinds = {task.forces for task in tasks} - {None}
    if len(kinds) > 1:
        raise ValueError("tasks: expected direct or gradient forces, got both")
    if kinds == {"direct"} and not model.config.direct_forces:
        raise ValueError("tasks: direct forces need a model with a force branch")
    if kinds != {"gradient"}:
        out = model(batch.graph, direct_forces=bool(kinds))
        return out.energy, out.forces
    _, out = with_gradient(model, batch, tasks, create_graph=create_graph)
    return out.energy, out.forces


def with_gradient(
    model: JMP, batch: Batch, tasks: Tasks, *, moved: Tensor | None = None, create_graph: bool = False
) -> Prediction:
    """Return features and output, whose forces [N, 3] are the negative gradient of each structure's own energy.

    Args:
        model: model with a head for each task.
        batch: structures of the tasks' datasets.
        tasks: tasks by dataset number.
        moved: displacements of the atoms, [N, 3], A; None: they stay where they are.
        create_graph: keep the autograd graph of the forces, to train on them.
    """
    with torch.enable_grad():
        positions = batch.graph.positions.detach()
        positions = (positions if moved is None else positions + moved).requires_grad_()
        graph = batch.graph.with_positions(positions)
        features = model.features(graph, direct_forces=False)
        out = model.heads(features, graph)
        total = tasks.own_energy(out.energy, batch).sum()
        (gradient,) = torch.autograd.grad(total, positions, create_graph=create_graph)
    return features, dataclasses.replace(out, forces=-gradient.to(model.dtype))


def at_depths(model: JMP, features: Features, graph: AtomGraph) -> Iterator[Features]:
    """Yield features at each of the depths that a model is trained at, of one pass through all of its blocks."""
    for depth in model.config.depths or (model.config.blocks,):
        whole = depth == model.config.blocks
        shorter = features.x_E[: depth + 1], features.x_F[: depth + 1]
        yield features if whole else model.final_mlp(*shorter, graph)


class Objective(nn.Module):
    """What a training step minimises: maps a batch to its losses.

    Args:
        model: model to train, which holds every parameter that is trained.
    """

    model: JMP
    progress: float = 0.0
    """Share of the run's steps that are taken."""

    def __init__(self, model: JMP) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Losses:
        """Return the losses of a batch, with their autograd graph."""
        raise NotImplementedError

    def suspects(self, batch: Batch) -> tuple[str, ...]:
        """Return what to call the structures of a batch that made a step fail, the likeliest one first."""
        return batch.ids


def _suspects(batch: Batch, tasks: Tasks) -> tuple[str, ...]:
    """Return dataset and id of each structure, first of those with two atoms on top of each other, which is said."""
    names = [f"{tasks[d].name}: {name}" for d, name in zip(batch.dataset.tolist(), batch.ids, strict=True)]
    edges, structure_of = batch.graph.main, batch.graph.batch
    nearest = torch.full((len(names),), torch.inf, dtype=edges.distance.dtype, device=batch.graph.device)
    nearest.scatter_reduce_(0, structure_of[edges.target], edges.distance.detach(), "amin")
    found = sorted(zip(nearest.tolist(), names, strict=True))
    return tuple(name + f" (two atoms {d:.3g} A apart)" * (d < LEAST) for d, name in found)


class Supervised(Objective):
    """Learn labels: pre-training and fine-tuning. The tasks become the model's.

    A model with `config.depths` learns them at all of these depths at once: the loss is the mean over depths. Its
    tasks must not have gradient forces.

    Args:
        model: model with a head for each task.
        tasks: tasks by dataset number.
        edge_dropout: share of pairs that are left out of each graph.
    """

    def __init__(self, model: JMP, tasks: Tasks, *, edge_dropout: float = 0.0) -> None:
        super().__init__(model)
        model.tasks = tasks
        self.tasks = tasks
        self.edge_dropout = edge_dropout

    def suspects(self, batch: Batch) -> tuple[str, ...]:
        """Return dataset and id of each structure, first of those with two atoms on top of each other."""
        return _suspects(batch, self.tasks)

    def forward(self, batch: Batch) -> Losses:
        """Compare the model's predictions with the batch's labels."""
        context = nullcontext()
        if self.edge_dropout:
            settings = [self.tasks[d].graph for d in batch.dataset.tolist()]
            graph = drop_edges(batch.graph, self.edge_dropout, settings)
            batch = dataclasses.replace(batch, graph=graph)
            context = scaled_outputs(self.model, self.edge_dropout)
        with context:
            if self.model.config.depths:
                return mean_losses([multitask_loss(*pair, batch, self.tasks) for pair in self._at_depths(batch.graph)])
            energy, forces = predict(self.model, batch, self.tasks, create_graph=torch.is_grad_enabled())
        return multitask_loss(energy, forces, batch, self.tasks)

    def _at_depths(self, graph: AtomGraph) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield raw energies and direct forces at each depth."""
        if any(task.forces == "gradient" for task in self.tasks):
            raise ValueError("depths: a model is trained at several depths on energies and direct forces only")
        features = self.model.features(graph, direct_forces=any(task.forces for task in self.tasks))
        for at_depth in at_depths(self.model, features, graph):
            output = self.model.heads(at_depth, graph)
            yield output.energy, output.forces


class Distillation(Objective):
    """Learn what a teacher makes of the same graph, on its outputs and at every layer of the final MLP.

    A student with `config.depths` learns at all of these depths at once: the loss is the mean over depths, and the
    teacher runs once. A narrower student is compared with those of the teacher's channels that it has. The tasks, and
    those of the teacher's other heads, become the student's. The teacher runs without autograd. Where the student is
    the teacher's own blocks, all frozen (`freeze_blocks`), they are run once, for both. Models whose tasks have
    gradient forces are compared in these, and in rows of the Hessian if the config weighs them.

    Args:
        model: student to train.
        teacher: model to learn from; it is put into evaluation mode and frozen.
        tasks: tasks by dataset number.
        config: weights of the terms.

    Raises:
        ValueError: for gradient forces and a student with several depths, or rows of the Hessian without such forces.
    """

    def __init__(self, model: JMP, teacher: JMP, tasks: Tasks, config: DistillConfig) -> None:
        super().__init__(model)
        self._gradients = any(task.forces == "gradient" for task in tasks)
        if self._gradients and model.config.depths:
            raise ValueError("depths: a model is trained at several depths on energies and direct forces only")
        if config.hessian and not self._gradients:
            raise ValueError("hessian: rows are those of the energy, for tasks with gradient forces; got none")
        model.tasks = ({task.name: task for task in teacher.tasks} | {task.name: task for task in tasks}).values()
        self.tasks = tasks
        self.config = config
        self._teacher = (teacher.eval().requires_grad_(requires_grad=False),)  # in a tuple: not part of what is trained
        self._channels = shared_channels(model.config, teacher.config)
        self.shared = _shared_outputs(model, teacher)
        """Indices of the teacher's outputs (the embedding's is 0) that the student takes over; None: it has its own."""

    def suspects(self, batch: Batch) -> tuple[str, ...]:
        """Return dataset and id of each structure, first of those with two atoms on top of each other."""
        return _suspects(batch, self.tasks)

    def forward(self, batch: Batch) -> Losses:
        """Compare the student with the teacher, and with the batch's labels where the config weighs them."""
        (teacher,), graph = self._teacher, batch.graph
        if self._gradients:
            return self._on_gradients(teacher, batch)
        with torch.no_grad():
            teacher_features = teacher.features(graph, direct_forces=self.model.config.direct_forces)
            teacher_out = teacher.heads(teacher_features, graph)
        compared = teacher_features
        if self._channels is not None:
            same_channels = tuple(x[:, self._channels] for x in teacher_features.mlp_F)
            compared = dataclasses.replace(teacher_features, mlp_F=same_channels)
        if self.shared is None:
            features = self.model.features(graph)
        else:
            x_e = tuple(teacher_features.x_E[i] for i in self.shared)
            x_f = tuple(teacher_features.x_F[i] for i in self.shared) if teacher_features.x_F else ()
            features = self.model.final_mlp(x_e, x_f, graph)
        found = []
        for at_depth in at_depths(self.model, features, graph):
            out = self.model.heads(at_depth, graph)
            label_loss = multitask_loss(out.energy, out.forces, batch, self.tasks) if self.config.labels else None
            teacher_loss = distill_loss((at_depth, out), (compared, teacher_out), graph, self.config)
            found.append(combine(label_loss, teacher_loss, self.config))
        return mean_losses(found)

    def _on_gradients(self, teacher: JMP, batch: Batch) -> Losses:
        """Compare energies and features, their gradients, and rows of their Hessians."""
        graph, config, training = batch.graph, self.config, torch.is_grad_enabled()
        of_teacher = with_gradient(teacher, batch, self.tasks)
        of_student = with_gradient(self.model, batch, self.tasks, create_graph=training)
        found = distill_loss(of_student, of_teacher, graph, config)
        weight = config.hessian * (1 - self.progress)
        for _ in range(config.hessian_rows if weight > 0 else 0):
            displacements = STEP * one_atom_moved(graph)
            rows = []
            for model, (_features, out) in ((self.model, of_student), (teacher, of_teacher)):
                learns = training and model is self.model
                moved = with_gradient(model, batch, self.tasks, moved=displacements, create_graph=learns)[1].forces
                assert out.forces is not None
                assert moved is not None
                rows.append(hessian_rows(out.forces, moved))
            term = distance(rows[0], rows[1], "hessian") / config.hessian_rows
            parts = {"kd_hessian": found.parts.get("kd_hessian", torch.zeros_like(term)) + term.detach()}
            found = Losses(total=found.total + weight * term, parts=found.parts | parts)
        out = of_student[1]
        labels = multitask_loss(out.energy, out.forces, batch, self.tasks) if config.labels else None
        return combine(labels, found, config)


def freeze_blocks(model: JMP) -> None:
    """Let training change the final MLP and the heads alone."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".out_mlp_" in name or name.startswith("output.")


def _shared_outputs(model: JMP, teacher: JMP) -> list[int] | None:
    """Return which of the teacher's outputs a student of its frozen first blocks would compute again, or None."""
    if model.precision != teacher.precision:
        return None
    kept = model.config.kept_blocks or tuple(range(model.config.blocks))
    origin = teacher.config.kept_blocks or tuple(range(teacher.config.blocks))
    if not set(kept) <= set(origin) or kept != origin[: len(kept)]:
        return None
    inside = [[getattr(each.config, f"num_{place}") for place in RESIDUALS] for each in (model, teacher)]
    if inside[0] != inside[1]:
        return None
    teacher_state = teacher.state_dict()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, value in model.state_dict().items():
        after_blocks = ".out_mlp_" in name or name.startswith("output.")
        if not after_blocks and (name in trained or not torch.equal(value, teacher_state[name])):
            return None
    return [0, *(i + 1 for i in range(len(kept)))]
