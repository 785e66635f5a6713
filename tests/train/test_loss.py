"""Tasks, loss, metrics: against the public loss, against numpy, and what missing labels do."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

import ejmp
from ejmp.compress.config import DistillConfig
from ejmp.compress.distill import combine, distill_loss
from ejmp.data import DEMO_MIX, DatasetInfo, Statistics, demo
from ejmp.data.sampling.batch import make_batch
from ejmp.graph.settings import GraphSettings
from ejmp.train.loss import multitask_loss
from ejmp.train.metrics import Maes
from ejmp.train.task import Task, Tasks, finetune_task, pretrain_tasks

NAN = float("nan")


def molecules(counts, **labels):
    """Structures of atoms on a line, with labels by structure."""
    structures = []
    for b, n in enumerate(counts):
        positions = np.zeros((n, 3))
        positions[:, 0] = np.arange(n)
        labelled = {name: values[b] for name, values in labels.items()}
        structures.append(ejmp.Structure(numbers=np.ones(n, int), positions=positions, **labelled))
    return structures


def batch_of(structures, dataset):
    return make_batch(structures, dataset, settings=GraphSettings(cutoff=1.5, max_neighbors=2), dtype=torch.float64)


@pytest.fixture
def case():
    """Five structures of four tasks with labels in physical units, and raw predictions."""
    rng = np.random.default_rng(0)
    counts = [3, 5, 4, 2, 6]
    structures = molecules(
        counts,
        energy=rng.normal(-100, 30, 5).tolist(),
        forces=[rng.normal(size=(n, 3)) for n in counts],
        fixed=[np.arange(n) < 1 for n in counts],
    )
    tasks = Tasks([dataclasses.replace(t, linear_reference={1: -13.5 - d}) for d, t in enumerate(pretrain_tasks())])
    energy = torch.from_numpy(rng.normal(size=(5, 4))).requires_grad_()
    forces = torch.from_numpy(rng.normal(size=(20, 4, 3))).requires_grad_()
    return batch_of(structures, [2, 3, 0, 1, 0]), tasks, energy, forces


def test_public_loss(shared):
    with np.load(shared("golden/loss.npz")) as file:
        golden = dict(file)
    ends = np.cumsum(golden["natoms"])[:-1]
    structures = molecules(golden["natoms"], energy=golden["energy"].tolist(), forces=np.split(golden["forces"], ends))
    scales = zip(golden["energy_scale"].tolist(), golden["force_scale"].tolist(), strict=True)
    tasks = Tasks([Task(name=str(i), head=i, energy_weight=e, force_weight=f) for i, (e, f) in enumerate(scales)])
    batch = batch_of(structures, golden["task"])
    losses = multitask_loss(
        torch.from_numpy(golden["pred_energy"]), torch.from_numpy(golden["pred_forces"]), batch, tasks
    )
    assert losses.total.item() == pytest.approx(golden["loss"], rel=1e-12)
    assert losses.parts["energy"].item() == pytest.approx(golden["energy_loss"], rel=1e-12)
    assert losses.parts["forces"].item() == pytest.approx(golden["force_loss"], rel=1e-12)


def loss_by_hand(batch, tasks, energy, forces):
    """Return energy and force loss, computed in a loop over structures in numpy."""
    energies, norms = [], []
    for b, d in enumerate(batch.dataset.tolist()):
        task, atoms = tasks[d], slice(batch.graph.ptr[b], batch.graph.ptr[b + 1])
        label = batch.energy[b].item() - sum(
            task.linear_reference[z] for z in batch.graph.atomic_numbers[atoms].tolist()
        )
        if not np.isnan(label):
            energies.append(abs(energy[b, task.head].item() - (label - task.mean) / task.std) * task.energy_weight)
        error = forces[atoms, task.head].detach().numpy() - batch.forces[atoms].numpy() / task.force_std + 1e-6
        error = np.linalg.norm(error, axis=1)
        if not np.isnan(error).all():
            norms.append(np.nanmean(error) * task.force_weight)
    return np.mean(energies), np.mean(norms)


@pytest.mark.parametrize("missing", [False, True])
def test_labels_are_normalised(case, missing):
    batch, tasks, energy, forces = case
    if missing:
        batch.energy[1] = NAN
        batch.forces[:3] = NAN  # all of the first structure
        batch.forces[4, 2] = NAN  # one component of one atom of the second
    losses = multitask_loss(energy, forces, batch, tasks)
    expected = loss_by_hand(batch, tasks, energy, forces)
    assert [losses.parts["energy"].item(), losses.parts["forces"].item()] == pytest.approx(expected, rel=1e-12)
    assert losses.total.item() == pytest.approx(sum(expected), rel=1e-12)
    losses.total.backward()
    own = torch.zeros(5, 4, dtype=torch.bool)
    own[range(5), [2, 3, 0, 1, 0]] = True
    assert torch.equal(energy.grad != 0, own & batch.has_energy[:, None])
    trained = own[batch.graph.batch] & batch.has_forces[:, None]
    assert torch.equal((forces.grad != 0).any(2), trained)
    assert forces.grad.isfinite().all()


def test_without_any_label(case):
    batch, tasks, energy, forces = case
    batch.energy.fill_(NAN)
    batch.forces.fill_(NAN)
    total = multitask_loss(energy, forces, batch, tasks).total
    total.backward()
    assert total == 0
    assert not energy.grad.any()
    assert not forces.grad.any()


def test_exact_predictions_have_finite_gradients():
    """The norm of a zero error has no gradient; the offset keeps it away from there."""
    batch = batch_of(molecules([2], energy=[1.0], forces=[np.zeros((2, 3))]), [0])
    forces = torch.zeros(2, 1, 3, dtype=torch.float64, requires_grad=True)
    multitask_loss(torch.ones(1, 1).double(), forces, batch, Tasks([Task(name="a", force_weight=1.0)])).total.backward()
    assert forces.grad.isfinite().all()


def test_fixed_atoms_are_trained_on_but_not_measured(case):
    batch, tasks, energy, forces = case
    free = dataclasses.replace(batch, fixed=torch.zeros_like(batch.fixed))
    assert torch.equal(
        multitask_loss(energy, forces, batch, tasks).total, multitask_loss(energy, forces, free, tasks).total
    )
    one, other = Maes(tasks), Maes(tasks)
    one.update(energy, forces, batch)
    other.update(energy, forces, free)
    assert one.result()["oc20"]["forces_meV_per_A"] != other.result()["oc20"]["forces_meV_per_A"]


def test_other_targets_and_gradient_forces():
    """Gradient forces are in units of the energy's std; a target of its own is normalised by its own."""
    structures = molecules(
        [2, 3], energy=[-30.0, -50.0], targets=[{}, {"bandgap": 2.5}], forces=[np.ones((2, 3)), None]
    )
    batch = batch_of(structures, [0, 1])
    aspirin = dataclasses.replace(finetune_task("aspirin"), std=0.27, energy_weight=1.0, force_weight=100.0)
    tasks = Tasks([aspirin, finetune_task("qmof_gap")])
    energy = torch.zeros(2, 1, dtype=torch.float64)
    energy[0] = (-30.0 - tasks[0].mean) / tasks[0].std
    energy[1] = (2.5 - tasks[1].mean) / tasks[1].std
    forces = torch.full((5, 3), 1 / tasks[0].std, dtype=torch.float64)  # -d(raw energy)/dr, exact
    losses = multitask_loss(energy, forces, batch, tasks)
    assert losses.parts["energy"].item() == pytest.approx(0, abs=1e-12)
    assert losses.parts["forces"].item() == pytest.approx(100 * 3**0.5 * 1e-6, rel=1e-6)
    maes = Maes(tasks)
    maes.update(energy + 1, forces + 1, batch)
    assert maes.result() == {
        "aspirin": {
            "energy_meV": pytest.approx(1000 * tasks[0].std),
            "energy_meV_per_atom": pytest.approx(500 * tasks[0].std),
            "forces_meV_per_A": pytest.approx(1000 * tasks[0].std),
        },
        "qmof_gap": {"bandgap_eV": pytest.approx(tasks[1].std)},
    }
    assert tasks.energy(energy[:, 0], batch).tolist() == pytest.approx([-30.0, 2.5])
    assert tasks.forces(forces, batch)[:2].flatten().tolist() == pytest.approx([1] * 6)


def test_an_energy_that_is_not_trained_is_not_measured():
    """Its zero is anywhere; the forces, in units of their own deviation, follow from it."""
    batch = batch_of(molecules([2], energy=[-30.0], forces=[np.ones((2, 3))]), [0])
    maes = Maes(Tasks([finetune_task("aspirin")]))
    maes.update(torch.zeros(1, 1).double(), torch.full((2, 3), 2 / 1.2733363).double(), batch)
    assert maes.result() == {"aspirin": {"forces_meV_per_A": pytest.approx(1000)}}


@pytest.mark.parametrize("known", [True, False])
def test_fine_tuning_averages_forces_over_atoms(known):
    """Every atom of the batch counts the same, whatever the size of its molecule: not so in pre-training."""
    random = np.random.default_rng(1)
    labels = [random.normal(size=(n, 3)) for n in (2, 5)]
    if not known:
        labels[1][3, 2] = NAN
    batch = batch_of(molecules([2, 5], forces=labels), [0, 0])
    forces = random.normal(size=(7, 3))
    norms = np.linalg.norm(forces - np.concatenate(labels) / 1.3 + 1e-6, axis=1)
    for force_mean, mean in {
        "atoms": np.nanmean(norms),
        "structures": (np.nanmean(norms[:2]) + np.nanmean(norms[2:])) / 2,
    }.items():
        task = Task(name="a", std=1.3, force_std=1.3, force_weight=10.0, force_mean=force_mean, forces="gradient")
        losses = multitask_loss(torch.zeros(2, 1).double(), torch.from_numpy(forces), batch, Tasks([task]))
        assert losses.parts["forces"].item() == pytest.approx(10 * mean, rel=1e-12)


def test_large_energies_keep_their_digits():
    """JMP's aspirin energies are 1e5 times their std: float32 would lose the fifth digit of the loss."""
    task = dataclasses.replace(finetune_task("aspirin"), std=0.27, energy_weight=1.0, force_weight=0.0)
    batch = batch_of(molecules([2], energy=[task.mean + 1.5e-4 * task.std]), [0])
    losses = multitask_loss(torch.zeros(1, 1), None, batch, Tasks([task]))
    assert losses.total.dtype == torch.float32
    assert losses.total.item() == pytest.approx(1.5e-4, rel=1e-4)


def test_maes_against_numpy(case):
    """Two halves added up are the whole; the fixed atoms are left out."""
    batch, tasks, energy, forces = case
    batch.energy[1] = NAN
    batch.forces[4, 2] = NAN
    maes = Maes(tasks)
    maes.update(energy, forces, batch)
    found = maes.result()
    for d, task in enumerate(tasks):
        per_structure, per_atom, errors = [], [], []
        for b in np.flatnonzero(batch.dataset.numpy() == d):
            atoms = np.arange(*batch.graph.ptr[b : b + 2].tolist())
            reference = task.linear_reference[1] * len(atoms)
            error = abs(energy[b, d].item() * task.std + reference - batch.energy[b].item())
            per_structure.append(error)
            per_atom.append(error / len(atoms))
            atoms = atoms[(~batch.fixed & batch.has_forces).numpy()[atoms]]
            errors.append(np.abs(forces[atoms, d].detach().numpy() * task.force_std - batch.forces[atoms].numpy()))
        own = (
            {}
            if np.isnan(per_structure).all()
            else {
                "energy_meV": pytest.approx(1000 * np.mean(per_structure)),
                "energy_meV_per_atom": pytest.approx(1000 * np.mean(per_atom)),
            }
        )
        own["forces_meV_per_A"] = pytest.approx(1000 * np.concatenate(errors).mean())
        assert found[task.name] == own
    other = Maes(tasks)
    other.sums += maes.sums  # what an all_reduce does
    other.update(energy, forces, batch)
    assert torch.allclose(other.sums, 2 * maes.sums, rtol=1e-14)
    assert other.result()["oc20"] == pytest.approx(found["oc20"])


def test_nan_prediction_shows():
    tasks = Tasks([Task(name="a")])
    maes = Maes(tasks)
    maes.update(torch.full((1, 1), NAN), None, batch_of(molecules([2], energy=[1.0]), [0]))
    assert np.isnan(maes.result()["a"]["energy_meV"])


@pytest.mark.parametrize("name", DEMO_MIX)
def test_task_of_demo_data(name):
    """Normalised by its own statistics, a training split has mean 0 and std 1."""
    data = demo(name)
    task = Task.from_info(data.info, head=2)
    tasks = Tasks([task])
    structures = [data[i] for i in range(len(data))]
    batch = make_batch(
        structures, [0] * len(data), settings=GraphSettings(cutoff=3.0, max_neighbors=1), dtype=torch.float64
    )
    raw = tasks.raw_energy(batch)
    forces = (batch.forces / task.force_std)[~batch.fixed]  # the statistics are of free atoms
    assert task.forces == "direct"
    assert task.force_weight == 100
    assert raw.mean().item() == pytest.approx(0, abs=1e-6)
    assert raw.std(correction=0).item() == pytest.approx(1, rel=0.01)
    assert (forces**2).mean().sqrt().item() == pytest.approx(1, rel=0.01)
    assert torch.allclose(tasks.energy(raw, batch), batch.energy, rtol=1e-12)


def test_element_outside_the_reference_counts_as_missing():
    tasks = Tasks([Task(name="a", linear_reference={6: -1.0})])
    batch = batch_of(molecules([2], energy=[1.0]), [0])
    assert tasks.raw_energy(batch).isnan().all()


def mixed_batches():
    """Yield batches as different as ranks may get them: other tasks, no forces, no labels, no quadruplets, no edges."""
    slab, molecule, reaction = (demo(name)[0] for name in ("oc20", "ani1x", "transition1x"))
    pair = ejmp.Structure(numbers=[6, 1], positions=[[0.0, 0, 0], [0, 0, 1]])
    atom = ejmp.Structure(numbers=[6], positions=[[0.0, 0, 0]])
    no_forces = dataclasses.replace(reaction, forces=None)
    for listed in (
        [(0, slab)],
        [(2, molecule)],
        [(3, no_forces)],
        [(1, pair)],
        [(1, atom)],
        [(0, slab), (2, molecule)],
    ):
        datasets, structures = zip(*listed, strict=True)
        yield make_batch(structures, datasets, settings=GraphSettings(cutoff=8.0), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["direct", "gradient", "distilled"])
def test_gradients_come_in_one_order(tiny, backend, kind):
    """Gradients arrive for the same parameters in the same order, whatever the batch: ZeRO adds up ranks' by order."""
    model = copy.deepcopy(tiny).on(backend=backend)
    tasks = Tasks([Task.from_info(demo(name).info, head=head) for head, name in enumerate(DEMO_MIX)])
    arrived, orders = [], []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    for batch in mixed_batches():
        if kind == "gradient":
            graph = batch.graph.with_positions(batch.graph.positions.detach().requires_grad_())
            energy = model(graph, direct_forces=False).energy
            own = tasks.own_energy(energy, batch).sum()
            forces = -torch.autograd.grad(own, graph.positions, create_graph=True)[0]
            total = multitask_loss(energy, forces, batch, tasks).total
        else:
            features = model.features(batch.graph)
            out = model.heads(features, batch.graph)
            losses = multitask_loss(out.energy, out.forces, batch, tasks)
            if kind == "distilled":
                teacher = tiny.features(batch.graph)
                config = DistillConfig(labels=1.0, energy=1.0, edge_to_node=1.0, vector_to_vector=1.0)
                pair = (features, out), (teacher, tiny.heads(teacher, batch.graph))
                losses = combine(losses, distill_loss(*pair, batch.graph, config), config)
            total = losses.total
        total.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        orders.append(tuple(arrived))
        arrived.clear()
    assert len(set(orders)) == 1
    direct = {name for name, _ in model.named_parameters() if "orces" in name or "_F" in name}
    missing = {name for name, _ in model.named_parameters()} - set(orders[0])
    assert missing == (direct if kind == "gradient" else set())


def test_only_the_own_head_learns(tiny):
    """Gradients of other tasks' heads are zero; without labels those of all heads are."""
    data = demo("ani1x")
    tasks = Tasks([Task.from_info(data.info, head=1)])
    for structure in (data[0], dataclasses.replace(data[0], energy=None, forces=None)):
        batch = make_batch([structure], [0], settings=GraphSettings(cutoff=8.0), dtype=torch.float64)
        out = tiny(batch.graph)
        tiny.zero_grad()
        multitask_loss(out.energy, out.forces, batch, tasks).total.backward()
        learns = [bool(head[0].weight.grad.any()) for head in tiny.output.out_forces]
        assert learns == [False, structure.energy is not None, False, False]
    tiny.zero_grad()


INFO = DatasetInfo(name="x", format="npz", split="train", count=1, source="", licence="")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Task(name="a", head=-1), "head: expected 0 or more, got -1"),
        (lambda: Task(name="a", std=0.0), "std: expected a positive number, got 0.0"),
        (lambda: Task(name="a", force_weight=-1), "force_weight: expected 0 or more, got -1"),
        (lambda: Task(name="a", force_weight=1.0, forces=None), "forces: expected"),
        (lambda: Task(name="a", forces="indirect"), "got 'indirect'"),
        (lambda: Task(name="a", force_mean="steps"), "force_mean: expected"),
        (lambda: Tasks([]), "one per dataset"),
        (
            lambda: Tasks([Task(name="a", force_weight=1.0), finetune_task("aspirin")]),
            "expected one force_mean, got structures and atoms",
        ),
        (lambda: Tasks([Task(name="a"), Task(name="a")]), "different names"),
        (lambda: finetune_task("benzene"), "expected one of aspirin, .* got 'benzene'"),
        (lambda: Task.from_info(INFO), "x has statistics of none, got 'energy'"),
        (
            lambda: Task.from_info(
                dataclasses.replace(INFO, statistics={"gap": Statistics(mean=0.0, std=0.0, unit="eV")}), target="gap"
            ),
            "Task x: std: expected a positive number, got 0.0",
        ),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refused_predictions(case):
    batch, tasks, energy, forces = case
    with pytest.raises(ValueError, match="forces: task oc20 trains forces, got None"):
        multitask_loss(energy, None, batch, tasks)
    with pytest.raises(ValueError, match=r"energy: expected \[5, T, ...\] with T of at least 4, got \[5, 2\]"):
        multitask_loss(energy[:, :2], forces, batch, tasks)
    with pytest.raises(ValueError, match=r"forces: expected \[20, T, ...\] with T of at least 4"):
        multitask_loss(energy, forces[:, :2], batch, tasks)
