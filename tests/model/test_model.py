"""What must hold for any weights: invariances, derivatives, hard structures, precisions, clear errors."""

import dataclasses

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.collections import g2
from scipy.spatial.transform import Rotation
from support.inputs import load_golden, shared_file
from support.tolerances import assert_close, relative_error, tolerance

import ejmp

DOUBLE = {"dtype": torch.float64}


def outputs(model, structures, cutoff=8.0, max_neighbors=30):
    graph = ejmp.build_graph(structures, cutoff, max_neighbors, **DOUBLE)
    out = model(graph)
    return out.energy.detach(), out.forces.detach(), ejmp.gradient_forces(model, graph)


def rotated(atoms, matrix):
    new = atoms.copy()
    new.set_cell(atoms.cell.array @ matrix.T)
    new.positions = atoms.positions @ matrix.T
    return new


@pytest.fixture(params=["molecule", "crystal"])
def atoms(request):
    if request.param == "molecule":
        return molecule("CH3CH2OH")
    crystal = bulk("NaCl", "rocksalt", a=5.6).repeat((2, 1, 1))
    crystal.rattle(0.1, seed=0)
    return crystal


# Crystals use a cutoff and a neighbour number with which nothing is cut, so that permutation is exact.
UNCUT = {"cutoff": 5.0, "max_neighbors": 200}


def test_rotation(tiny, atoms):
    matrix = Rotation.random(rng=3).as_matrix()
    energy, direct, gradient = outputs(tiny, atoms, **UNCUT)
    turned = outputs(tiny, rotated(atoms, matrix), **UNCUT)
    turn = torch.as_tensor(matrix.T)
    assert_close(turned[0], energy)
    assert_close(turned[1], direct @ turn, order=1)
    assert_close(turned[2], gradient @ turn, order=1)


def test_translation_and_wrapping(tiny, atoms):
    expected = outputs(tiny, atoms, **UNCUT)
    moved = atoms.copy()
    moved.positions += [0.7, -11.3, 25.1]
    moved.positions[0] += atoms.cell.array[0] * 2 if atoms.pbc.any() else 0
    for value, reference in zip(outputs(tiny, moved, **UNCUT), expected, strict=True):
        assert_close(value, reference, order=1)


def test_permutation(tiny, atoms):
    order = np.random.default_rng(0).permutation(len(atoms))
    energy, direct, gradient = outputs(tiny, atoms, **UNCUT)
    shuffled = outputs(tiny, atoms[order], **UNCUT)
    assert_close(shuffled[0], energy)
    assert_close(shuffled[1], direct[order], order=1)
    assert_close(shuffled[2], gradient[order], order=1)


def test_batch_is_its_parts(tiny):
    batch, parts = load_golden("batch"), []
    together = outputs(tiny, batch.structures, batch.values["cutoff"].tolist())
    for structure, cutoff in zip(batch.structures, batch.values["cutoff"].tolist(), strict=True):
        parts.append(outputs(tiny, structure, cutoff))
    for value, separate in zip(together, zip(*parts, strict=True), strict=True):
        assert_close(value, torch.cat(separate), order=1)


def test_gradient_forces_are_the_gradient(tiny, atoms):
    graph = ejmp.build_graph(atoms, UNCUT["cutoff"], UNCUT["max_neighbors"], **DOUBLE)
    forces = ejmp.gradient_forces(tiny, graph, task=2)
    step = 1e-5
    for atom, axis in ((0, 0), (1, 2), (len(atoms) - 1, 1)):
        ends = []
        for sign in (1, -1):
            positions = graph.positions.clone()
            positions[atom, axis] += sign * step
            ends.append(tiny(graph.with_positions(positions)).energy[0, 2].item())
        assert abs(-(ends[0] - ends[1]) / (2 * step) - forces[atom, axis].item()) <= 1e-7 * forces.abs().max().item()
    assert_close(forces.sum(0), torch.zeros(3).double(), order=1)


def test_gradient_forces_differentiate_again(tiny):
    graph = ejmp.build_graph(molecule("H2O"), 8.0, **DOUBLE)

    def forces(positions):
        return ejmp.gradient_forces(tiny, graph.with_positions(positions), create_graph=True)

    assert torch.autograd.gradcheck(forces, (graph.positions.clone().requires_grad_(),), fast_mode=True)


def test_gradient_reaches_the_callers_positions(tiny):
    positions = torch.tensor(molecule("H2O").positions, requires_grad=True)
    water = ejmp.Structure(numbers=[8, 1, 1], positions=positions)
    graph = ejmp.build_graph(water, 8.0, **DOUBLE)
    (gradient,) = torch.autograd.grad(tiny(graph).energy[:, 0].sum(), positions)
    assert_close(-gradient, ejmp.gradient_forces(tiny, graph), order=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["CO2", "CH3CN", "C2H2", "HCN", "LiH"])
def test_exactly_linear_molecules(tiny, tiny_config, tiny_weights, name, dtype):
    """Rotated at random, so that rounding makes angles a little more or less than straight."""
    model = tiny
    if dtype == torch.float32:
        model = ejmp.JMP(tiny_config)
        model.load_state_dict(tiny_weights)
    straight = g2[name].copy()
    if name != "CH3CN":
        straight.positions[:, :2] = 0.0
    energies = []
    for seed in range(6):
        atoms = rotated(straight, Rotation.random(rng=seed).as_matrix()) if seed else straight
        graph = ejmp.build_graph(atoms, 8.0, dtype=dtype)
        out = model(graph)
        forces = ejmp.gradient_forces(model, graph, create_graph=True)
        (second,) = torch.autograd.grad((forces**2).sum(), model.embedding.atom_embedding.weight)
        for value in (out.energy, out.forces, forces, second):
            assert torch.isfinite(value).all()
        assert forces.abs().max() < 50, "an angle on the verge of straight must not blow the forces up"
        energies.append(out.energy.detach())
    allowed = tolerance("model of turned straight molecules", dtype)
    assert relative_error(torch.stack(energies), energies[0].expand(6, 1, 4)) < allowed


def test_isolated_atoms_have_their_elements_energy(tiny):
    far = Atoms("HeNeHe", [[0, 0, 0], [50, 0, 0], [100, 0, 0]])
    together, direct, gradient = outputs(tiny, far)
    helium, neon = (outputs(tiny, Atoms(symbol, [[1, 2, 3]]))[0] for symbol in ("He", "Ne"))
    assert_close(together, 2 * helium + neon)
    assert not direct.any()
    assert not gradient.any()
    mixed = outputs(tiny, [Atoms("He"), molecule("H2O")])[0]
    assert_close(mixed[0:1], helium)


def test_no_quadruplets(tiny):
    """Bulk atoms only (tag 0): there is no middle edge, and the model still runs."""
    atoms = bulk("Cu", cubic=True)
    atoms.set_tags(np.zeros(len(atoms), int))
    graph = ejmp.build_graph(atoms, 6.0, **DOUBLE)
    assert graph.quad_edges.num_edges == 0
    assert torch.isfinite(tiny(graph).energy).all()


def test_energy_reduction_mean(tiny_config, tiny_weights):
    mean = ejmp.JMP(dataclasses.replace(tiny_config, energy_reduction="mean"))
    total = ejmp.JMP(tiny_config)
    for model in (mean, total):
        model.load_state_dict(tiny_weights)
    graph = ejmp.build_graph([molecule("H2O"), molecule("CH4")], 8.0)
    sizes = torch.tensor([[3.0], [5.0]])
    assert_close(mean(graph).energy * sizes, total(graph).energy, torch.float32)


def test_scalar_model_has_no_force_branch(tiny_config):
    model = ejmp.JMP(dataclasses.replace(tiny_config, direct_forces=False, num_tasks=1))
    out = model(ejmp.build_graph(molecule("H2O"), 8.0))
    assert out.forces is None
    assert out.energy.shape == (1, 1)
    assert not any("force" in name or "_F" in name for name in model.state_dict())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision(tiny_config, tiny_weights, precision):
    graph = load_golden("ethanol").graph(torch.float32)
    model = ejmp.JMP(tiny_config, precision=precision)
    model.load_state_dict(tiny_weights)
    assert model.features(graph).mlp_E[0].dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    out = model(graph)
    assert out.energy.dtype == torch.float32
    error = relative_error(out.energy.detach(), load_golden("ethanol").values["energy"])
    assert 1e-6 < error < 2e-2


def test_model_refuses(tiny, tiny_config):
    water = molecule("H2O")
    with pytest.raises(ValueError, match=r"float64.*float32"):
        tiny(ejmp.build_graph(water, 8.0))
    with pytest.raises(ValueError, match="backend"):
        ejmp.JMP(tiny_config, backend="magic")
    with pytest.raises(ValueError, match="precision"):
        ejmp.JMP(tiny_config, precision="fp4")
    with pytest.raises(ValueError, match="CUDA"):
        ejmp.JMP(tiny_config, precision="tf32")(ejmp.build_graph(water, 8.0))
    for precision in ("bf16", "fp16", "tf32"):
        with pytest.raises(ValueError, match="needs float32 parameters"):
            ejmp.JMP(tiny_config, precision=precision).double()(ejmp.build_graph(water, 8.0, **DOUBLE))
    with pytest.raises(ValueError, match=r"task: expected 0\.\.3, got 4"):
        ejmp.gradient_forces(tiny, ejmp.build_graph(water, 8.0, **DOUBLE), task=4)


def test_initialisation_keeps_variance():
    """Standardised semi-orthogonal weights: rows of mean 0 and variance 1 / fan_in."""
    torch.manual_seed(0)
    model = ejmp.JMP(ejmp.jmp_s(blocks=1, scalar=True))
    weight = model.backbone.int_blocks[0].dense_ca.linear.weight
    assert weight.mean(1).abs().max() < 1e-7
    assert (weight.var(1) * 512).detach().numpy() == pytest.approx(1, rel=2e-3)
    basis = model.backbone.bases.mlp_sbf_qint.weight
    assert (basis.var(dim=(0, 1)) * 128 * 49).detach().numpy() == pytest.approx(1, rel=2e-2)


def test_energy_jumps_where_the_neighbours_change_and_nowhere_else(tiny):
    """Bisect the first change of an edge set along a path; the energy jumps there, and only there."""
    structure = load_golden("triclinic").structures[0]

    def at(x):
        positions = structure.positions.copy()
        positions[3] += x * np.array([0.6, 0.64, 0.48])
        return ejmp.build_graph(dataclasses.replace(structure, positions=positions), 12.0, 30, **DOUBLE)

    def edges(graph):
        sets = (graph.main, graph.atom_edges, graph.quad_edges)
        return [set(zip(e.source.tolist(), e.target.tolist(), e.image.tolist(), strict=True)) for e in sets]

    low, high, start = 0.0, 0.5, edges(at(0.0))
    assert edges(at(high)) != start
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if edges(at(middle)) == start else (low, middle)
    left = [tiny(at(low - x)).energy[0, 0].item() for x in (2e-6, 1e-6, 0)]
    right = [tiny(at(high + x)).energy[0, 0].item() for x in (0, 1e-6, 2e-6)]
    slope = max(abs(left[2] - left[0]), abs(right[2] - right[0])) / 2e-6
    assert abs(right[0] - left[2]) > 1e3 * slope * (high - low)
    for side in (left, right):
        assert abs(side[0] - 2 * side[1] + side[2]) < 1e-3 * abs(side[2] - side[0]) + 1e-12


def test_real_molecules_run(tiny):
    import ase.io

    frames = ase.io.read(shared_file("data/qm9/qm9_rows001_400_U0_eV.extxyz"), ":12")
    energy = tiny(ejmp.build_graph(frames, 8.0, **DOUBLE)).energy
    assert energy.shape == (12, 4)
    assert torch.isfinite(energy).all()
