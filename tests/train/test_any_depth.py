"""One training for every depth: losses and gradients are the means of those of the pruned models."""

import copy
import dataclasses
import json

import pytest
import torch
from support.few import few
from support.inputs import require_native
from support.tolerances import relative_error

import ejmp
from ejmp import cli
from ejmp.compress.config import DistillConfig
from ejmp.data import InOrder
from ejmp.train.objective import Distillation, Supervised, freeze_blocks
from ejmp.train.sources import demo_mix, loader_of, tasks_of
from ejmp.train.start import for_finetuning, new_model
from ejmp.train.task import Tasks

DEPTHS = (1, 2, 3)


@pytest.fixture(scope="module")
def sources():
    return few(demo_mix(), 4)


@pytest.fixture(scope="module")
def batch(sources):
    sampler = InOrder(sizes=[len(source.split("train")) for source in sources], batch_size=4)
    return next(loader_of(sources, "train", sampler).batches())


@pytest.fixture(scope="module")
def made(tiny_config, sources):
    return new_model(dataclasses.replace(tiny_config, blocks=3, num_tasks=4, depths=DEPTHS), sources, seed=0)


@pytest.fixture
def model(made):
    return copy.deepcopy(made)


def gradients(objective, batch):
    model = objective.model
    model.zero_grad(set_to_none=True)
    losses = objective(batch)
    losses.total.backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_first_outputs_give_what_the_pruned_model_gives(model, batch, backend):
    if backend == "native":
        require_native()
    model = model.on(backend=backend)
    with torch.no_grad():
        features = model.features(batch.graph)
        for depth in DEPTHS:
            found = model.final_mlp(features.x_E[: depth + 1], features.x_F[: depth + 1], batch.graph)
            expected = ejmp.prune(model, blocks=depth).features(batch.graph)
            assert relative_error(found.mlp_E[-1], expected.mlp_E[-1]) < 1e-5
            assert relative_error(found.mlp_F[-1], expected.mlp_F[-1]) < 1e-5


def at_one_depth(model):
    """The model, to be trained at all of its blocks only."""
    model.config = dataclasses.replace(model.config, depths=None)
    return model


@pytest.fixture(params=["labels", "teacher", "teacher, frozen blocks"])
def objective_of(request, model, sources):
    """Makes the objective of a student."""
    frozen = "frozen" in request.param
    config = dataclasses.replace(model.config, depths=None)
    teacher = at_one_depth(ejmp.prune(model, blocks=3)) if frozen else ejmp.JMP(config, tasks=model.tasks)

    def make(student):
        if frozen:
            freeze_blocks(student)
        if request.param == "labels":
            return Supervised(student, tasks_of(sources))
        made = Distillation(student, teacher, tasks_of(sources), DistillConfig(energy=1.0, labels=0.5))
        assert (made.shared is not None) == frozen
        return made

    return make


def test_loss_and_gradients_are_the_means_over_depths(model, batch, objective_of):
    found, slopes = gradients(objective_of(model), batch)
    small = [at_one_depth(ejmp.prune(model, blocks=depth)) for depth in DEPTHS]
    singles = [gradients(objective_of(student), batch) for student in small]
    assert found.total.item() == pytest.approx(sum(losses.total.item() for losses, _ in singles) / 3, rel=1e-5)
    for name, part in found.parts.items():
        assert part.item() == pytest.approx(sum(losses.parts[name].item() for losses, _ in singles) / 3, rel=1e-5)
    assert set(slopes) == set(singles[-1][1])
    for name, slope in slopes.items():
        expected = torch.zeros_like(slope)
        for own in (own[name] for _, own in singles if name in own):
            expected[tuple(map(slice, own.shape))] += own / 3  # the sliced first layer has fewer columns
        assert (slope - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7, name


def test_the_config_says_it_and_pruning_keeps_what_is_true(model, tmp_path):
    ejmp.save(model, tmp_path / "model")
    loaded = ejmp.load(tmp_path / "model")
    assert loaded.config.depths == DEPTHS
    assert ejmp.prune(loaded, blocks=2).config.depths == (1, 2)
    assert ejmp.prune(loaded, blocks=1).config.depths is None
    assert ejmp.prune(loaded, keep=(0, 2)).config.depths is None
    assert for_finetuning(loaded).config.depths is None
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["depths"]  # as an earlier version wrote it
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert ejmp.load(tmp_path / "model").config.depths is None


@pytest.mark.parametrize("depths", [(), (0, 3), (1, 2), (3, 2), (1, 1, 3), (1.0, 3)])
def test_impossible_depths_are_named(tiny_config, depths):
    with pytest.raises(ValueError, match=r"JMPConfig\.depths: expected ascending numbers up to 3"):
        dataclasses.replace(tiny_config, blocks=3, depths=depths)


def test_gradient_forces_are_refused(model, batch):
    tasks = Tasks([dataclasses.replace(task, forces="gradient") for task in model.tasks])
    with pytest.raises(ValueError, match="several depths on energies and direct forces only"):
        Supervised(model, tasks)(batch)


def test_commands(tmp_path, capsys):
    """Pre-train for several depths, prune, distil a student for two depths; a resumed run must ask for the same."""
    pytest.importorskip("deepspeed")
    short = ["--steps", "2", "--warmup-steps", "1", "--batch-size", "2", "--val-structures", "2", "--device", "cpu"]
    run = str(tmp_path / "run")
    assert cli.main(["pretrain", "--any-depth", "--blocks", "3", "--run", run, *short]) == 0
    printed = capsys.readouterr().out
    assert "| trained |" in printed
    assert "| its first 2 blocks |" in printed
    assert ejmp.load(f"{run}/final").config.depths == (2, 3)
    assert cli.main(["prune", f"{run}/final", str(tmp_path / "two"), "--blocks", "2"]) == 0
    assert cli.main(["pretrain", "--blocks", "3", "--run", run, "--resume", *short]) == 2
    assert "depths is [2, 3] there and [3] here" in capsys.readouterr().err
    student = ["--teacher", f"{run}/final", "--blocks", "2", "--any-depth", "1", "--run", str(tmp_path / "student")]
    assert cli.main(["distill", *student, *short]) == 0
    assert "| its first block |" in capsys.readouterr().out
    assert ejmp.load(tmp_path / "student" / "final").config.depths == (1, 2)
    assert cli.main(["pretrain", "--blocks", "3", "--any-depth", "4", "--run", str(tmp_path / "no"), *short]) == 2
    assert "--any-depth: expected a number of blocks, 1 to 3, got 4" in capsys.readouterr().err
