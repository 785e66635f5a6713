"""Predictions in eV and A: against the model's raw outputs put into units by hand, and against differences."""

import dataclasses

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

import ejmp
from ejmp import GraphSettings, Task
from ejmp.predict import predictor as module
from ejmp.predict.quantities import quantities

SHORT = GraphSettings(cutoff=5.0, max_neighbors=12, tags="none")
REFERENCE = {1: -13.5, 6: -1030.0, 8: -2041.0, 29: -3.0}
SHEAR = np.array([[0, 0.1, 0.2], [0, 0, 0.3], [0.1, 0, 0]])
TASKS = (
    Task(name="direct", linear_reference=REFERENCE, mean=0.25, std=2.0, force_std=0.5, graph=SHORT),
    Task(name="gradient", head=1, linear_reference=REFERENCE, mean=-0.5, std=3.0, forces="gradient", graph=SHORT),
    Task(name="gap", head=2, target="gap", unit="eV", mean=1.5, std=0.5, forces=None, graph=SHORT),
    Task(name="unknown", head=3, linear_reference=None, std=2.0, graph=SHORT),
)


@pytest.fixture(scope="module")
def model(tiny):
    model = ejmp.prune(tiny, blocks=2)
    model.tasks = TASKS
    return model


@pytest.fixture(scope="module")
def structures():
    crystal = bulk("Cu", a=3.7, cubic=True)
    crystal.rattle(0.05, seed=1)
    return [molecule("CH3CH2OH"), molecule("H2O"), crystal, molecule("CO2"), molecule("C2H6")]


def test_units_by_hand(model, structures):
    """Energies and direct forces of each structure alone, out of the raw outputs."""
    task = TASKS[0]
    for atoms, found in zip(structures, ejmp.Predictor(model, "direct")(structures), strict=True):
        out = model(ejmp.build_graph(atoms, settings=SHORT, dtype=torch.float64))
        reference = sum(REFERENCE[z] for z in atoms.numbers.tolist())
        assert found.energy == pytest.approx(out.energy[0, 0].item() * 2.0 + 0.25 + reference, rel=1e-12)
        assert found.energies.sum() == pytest.approx(found.energy, rel=1e-12)
        assert np.allclose(found.forces, out.forces[:, 0].detach().numpy() * task.force_std, rtol=1e-12, atol=1e-14)
        assert (found.unit, found.stress) == ("eV", None)


@pytest.mark.parametrize("task", ["direct", "gradient", "gap"])
def test_only_the_heads_of_the_task_are_run(model, structures, task):
    predict = ejmp.Predictor(model, task)
    assert (predict.model.config.num_tasks, len(predict.model.output.out_forces)) == (1, 1)
    assert (model.config.num_tasks, len(model.output.out_energy)) == (4, 4)
    assert model.tasks == TASKS
    graph = ejmp.build_graph(structures, settings=SHORT, dtype=torch.float64)
    out, alone = model(graph), predict.model(graph)
    number = model.task(task).head
    assert torch.equal(alone.energy[:, 0], out.energy[:, number])
    assert torch.equal(alone.energies[:, 0], out.energies[:, number])
    assert torch.equal(alone.forces[:, 0], out.forces[:, number])


def test_a_compiled_model_stays_compiled(model):
    """Its heads are all of them: what was compiled is the whole model."""
    whole = model.on()
    whole.compile(compiler=None)
    assert ejmp.Predictor(whole, "direct").model is whole


def test_mean_of_atoms(tiny_config, structures):
    model = ejmp.JMP(dataclasses.replace(tiny_config, energy_reduction="mean"), tasks=[TASKS[2]]).double()
    found = ejmp.Predictor(model)(structures)
    out = model(ejmp.build_graph(structures, settings=SHORT, dtype=torch.float64)).energy[:, 2] * 0.5 + 1.5
    assert [p.energy for p in found] == pytest.approx(out.tolist(), rel=1e-12)
    assert [p.energies.sum() for p in found] == pytest.approx(out.tolist(), rel=1e-12)
    assert found[0].forces is None


def moved(atoms, i, axis, step):
    other = atoms.copy()
    other.positions[i, axis] += step
    return other


def test_gradient_forces_against_differences(model, structures):
    atoms = structures[2]
    predict = ejmp.Predictor(model, "gradient")
    (found,) = predict(atoms)
    for i, axis in ((0, 0), (2, 1), (3, 2)):
        plus, minus = predict([moved(atoms, i, axis, step) for step in (1e-4, -1e-4)])
        assert found.forces[i, axis] == pytest.approx(-(plus.energy - minus.energy) / 2e-4, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("task", ["direct", "gradient"])
def test_stress_against_differences(model, structures, task):
    """All six components, for a triclinic cell, by straining the cell."""
    atoms = structures[2].copy()
    atoms.set_cell(atoms.cell.array + SHEAR, scale_atoms=True)
    predict = ejmp.Predictor(model, task, stress=True)
    (found,) = predict(atoms)
    numeric = []
    for row, column in zip(*module.VOIGT, strict=True):
        energies = []
        for step in (1e-5, -1e-5):
            strain = np.eye(3)
            strain[row, column] += step / 2
            strain[column, row] += step / 2
            other = atoms.copy()
            other.set_cell(atoms.cell.array @ strain, scale_atoms=True)
            energies.append(predict(other)[0].energy)
        numeric.append((energies[0] - energies[1]) / 2e-5 / atoms.get_volume())
    assert found.stress == pytest.approx(numeric, rel=1e-6, abs=1e-8)


def test_batches_do_not_change_predictions(model, structures):
    many = structures * 3
    whole = ejmp.Predictor(model, "gradient", stress=True)(many)
    parts = ejmp.Predictor(model, "gradient", stress=True, max_edges=70)(many)
    for a, b in zip(whole, parts, strict=True):
        assert a.energy == pytest.approx(b.energy, rel=1e-12)
        assert np.allclose(a.forces, b.forces, atol=1e-11)
        assert (a.stress is None and b.stress is None) or np.allclose(a.stress, b.stress, atol=1e-12)
    assert [p.stress is None for p in whole[:5]] == [True, True, False, True, True]


def test_batches_are_halved_when_memory_runs_out(model, structures, monkeypatch):
    sizes = []

    def short_of_memory(model, graph, task, **options):
        sizes.append(graph.num_structures)
        if graph.num_structures > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return quantities(model, graph, task, **options)

    monkeypatch.setattr(module, "quantities", short_of_memory)
    predict = ejmp.Predictor(model, "direct")
    alike = [structures[1]] * 12
    assert len(predict(alike)) == 12
    assert sizes[:3] == [12, 6, 3]
    assert max(sizes[3:]) <= 2

    def always(*_args, **_options):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(module, "quantities", always)
    with pytest.raises(RuntimeError, match="structure 0: 3 atoms alone do not fit into memory"):
        predict(alike)


def test_other_errors_are_not_memory(model, monkeypatch):
    def broken(*_args, **_options):
        raise RuntimeError("something else")

    monkeypatch.setattr(module, "quantities", broken)
    with pytest.raises(RuntimeError, match="something else"):
        ejmp.Predictor(model, "direct")(molecule("H2O"))


def test_what_cannot_be_predicted_is_refused(model, tiny):
    with pytest.raises(ValueError, match="does not say what its heads predict"):
        ejmp.Predictor(tiny)
    with pytest.raises(ValueError, match="task: expected one of direct, gradient, gap, unknown, got None"):
        ejmp.Predictor(model)
    with pytest.raises(ValueError, match="gradient was not trained on direct forces"):
        ejmp.Predictor(model, "gradient", forces="direct")
    with pytest.raises(ValueError, match="gap predicts gap, which has none"):
        ejmp.Predictor(model, "gap", forces="gradient")
    with pytest.raises(ValueError, match="max_edges"):
        ejmp.Predictor(model, "direct", max_edges=0)
    with pytest.raises(ValueError, match=r"no reference energy of the elements with atomic numbers \[10\]"):
        ejmp.Predictor(model, "direct")(ejmp.Structure(numbers=[10], positions=[[0, 0, 0.0]]))


def test_a_refused_structure_has_its_number_among_all(model, structures):
    nowhere = structures[1].copy()
    nowhere.positions[0] = np.nan
    with pytest.raises(ValueError, match="structure 5: positions"):
        ejmp.Predictor(model, "direct", max_edges=70)([*structures, nowhere])


def test_inside_inference_mode(model, structures):
    (expected,) = ejmp.Predictor(model, "gradient")(structures[1])
    with torch.inference_mode():
        (found,) = ejmp.Predictor(model, "gradient")(structures[1])
    assert np.array_equal(found.forces, expected.forces)


def test_batches_fit_into_memory(model):
    """A JMP-L keeps more per edge with gradients than without; no estimate is above the limit."""
    with torch.device("meta"):
        large = ejmp.JMP(ejmp.jmp_l(scalar=True))
    edges = {gradient: module.automatic_edges(large, gradient=gradient) for gradient in (False, True)}
    assert 1 <= edges[True] <= edges[False] <= module.MOST_EDGES
    assert module.automatic_edges(model, gradient=True) == module.MOST_EDGES


def test_an_unknown_reference_is_said(model):
    with pytest.warns(UserWarning, match="task unknown: the model's file does not say which energy per element"):
        predict = ejmp.Predictor(model, "unknown", forces=None)
    (found,) = predict(molecule("H2O"))
    raw = model(ejmp.build_graph(molecule("H2O"), settings=SHORT, dtype=torch.float64)).energy[0, 3].item()
    assert found.energy == pytest.approx(2.0 * raw)
    assert found.forces is None


def test_a_file_and_other_precisions(model, tmp_path, structures):
    ejmp.save(model, tmp_path / "model")
    expected = [p.energy for p in ejmp.Predictor(model, "direct")(structures)]
    for precision, tolerance in (("fp64", 1e-12), (None, 1e-12)):
        predict = ejmp.Predictor(tmp_path / "model", "direct", precision=precision)
        assert [p.energy for p in predict(structures)] == pytest.approx(expected, rel=tolerance)
    single = ejmp.load(tmp_path / "model").float()
    assert ejmp.Predictor(single, "direct", precision="fp64").model.dtype == torch.float64
    assert single.dtype == torch.float32
