"""The ASE calculator: its numbers are the predictor's, ASE's own tools work with it, and it says what it assumes."""

import dataclasses
import gc
import warnings

import numpy as np
import pytest
import torch
from ase import units
from ase.build import add_adsorbate, bcc100, bulk, fcc111, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.constraints import FixAtoms
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS, FIRE

import ejmp
from ejmp import GraphSettings, Task

SHORT = GraphSettings(cutoff=5.0, max_neighbors=12, tags="none")
SHEAR = np.array([[0, 0.1, 0.2], [0, 0, 0.3], [0.1, 0, 0]])
TASKS = (
    Task(name="direct", mean=0.25, std=2.0, force_std=0.5, graph=SHORT),
    Task(name="gradient", head=1, mean=-0.5, std=0.05, forces="gradient", graph=SHORT),
    Task(name="oc20", head=2, std=2.0, forces="gradient", graph=GraphSettings(cutoff=4.0, max_neighbors=200)),
)


@pytest.fixture(scope="module")
def model(tiny):
    model = ejmp.prune(tiny, blocks=1)
    model.tasks = TASKS
    return model


@pytest.fixture
def crystal():
    atoms = bulk("Cu", a=3.7, cubic=True)
    atoms.set_cell(atoms.cell.array + SHEAR, scale_atoms=True)
    atoms.rattle(0.05, seed=1)
    return atoms


@pytest.mark.parametrize("task", ["direct", "gradient"])
def test_it_gives_what_the_predictor_gives(model, crystal, task):
    """To the last bit where both do the same, and to rounding where one records derivatives and the other does not."""
    crystal.calc = ejmp.Calculator(model, task)
    (with_stress,) = ejmp.Predictor(model, task, stress=True)(crystal)
    (expected,) = ejmp.Predictor(model, task, stress=task == "gradient")(crystal)
    assert crystal.get_potential_energy() == expected.energy == crystal.get_potential_energy(force_consistent=True)
    assert np.array_equal(crystal.get_forces(), expected.forces)
    assert np.allclose(crystal.get_stress(), with_stress.stress, rtol=1e-12, atol=1e-15)
    assert with_stress.energy == pytest.approx(expected.energy, rel=1e-14)
    assert np.allclose(with_stress.forces, expected.forces, rtol=1e-12, atol=1e-15)
    assert crystal.get_potential_energies().sum() == pytest.approx(expected.energy)


def test_forces_and_stress_are_derivatives(model, crystal):
    """By ASE's own central differences."""
    crystal.calc = ejmp.Calculator(model, "gradient")
    assert np.allclose(
        crystal.get_forces()[:2], calculate_numerical_forces(crystal, eps=1e-4, iatoms=[0, 1]), atol=1e-6
    )
    assert np.allclose(crystal.get_stress(), calculate_numerical_stress(crystal, eps=1e-5), atol=1e-6)


def test_nothing_is_computed_twice(model, crystal, monkeypatch):
    calls = []
    calculator = ejmp.Calculator(model, "gradient")
    build = calculator.graph
    monkeypatch.setattr(calculator, "graph", lambda atoms: calls.append(1) or build(atoms))
    crystal.calc = calculator
    crystal.get_potential_energy()
    crystal.get_forces()
    assert len(calls) == 1
    crystal.positions[0, 0] += 0.1
    crystal.get_forces()
    assert len(calls) == 2


@pytest.mark.parametrize("optimizer", [BFGS, FIRE])
def test_relaxation_of_a_slab_with_a_held_bottom(model, optimizer):
    slab = fcc111("Cu", size=(1, 1, 3), vacuum=5.0, a=3.7)
    add_adsorbate(slab, "O", 1.5, "fcc")
    slab.set_tags([0, 0, 1, 2])
    slab.rattle(0.05, seed=2)
    slab.set_constraint(FixAtoms(indices=[0, 1]))
    slab.calc = ejmp.Calculator(model, "oc20")
    held, before = slab.positions[:2].copy(), slab.get_potential_energy()
    optimizer(slab, logfile=None).run(fmax=0.01, steps=15)
    assert np.array_equal(slab.positions[:2], held)
    assert slab.get_potential_energy() < before


def test_dynamics_conserve_the_energy_and_leak_nothing(model):
    """Over steps of a molecule whose neighbours are all in reach, so that the energy is smooth."""
    atoms = molecule("H2O")
    atoms.calc = ejmp.Calculator(model, "gradient")
    atoms.set_velocities(np.random.default_rng(0).normal(scale=0.01, size=(3, 3)))
    dynamics = VelocityVerlet(atoms, timestep=0.25 * units.fs)
    total, tensors = [], []
    for _ in range(5):
        dynamics.run(40)
        total.append(atoms.get_total_energy())
        gc.collect()
        tensors.append(sum(type(x) is torch.Tensor for x in gc.get_objects()))
    assert np.ptp(total) < 1e-4 * atoms.get_kinetic_energy() + 1e-6
    assert tensors[-1] == tensors[0]


def test_it_says_what_tags_it_takes(model):
    molecules = molecule("CH3OH", vacuum=6.0)  # far from each other, in periodic cells or alone
    molecules.calc = ejmp.Calculator(model, "oc20")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        energy = molecules.get_potential_energy()
    methanol = molecules.copy()
    methanol.pbc = True
    methanol.calc = ejmp.Calculator(model, "oc20")
    with pytest.warns(UserWarning, match="have no tags, so each counts as an adsorbate's"):
        assert methanol.get_potential_energy() == pytest.approx(energy, rel=1e-12)
    energy = methanol.get_potential_energy()
    layers = methanol.copy()
    layers.set_tags([5, 4, 3, 2, 1, 0])
    layers.calc = ejmp.Calculator(model, "oc20")
    with pytest.warns(UserWarning, match="have tags other than 0, 1, 2"):
        assert layers.get_potential_energy() == energy
    for tag in (2, 0):
        own = methanol.copy()
        own.set_tags(tag)
        own.calc = ejmp.Calculator(model, "oc20")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same = own.get_potential_energy() == energy
        assert same == (tag == 2)


@pytest.mark.parametrize("build", [fcc111, bcc100])
def test_layer_numbers_of_ase_are_no_tags_of_oc20(model, build):
    """A slab of two layers has tags 1 and 2, with the surface on top; OC20's surface is 1 and its adsorbate 2."""
    slab = build("Cu" if build is fcc111 else "Fe", (2, 2, 2), vacuum=6.0, periodic=True)
    assert sorted(set(slab.get_tags())) == [1, 2]
    slab.calc = ejmp.Calculator(model, "oc20")
    with pytest.warns(UserWarning, match="layer numbers as tags, so each counts as an adsorbate's"):
        energy = slab.get_potential_energy()
    with pytest.raises(ValueError, match=r"structure 0: tags: .*layer numbers of ASE's slab builders"):
        ejmp.build_graph(slab, settings=ejmp.GraphSettings(tags="oc20"))
    every = slab.copy()
    every.set_tags(2)
    every.calc = ejmp.Calculator(model, "oc20")
    assert every.get_potential_energy() == energy
    own = slab.copy()
    own.set_tags(2 - slab.get_tags())  # the upper layer is the surface, 1, and the lower one bulk, 0
    own.calc = ejmp.Calculator(model, "oc20")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert own.get_potential_energy() != energy


def test_other_tags_are_another_structure(model, crystal):
    """ASE does not count tags among what can change; results of the old ones must not stay."""
    crystal.set_tags(2)
    crystal.calc = ejmp.Calculator(model, "oc20")
    adsorbate = crystal.get_potential_energy()
    crystal.set_tags(0)
    bulk = crystal.get_potential_energy()
    assert bulk != adsorbate
    assert ejmp.Calculator(model, "oc20").get_potential_energy(crystal) == bulk


def test_the_stress_comes_along_once_asked_for(model, crystal, monkeypatch):
    calls = []
    calculator = crystal.calc = ejmp.Calculator(model, "gradient")
    build = calculator.graph
    crystal.get_forces()
    assert "stress" not in calculator.results
    crystal.get_stress()
    monkeypatch.setattr(calculator, "graph", lambda atoms: calls.append(1) or build(atoms))
    crystal.positions[0, 0] += 0.1
    crystal.get_forces()
    crystal.get_stress()
    assert len(calls) == 1
    water = molecule("H2O")
    water.calc = calculator
    assert water.get_forces().shape == (3, 3)


def test_it_says_that_a_shell_was_cut(model):
    crystal = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    cut = dataclasses.replace(TASKS[1], graph=dataclasses.replace(SHORT, max_neighbors=9))
    keep = dataclasses.replace(cut, graph=dataclasses.replace(cut.graph, ties="keep"))
    model = ejmp.prune(model, blocks=1)
    model.tasks = [cut]
    crystal.calc = ejmp.Calculator(model)
    with pytest.warns(UserWarning, match=r"cuts a shell of equal distances at 8 of 8 atoms.*ties='keep'"):
        assert np.abs(crystal.get_forces()).max() > 1e-4
    model.tasks = [keep]
    crystal.calc = ejmp.Calculator(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.abs(crystal.get_forces()).max() < 1e-10


def test_what_it_cannot_do(model):
    water = molecule("H2O")
    water.calc = ejmp.Calculator(model, "gradient")
    with pytest.raises(PropertyNotImplementedError, match="not periodic in three directions"):
        water.get_stress()
    other = ejmp.prune(model, blocks=1)
    other.tasks = [Task(name="gap", target="gap", forces=None)]
    with pytest.raises(ValueError, match=r"task gap predicts gap; ejmp.Predictor returns that"):
        ejmp.Calculator(other)


def test_compiled(model, crystal):
    crystal.calc = ejmp.Calculator(model, "gradient", compile=True)
    crystal.calc.model.compile(compiler=None)  # padding alone: torch.compile itself is tested elsewhere
    (expected,) = ejmp.Predictor(model, "gradient")(crystal)
    assert np.allclose(crystal.get_forces(), expected.forces, atol=1e-11)
    assert model.compiled is None
