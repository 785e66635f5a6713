"""Rows of Hessians against automatic differentiation, and students that learn them together with gradient forces."""

import copy
import dataclasses
import itertools

import ase
import numpy as np
import pytest
import torch
from support.few import few

import ejmp
from ejmp.compress import hessian
from ejmp.compress.config import DistillConfig, parse_terms
from ejmp.data import InOrder
from ejmp.train import presets
from ejmp.train.demo import demo_teacher
from ejmp.train.loop import FINAL, Run, train
from ejmp.train.loss import multitask_loss
from ejmp.train.objective import Distillation, with_gradient
from ejmp.train.sources import demo_downstream, demo_mix, loader_of, tasks_of
from ejmp.train.start import for_finetuning
from ejmp.train.synthetic import with_synthetic

TERMS = DistillConfig(energy=1.0, forces=2.0, node=3.0, edge=0.0, hessian=0.5, hessian_rows=2, labels=0.25)


@pytest.fixture(scope="module")
def sources():
    return few([demo_downstream("rmd17")], 6)


@pytest.fixture(scope="module")
def teacher(sources):
    """The demo teacher with one new head for aspirin, in float64."""
    torch.manual_seed(0)
    model = for_finetuning(ejmp.load(demo_teacher())).double()
    model.tasks = tasks_of(sources)
    return model


@pytest.fixture
def batch(sources):
    sizes = [len(source.split("train")) for source in sources]
    sampler = InOrder(sizes=sizes, batch_size=2)
    return next(iter(loader_of(sources, "train", sampler, dtype=torch.float64).batches()))


def exact_row(model, graph, displacements):
    """The directional derivative of the energy's gradient, by automatic differentiation twice, in plain torch."""
    positions = graph.positions.detach().requires_grad_()
    energy = model.on(backend="reference")(graph.with_positions(positions)).energy[:, 0].sum()
    (gradient,) = torch.autograd.grad(energy, positions, create_graph=True)
    return torch.autograd.grad((gradient * displacements).sum(), positions)[0]


def test_rows_are_those_of_the_hessian(teacher, batch, sources, monkeypatch):
    torch.manual_seed(1)
    graph, tasks = batch.graph, tasks_of(sources)
    displacements = hessian.one_atom_moved(graph)
    for structure in range(graph.num_structures):
        mine = displacements[graph.batch == structure]
        assert (mine.sum(), mine.abs().max(), int((mine != 0).sum())) == (1, 1, 1)
    expected = exact_row(teacher, graph, displacements)
    at_rest = with_gradient(teacher, batch, tasks)[1].forces
    errors = []
    for step in (1e-3, 1e-4):
        monkeypatch.setattr(hessian, "STEP", step)
        moved = with_gradient(teacher, batch, tasks, moved=step * displacements)[1].forces
        errors.append(((hessian.hessian_rows(at_rest, moved) - expected).norm() / expected.norm()).item())
    assert errors[0] < 0.02
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)  # of first order


def test_the_loss_is_what_its_terms_say(teacher, batch, sources):
    tasks, student = tasks_of(sources), ejmp.prune(teacher, blocks=2)
    objective = Distillation(student, copy.deepcopy(teacher), tasks, TERMS)
    torch.manual_seed(3)
    losses = objective(batch)
    torch.manual_seed(3)
    predictions = [with_gradient(model, batch, tasks) for model in (student, teacher)]
    (mine, out), (theirs, known) = predictions
    mean = lambda a, b: (a - b).abs().mean().item()  # noqa: E731
    rows = []
    for _ in range(2):
        moved = hessian.STEP * hessian.one_atom_moved(batch.graph)
        pair = [
            (rest.forces - with_gradient(model, batch, tasks, moved=moved)[1].forces) / hessian.STEP
            for model, (_, rest) in zip((student, teacher), predictions, strict=True)
        ]
        rows.append(mean(*pair))
    labels = multitask_loss(out.energy, out.forces, batch, tasks)
    expected = {
        "kd_energy": mean(out.energy, known.energy),
        "kd_forces": mean(out.forces, known.forces),
        "kd_node": sum(mean(a, b) for a, b in zip(mine.mlp_E, theirs.mlp_E, strict=True)),
        "kd_hessian": sum(rows) / 2,
        **{name: value.item() for name, value in labels.parts.items()},
    }
    assert {name: value.item() for name, value in losses.parts.items()} == pytest.approx(expected, rel=1e-9)
    weights = {"kd_energy": 1.0, "kd_forces": 2.0, "kd_node": 3.0, "kd_hessian": 0.5}
    total = 0.25 * labels.total.item() + sum(weight * expected[name] for name, weight in weights.items())
    assert losses.total.item() == pytest.approx(total, rel=1e-9)


def test_gradient_of_the_loss(teacher, batch, sources):
    """By every parameter at once, against central differences; the teacher learns nothing."""
    student, frozen = ejmp.prune(teacher, blocks=1), copy.deepcopy(teacher)
    objective = Distillation(student, frozen, tasks_of(sources), TERMS)

    def loss():
        torch.manual_seed(3)
        return objective(batch).total

    parameters = list(student.parameters())
    torch.manual_seed(0)
    directions = [torch.randn_like(parameter) * parameter.std().nan_to_num() for parameter in parameters]
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    slope = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True) if g is not None)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += sign * 1e-6 * direction
            values.append(loss().item())
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter -= sign * 1e-6 * direction
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)
    assert all(parameter.grad is None for parameter in frozen.parameters())


def test_the_weight_of_the_rows_falls(teacher, batch, sources):
    objective = Distillation(ejmp.prune(teacher, blocks=1), teacher, tasks_of(sources), TERMS)
    totals = []
    for progress in (0.0, 0.5, 1.0):
        torch.manual_seed(3)
        objective.progress = progress
        losses = objective(batch)
        totals.append(losses.total.item())
        if progress == 0:
            rows = losses.parts["kd_hessian"].item()
    assert totals[0] - totals[1] == pytest.approx(0.25 * rows, rel=1e-6)
    assert totals[0] - totals[2] == pytest.approx(0.5 * rows, rel=1e-6)
    assert "kd_hessian" not in losses.parts


def test_a_run(teacher, sources, ranks, tmp_path):
    """From a fine-tuned teacher to a smaller model with the same task, which the progress of the run reaches."""
    start = copy.deepcopy(teacher).float()
    student = ejmp.prune(start, blocks=1)
    objective = Distillation(student, start, tasks_of(sources), TERMS)
    config = dataclasses.replace(presets.demo("finetune"), steps=3, batch_size=2, validate_every=3, log_every=1)
    result = train(Run(objective=objective, sources=sources, config=config, directory=tmp_path, ranks=ranks))
    assert result.finished
    assert objective.progress == pytest.approx(2 / 3)
    assert (tmp_path / "log.jsonl").read_text().count('"kd_hessian"') == 3
    small = ejmp.load(tmp_path / FINAL)
    assert (small.config.blocks, small.tasks) == (1, start.tasks)


def test_refused(teacher, sources):
    teacher = copy.deepcopy(teacher).float()
    with pytest.raises(ValueError, match="hessian_rows: expected 1 or more, got 0"):
        DistillConfig(hessian_rows=0)
    mix = demo_mix()
    direct = ejmp.load(demo_teacher())
    with pytest.raises(ValueError, match="hessian: rows are those of the energy"):
        Distillation(ejmp.prune(direct, blocks=1), direct, tasks_of(mix), DistillConfig(hessian=1.0))
    student = ejmp.prune(teacher, blocks=2)
    student.config = dataclasses.replace(student.config, depths=(1, 2))
    with pytest.raises(ValueError, match="several depths on energies and direct forces only"):
        Distillation(student, teacher, tasks_of(sources), TERMS)


def test_the_flag():
    terms = parse_terms("forces=1,hessian=0.1,hessian_rows=3")
    assert (terms.hessian, terms.hessian_rows, terms.energy) == (0.1, 3, 0.0)
    assert parse_terms("forces=1").hessian_rows == 1
    with pytest.raises(ValueError, match="expected NAME=WEIGHT"):
        parse_terms("hessian_rows=1.5")


def test_synthetic_structures(ranks, tmp_path):
    """Frames of walks with the teacher's forces, labelled by it in eV, added to the training split and kept."""
    teacher = ejmp.load(demo_teacher())
    sources = few([source for source in demo_mix() if source.name == "ani1x"], 6)
    (found,) = with_synthetic(sources, teacher, tmp_path, 13, ranks, temperature=400.0, seed=1)
    train_split, before = found.split("train"), sources[0].split("train")
    assert (len(train_split), len(train_split.num_atoms), train_split.info.count) == (19, 19, 19)
    assert found.split("val") is sources[0].split("val")
    assert np.array_equal(train_split[5].positions, before[5].positions)
    calculator = ejmp.Calculator(teacher, "ani1x")
    frames = [train_split[number] for number in range(6, 19)]
    for structure in frames:
        atoms = ase.Atoms(structure.numbers, structure.positions, calculator=calculator)
        assert structure.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-4)
        np.testing.assert_allclose(structure.forces, atoms.get_forces(), rtol=0, atol=1e-4)
    for one, other in itertools.pairwise(frames[:10]):  # of one walk
        assert np.array_equal(one.numbers, other.numbers)
        assert 0.01 < np.abs(one.positions - other.positions).max() < 1.0
    again = with_synthetic(sources, teacher, tmp_path, 13, ranks)
    assert np.array_equal(again[0].split("train")[18].positions, frames[-1].positions)


def test_walks_that_a_teacher_leads_astray_are_left_out(teacher, sources, ranks, tmp_path):
    """A random head brings atoms together within some frames."""
    (found,) = with_synthetic(sources, copy.deepcopy(teacher).float(), tmp_path, 20, ranks, temperature=400.0, seed=1)
    assert 8 < len(found.split("train")) < 26
