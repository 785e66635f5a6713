"""Fine-tuning recipes: a step by hand in float64, tasks of record stores, the flags, and what a validation takes."""

import argparse
import copy
import dataclasses
import time

import numpy as np
import pytest
import torch
from ase.build import molecule

import ejmp
from ejmp.catalog import CATALOG, FINETUNING
from ejmp.data import DatasetInfo, Format, Part, Structure, convert
from ejmp.data.sampling.batch import make_batch
from ejmp.model.checkpoint import load, save
from ejmp.train import presets
from ejmp.train.config import TrainConfig
from ejmp.train.flags import COMMANDS
from ejmp.train.objective import Supervised
from ejmp.train.recipes import finetuning_data, pretraining_data
from ejmp.train.sources import TaskData, at_most, from_stores, with_tasks_of
from ejmp.train.start import for_finetuning
from ejmp.train.task import Task, Tasks, finetune_task

FORCE_TASKS = {"aspirin": (1.2733363, 10.0), "ac_ala3_nhme": (1.1291506, 100.0)}
"""Force std (eV/A) and weight, from the specification."""


def shaken(name, seed, **labels):
    random = np.random.default_rng(seed)
    atoms = molecule(name)
    positions = atoms.positions + random.normal(scale=0.05, size=atoms.positions.shape)
    forces = random.normal(size=positions.shape)
    return Structure(numbers=atoms.numbers, positions=positions, forces=forces, id=f"{name}{seed}", **labels)


def differentiated(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_step(model, task, structures, expected):
    """Loss and gradient of the objective are those of a loss computed by hand."""
    ours = copy.deepcopy(model)
    batch = make_batch(structures, [0] * len(structures), settings=task.graph, dtype=torch.float64)
    total = Supervised(ours, Tasks([task]))(batch).total
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    found, gradients = differentiated(total, ours), differentiated(expected, model)
    assert set(found) == set(gradients)
    assert sum(bool(g.any()) for g in gradients.values()) > 20
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11 * float(gradient.abs().max()) + 1e-14)


@pytest.mark.parametrize("name", FORCE_TASKS)
def test_a_step_on_forces_by_hand(tiny, name):
    """The loss is w * mean over the batch's atoms of |-d(raw energy)/dr - F / force_std|; no energy is in it."""
    std, weight = FORCE_TASKS[name]
    task = finetune_task(name)
    model = for_finetuning(tiny, biases=False).on(backend="reference")
    assert not [key for key in model.state_dict() if key.startswith("output.") and "bias" in key]
    structures = [shaken("H2O", 0, energy=-1e4), shaken("CH3CH2OH", 1, energy=1e4)]  # of 3 and 9 atoms
    norms = []
    for structure in structures:  # one at a time
        graph = ejmp.build_graph(structure, settings=task.graph, dtype=torch.float64)
        graph = graph.with_positions(graph.positions.detach().requires_grad_())
        raw = model(graph).energy[0, 0]
        (slope,) = torch.autograd.grad(raw, graph.positions, create_graph=True)
        error = -slope - torch.from_numpy(structure.forces) / std + 1e-6
        norms.append(error.square().sum(1).sqrt())
    assert_step(model, task, structures, weight * torch.cat(norms).sum() / 12)


@pytest.mark.parametrize("name", ["qm9_u0", "qmof_gap"])
def test_a_step_on_a_target_by_hand(tiny, name):
    """The loss is the mean over structures of |raw - (y - reference - mean) / std|."""
    mean, std = {"qm9_u0": (0.0028667436, 1.0965848), "qmof_gap": (2.1866251527, 1.175752521125648)}[name]
    reference = {1: -16.43, 6: -1036.0, 8: -2047.0} if name == "qm9_u0" else {}
    task = dataclasses.replace(finetune_task(name), linear_reference=reference)
    model = for_finetuning(tiny, reduction=FINETUNING[name].reduction).on(backend="reference")
    structures = [shaken("H2O", 0, energy=-2080.0, targets={"bandgap": 1.0})]
    structures += [shaken("CH3CH2OH", 1, energy=-4217.0, targets={"bandgap": 4.0})]
    errors = []
    for structure in structures:
        graph = ejmp.build_graph(structure, settings=task.graph, dtype=torch.float64)
        y = structure.energy if name == "qm9_u0" else structure.targets["bandgap"]
        y -= sum(reference.get(z, 0.0) for z in structure.numbers.tolist())
        errors.append((model(graph).energy[0, 0] - (y - mean) / std).abs())
    assert_step(model, task, structures, sum(errors) / 2)


def written(folder, name, structures, split="train"):
    """Return a record store, as a user names it, of structures."""
    parts = Format(
        parts=lambda _: [Part(name="all", count=len(structures), split=split)],
        read=lambda _path, _part: iter(structures),
    )
    convert(folder, folder / name, format=parts)
    return f"{name}={folder / name}"


def test_tasks_of_stores(tmp_path):
    frames = [shaken("H2O", i, energy=-2000.0 + i) for i in range(8)]
    (own,) = from_stores(written(tmp_path, "mine", frames))
    (rmd17,) = from_stores(written(tmp_path, "rmd17", frames))
    forces = np.concatenate([frame.forces for frame in frames])
    deviation = float(np.sqrt(np.mean(forces**2)))
    task = finetuning_data(own).task
    assert (task.energy_weight, task.force_weight, task.force_mean, task.forces) == (1, 100, "atoms", "gradient")
    assert task.force_std == pytest.approx(deviation)
    assert task.std == pytest.approx(np.std([frame.energy for frame in frames]))
    task = finetuning_data(rmd17).task
    assert (task.energy_weight, task.force_weight, task.force_mean) == (0, 10, "atoms")
    assert task.std == task.force_std == pytest.approx(deviation)
    asked = finetuning_data(own, recipe=FINETUNING["aspirin"]).task
    assert asked == dataclasses.replace(finetune_task("aspirin"), name="mine")
    (oc20,) = from_stores(written(tmp_path, "oc20", frames))
    task = pretraining_data(oc20, 2).task
    assert (task.head, task.mean, task.force_weight, task.force_mean) == (2, 0.0, 73.0, "structures")
    assert (task.std, task.force_std) == (24.901469505465872, 0.5111534595489502)
    assert task.linear_reference == oc20.splits["train"].info.linear_reference != {}
    (energies,) = from_stores(written(tmp_path, "spice", [dataclasses.replace(frame, forces=None) for frame in frames]))
    with pytest.raises(ValueError, match="spice has no forces, and JMP's recipe for it learns forces alone"):
        finetuning_data(energies)


def test_targets_of_qm9_less_a_reference(tmp_path):
    """G of these molecules is exactly a sum over atoms and a part that averages to zero; mu is as it is."""
    names = ["H2O", "CH4", "CH3OH", "H2O", "CH4", "CH3OH"]
    part = [0.5, 0.5, 0.5, -0.5, -0.5, -0.5]
    values = {"H": -16.0, "C": -1036.0, "O": -2047.0}
    frames = []
    for i, name in enumerate(names):
        total = sum(values[symbol] for symbol in molecule(name).get_chemical_symbols())
        frames.append(shaken(name, i, energy=0.0, targets={"G": total + part[i], "mu": float(i)}))
    (stores,) = from_stores(written(tmp_path, "qm9", frames))
    task = finetuning_data(stores, target="G").task
    assert task.linear_reference == pytest.approx({1: -16.0, 6: -1036.0, 8: -2047.0})
    assert (task.mean, task.std) == pytest.approx((0.0, 0.5), abs=1e-9)
    task = finetuning_data(stores, target="mu").task
    assert (task.mean, task.std, task.linear_reference) == (2.5, pytest.approx(np.std(range(6))), {})
    assert CATALOG["qm9"].referenced == ("U0", "U", "H", "G", "Cv", "zpve")


def test_evaluation_takes_the_saved_tasks(tmp_path, tiny):
    """Data without energies, and of a name with no known graphs, needs no task of its own."""
    frames = [dataclasses.replace(shaken("H2O", i), forces=None, targets={"bandgap": float(i)}) for i in range(4)]
    spec = written(tmp_path, "frameworks", frames)
    (stores,) = from_stores(spec)
    model = for_finetuning(tiny, reduction="mean").float()
    model.tasks = [dataclasses.replace(finetuning_data(stores, target="bandgap").task, graph=CATALOG["qmof"].graph)]
    save(model, tmp_path / "model")
    (found,) = with_tasks_of(tmp_path / "model", from_stores(spec), load(tmp_path / "model"))
    assert found.task == model.tasks[0]
    assert (found.task.target, found.task.forces, found.task.graph.cutoff) == ("bandgap", None, 19.0)


class Numbered:
    """A dataset of so many structures that nobody reads."""

    def __init__(self, count):
        self.info = DatasetInfo(name="x", format="custom", split="val", count=count, source="", licence="")
        self.num_atoms, self.num_edges = np.arange(count), np.arange(count) * 2

    def __len__(self):
        return len(self.num_atoms)

    def __getitem__(self, index):
        return index


def test_validation_takes_the_same_random_structures():
    source = TaskData(splits={"val": Numbered(1_000_000)}, task=Task(name="x"))
    begin = time.perf_counter()
    chosen = [at_most(source, "val", 500, seed=seed).split("val") for seed in (1, 1, 2)]
    assert time.perf_counter() - begin < 2
    numbers = [[dataset[i] for i in range(len(dataset))] for dataset in chosen]
    assert numbers[0] == numbers[1] == sorted(set(numbers[0]))
    assert len(set(numbers[0]) & set(numbers[2])) < 10  # 0.25 are expected
    assert np.mean(numbers[0]) == pytest.approx(5e5, rel=0.15)
    assert chosen[0].num_edges.tolist() == [2 * number for number in numbers[0]]
    assert at_most(source, "val", None) is source
    assert at_most(source, "val", 1_000_000) is source


def request(name, *words):
    parser = argparse.ArgumentParser()
    COMMANDS[name].add_flags(parser)
    return COMMANDS[name].request(parser.parse_args(list(words)))


def test_flags_of_recipes():
    for words, recipe in (
        (("--data", "rmd17=a"), "aspirin"),
        (("--data", "mine=a", "--recipe", "qmof_gap"), "qmof_gap"),
        (("--data", "qm9=a", "--target", "U0"), "qm9_u0"),
    ):
        assert request("finetune", *words).run.config == presets.finetune(FINETUNING[recipe])
    assert request("finetune", "--data", "mine=a").run.config == presets.finetune()
    assert request("distill", "--data", "oc20=a", "--blocks", "4").run.config.samples == 1_800_000
    with pytest.raises(ValueError, match="target: the recipe qmof_gap learns bandgap, got energy"):
        request("finetune", "--data", "a=b", "--recipe", "qmof_gap", "--target", "energy")
    with pytest.raises(ValueError, match="recipe: expected with --data or FRAMES"):
        request("finetune", "--recipe", "qmof_gap")


def test_flags_of_lengths():
    config = request("finetune", "--data", "rmd17=a", "--epochs", "3", "--max-seconds", "60").run.config
    assert (config.epochs, config.max_seconds) == (3, 60.0)
    config = request("finetune", "--data", "rmd17=a", "--steps", "7", "--warmup-steps", "2").run.config
    assert (config.epochs, config.steps, config.warmup_epochs, config.cosine_epochs) == (None, 7, None, 27)
    assert config.in_steps(epoch_size=950, step_size=1).steps == 7
    config = request("distill", "--data", "oc20=a", "--blocks", "4", "--epochs", "1").run.config
    assert (config.samples, config.epochs) == (None, 1)
    config = request("pretrain", "--data", "oc20=a", "--samples", "1001", "--val-structures", "5").run.config
    assert config.in_steps(epoch_size=10, step_size=8).steps == 126
    assert config.val_structures == 5
    for words, message in (
        (("--steps", "3", "--epochs", "4"), "--steps 3 and --epochs 4 exclude each other"),
        (("--samples", "3", "--epochs", "4"), "--epochs 4 and --samples 3 exclude each other"),
        (("--validate-every", "3", "--validate-epochs", "4"), "--validate-every 3 and --validate-epochs 4 exclude"),
        (("--max-seconds", "0"), "max_seconds: out of range: 0.0"),
        (("--val-structures", "0"), "val_structures: expected an integer from 1 on, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            request("pretrain", *words)
    with pytest.raises(ValueError, match="expected epochs or samples, got 1 and 2"):
        TrainConfig(epochs=1, samples=2)
