"""The model for torch-sim passes torch-sim's own validator, and many systems give what each gives alone."""

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

import ejmp
from ejmp import GraphSettings, Task

torch_sim = pytest.importorskip("torch_sim")
from torch_sim.models.interface import validate_model_outputs  # noqa: E402

from ejmp.torchsim import JMPModel  # noqa: E402

CPU, F64 = torch.device("cpu"), torch.float64
SHORT = GraphSettings(cutoff=5.0, max_neighbors=12, tags="none")
TASKS = (
    Task(name="direct", mean=0.25, std=2.0, force_std=0.5, graph=SHORT),
    Task(name="gradient", head=1, mean=-0.5, std=3.0, forces="gradient", graph=SHORT),
)


@pytest.fixture(scope="module")
def model(tiny):
    model = ejmp.prune(tiny, blocks=1)
    model.tasks = TASKS
    return model


@pytest.fixture(scope="module")
def atoms():
    crystals = [bulk("Cu", a=3.7, cubic=True), bulk("Si", "diamond", a=5.43), bulk("Fe", a=2.9).repeat((2, 1, 1))]
    for i, crystal in enumerate(crystals):
        crystal.rattle(0.05, seed=i)
    return crystals


@pytest.mark.parametrize("task", ["direct", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_its_own_validator(model, task, dtype):
    """States in float64, whatever the type of the weights."""
    own = ejmp.prune(model, blocks=1).to(dtype)
    validate_model_outputs(JMPModel(own, task), CPU, F64)


@pytest.mark.parametrize("task", ["direct", "gradient"])
def test_batches_equal_singles_and_the_predictor(model, atoms, task):
    sim = JMPModel(model, task)
    assert (sim.dtype, sim.device, sim.compute_forces, sim.compute_stress) == (F64, CPU, True, True)
    together = sim(torch_sim.io.atoms_to_state(atoms, CPU, F64))
    predictions = ejmp.Predictor(model, task, stress=True)(atoms)
    first = 0
    for i, (one, expected) in enumerate(zip(atoms, predictions, strict=True)):
        alone = sim(torch_sim.io.atoms_to_state([one], CPU, F64))
        rows = slice(first, first + len(one))
        first += len(one)
        assert abs(together["energy"][i] - alone["energy"][0]).item() <= 1e-10 * abs(expected.energy)
        assert abs(together["energy"][i].item() - expected.energy) <= 1e-10 * abs(expected.energy)
        assert np.abs((together["forces"][rows] - alone["forces"]).numpy()).max() <= 1e-10
        assert np.abs(together["forces"][rows].numpy() - expected.forces).max() <= 1e-10
        voigt = together["stress"][i].numpy()[(0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)]
        assert np.abs(voigt - expected.stress).max() <= 1e-10


def test_a_molecule_has_no_stress(model):
    assert JMPModel(model, "direct")(torch_sim.io.atoms_to_state([molecule("CH3OH")], CPU, F64))["stress"].isnan().all()


def test_without_stress(model, atoms):
    sim = JMPModel(model, "gradient", stress=False)
    assert set(sim(torch_sim.io.atoms_to_state(atoms, CPU, F64))) == {"energy", "forces"}
    sim.compute_stress = True
    assert "stress" in sim(torch_sim.io.atoms_to_state(atoms, CPU, F64))


def test_other_targets_are_refused(model):
    other = ejmp.prune(model, blocks=1)
    other.tasks = [Task(name="gap", target="gap", forces=None)]
    with pytest.raises(ValueError, match="task gap predicts gap, not the energy"):
        JMPModel(other)
