"""The demo mix: what is shipped, whether its labels are physics, and whether it is made as documented."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

import ejmp
from ejmp.data import DEMO_DOWNSTREAM, DEMO_MIX, demo
from ejmp.data.embedded import DEMO_FOLDER
from ejmp.data.generate import frameworks, labels, molecules, slabs, thermal, write
from ejmp.data.generate.__main__ import generate

NAMES = DEMO_MIX + DEMO_DOWNSTREAM
MOLECULES = ("ani1x", "transition1x", "rmd17", "qm9", "spice", "md22")
ONE_MOLECULE = {"rmd17": (9, 8, 0, 4), "md22": (12, 22, 4, 4)}
"""Number of atoms of C, H, N and O in the molecule of each dynamics."""
METHOD = {"oc20": "EMT", "oc22": "GFN1-xTB", "qmof": "GFN1-xTB"}


def splits(name):
    return ("train", "val") if name in DEMO_MIX else ("train", "val", "test")


def everything(name):
    return [structure for split in splits(name) for structure in demo(name, split)]


def formula(structure):
    return tuple(sorted(Counter(structure.numbers.tolist()).items()))


def raw(name):
    with np.load(DEMO_FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def as_atoms(structure):
    from ase import Atoms

    atoms = Atoms(structure.numbers, structure.positions, cell=structure.cell, pbc=structure.pbc)
    for key in ("tags", "fixed"):
        if getattr(structure, key) is not None:
            atoms.set_array(key, getattr(structure, key).astype(int if key == "tags" else bool))
    return atoms


def test_all_of_it_is_small():
    files = sorted(DEMO_FOLDER.iterdir())
    assert [file.stem for file in files] == sorted(NAMES)
    assert 3e6 < sum(file.stat().st_size for file in files) < 8e6


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_shapes(name):
    train = demo(name, "train")
    total = sum(len(demo(name, split)) for split in splits(name))
    assert (950 if name in DEMO_MIX else 400) <= total <= 4000
    assert len(train) >= 0.65 * total
    for split in splits(name):
        part = demo(name, split)
        assert len(part) >= 0.08 * total
        assert part.info.name == name
        assert part.info.split == split
        assert part.info.count == len(part) == len(part.num_atoms) == len(part.num_edges)
        for i in (0, len(part) // 2, len(part) - 1, -1):
            item = part[i]
            assert item.positions.shape == (part.num_atoms[i], 3)
            assert item.positions.dtype == np.float64
            assert (item.forces is None) == (name == "qm9")
            assert set(item.targets) == ({"gap"} if name in {"qm9", "qmof"} else set())
            assert (item.tags is None) == (item.fixed is None) == (name not in {"oc20", "oc22"})
            assert item.pbc.all() == (name not in MOLECULES)
            assert (item.cell is None) == (name in MOLECULES)


@pytest.mark.parametrize("name", NAMES)
def test_the_reader_returns_what_the_file_holds(name):
    arrays = raw(name)
    found = everything(name)
    assert len(found) == len(arrays["energy"]) == len(set(arrays["id"].tolist()))
    np.testing.assert_array_equal(np.concatenate([item.numbers for item in found]), arrays["numbers"])
    np.testing.assert_array_equal(np.concatenate([item.positions for item in found]), arrays["positions"])
    np.testing.assert_array_equal([item.energy for item in found], arrays["energy"])
    assert [item.id for item in found] == arrays["id"].tolist()
    for key in ("forces", "tags", "fixed"):
        if key in arrays:
            np.testing.assert_array_equal(np.concatenate([getattr(item, key) for item in found]), arrays[key])
    for key in arrays:
        if key.startswith("target:"):
            np.testing.assert_array_equal([item.targets[key[7:]] for item in found], arrays[key])


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(ONE_MOLECULE)))
def test_no_formula_is_in_two_splits(name):
    formulas = {split: {formula(item) for item in demo(name, split)} for split in splits(name)}
    elements = {number for one in formulas["train"] for number, _ in one}
    for split in splits(name)[1:]:
        assert not formulas["train"] & formulas[split]
        assert {number for one in formulas[split] for number, _ in one} <= elements
    if "test" in formulas:
        assert not formulas["val"] & formulas["test"]
    assert len(formulas["train"]) >= 40


@pytest.mark.parametrize("name", ONE_MOLECULE)
def test_dynamics_are_one_molecule_split_by_the_rule(name):
    carbon, hydrogen, nitrogen, oxygen = ONE_MOLECULE[name]
    expected = {6: carbon, 1: hydrogen, 7: nitrogen, 8: oxygen}
    assert {formula(item) for item in everything(name)} == {tuple(sorted((z, n) for z, n in expected.items() if n))}
    order = np.random.RandomState(42).permutation(600)
    times = [20 * i for i in sorted(order[:420].tolist())]
    assert [int(item.id.removesuffix("fs")) for item in demo(name)] == times
    numbers = everything(name)[0].numbers
    assert all((item.numbers == numbers).all() for item in everything(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_structure_becomes_a_graph(name):
    for split in splits(name):
        part = demo(name, split)
        items = list(part)
        for start in range(0, len(items), 200):
            graph = ejmp.build_graph(items[start : start + 200], 12.0, 30)
            assert graph.num_structures == len(items[start : start + 200])
        one = ejmp.build_graph(items[0], 12.0, 30)
        assert one.main.num_edges == part.num_edges[0]


@pytest.mark.parametrize("name", NAMES)
def test_values_are_in_the_range_of_ev_and_angstrom(name):
    found = everything(name)
    nearest = []
    for item in found[::10]:
        distance = np.linalg.norm(item.positions[:, None] - item.positions, axis=-1)
        nearest.append((distance + 9 * np.eye(len(distance))).min())
    assert min(nearest) > 0.35  # molecules at 2000 K
    assert 0.7 < np.median(nearest) < 2.9
    per_atom = [item.energy / len(item.numbers) for item in found]
    assert (max(per_atom) < 3) if name == "oc20" else (-200 < min(per_atom) < max(per_atom) < -10)
    if name != "qm9":
        largest = [np.abs(item.forces).max() for item in found]
        assert max(largest) <= (5 if name == "oc20" else 50)
        assert 0.1 < np.median(largest) < 10


@pytest.mark.parametrize("name", NAMES)
def test_reference_and_statistics_are_those_of_the_training_split(name):
    train = demo(name)
    counts = np.array([np.bincount(item.numbers, minlength=120) for item in train], dtype=float)
    energy = np.array([item.energy for item in train])
    reference = np.linalg.pinv(counts, rcond=1e-10) @ energy
    found = train.info.linear_reference
    assert set(found) == set(np.flatnonzero(counts.sum(axis=0)).tolist())
    np.testing.assert_allclose([found[z] for z in sorted(found)], reference[sorted(found)], rtol=1e-6, atol=1e-6)
    rest = energy - counts @ reference
    statistics = train.info.statistics
    assert statistics["energy"].mean == pytest.approx(rest.mean(), abs=1e-5)
    assert statistics["energy"].std == pytest.approx(rest.std(), rel=1e-5)
    if name != "qm9":
        free = [item.forces[~item.fixed] if item.fixed is not None else item.forces for item in train]
        assert statistics["forces"].mean == 0
        assert statistics["forces"].std == pytest.approx(np.sqrt((np.concatenate(free).astype(float) ** 2).mean()))
    for target in train[0].targets:
        values = [item.targets[target] for item in train]
        assert (statistics[target].mean, statistics[target].std) == pytest.approx((np.mean(values), np.std(values)))
    for split in splits(name)[1:]:
        other = demo(name, split).info
        assert (other.linear_reference, other.statistics) == (found, statistics)
        assert other.licence == "MIT"


def test_metal_labels_are_those_of_emt():
    from ase.calculators.emt import EMT

    for item in [*list(demo("oc20"))[::60], *list(demo("oc20", "val"))[::10]]:
        atoms = as_atoms(item)
        atoms.calc = EMT()
        assert atoms.get_potential_energy() == pytest.approx(item.energy, abs=1e-8)
        np.testing.assert_allclose(item.forces, atoms.get_forces(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["oc20", "ani1x", "transition1x", "rmd17", "md22"])
def test_energy_differences_follow_the_forces(name):
    """dE = -mean force . dr between neighbours in time, temperature or on a path; it is exact if E is quadratic."""
    groups = defaultdict(list)
    for item in everything(name):
        groups[item.id.split("/")[0] if "/" in item.id else "run"].append(item)
    found = []
    for frames in groups.values():
        frames.sort(key=lambda item: float(item.id.removesuffix("fs")) if item.id.endswith("fs") else 0)
        for one, two in pairwise(frames):
            if one.cell is None or np.array_equal(one.cell, two.cell):
                step = two.positions - one.positions
                work = -0.5 * float(((one.forces + two.forces) * step).sum())
                found.append((np.linalg.norm(step, axis=1).max(), two.energy - one.energy, work))
    _, differences, work = np.array(sorted(found)[:100]).T
    assert len(work) == 100
    assert np.corrcoef(differences, work)[0, 1] > 0.95
    assert np.polyfit(work, differences, 1)[0] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"oc20", "qm9"}))
def test_forces_are_gradients_of_the_energy(name):
    """The labels agree with the calculator that made them: its energy, and central differences of it."""
    pytest.importorskip("tblite")
    rng = np.random.default_rng(0)
    items = sorted(demo(name), key=lambda item: len(item.numbers))[: 300 if name != "qmof" else 100]
    for i in rng.choice(len(items), 2, replace=False):
        item, atoms = items[i], as_atoms(items[i])
        method = METHOD.get(name, "GFN2-xTB")
        direction = rng.standard_normal(item.positions.shape)
        direction /= np.linalg.norm(direction)
        assert labels.xtb(atoms, method)[0] == pytest.approx(item.energy, abs=1e-4)
        energy = []
        for step in (-0.002, 0.002):
            moved = atoms.copy()
            moved.positions += step * direction
            energy.append(labels.xtb(moved, method)[0])
        slope = (energy[1] - energy[0]) / 0.004
        assert -(item.forces * direction).sum() == pytest.approx(slope, abs=3e-3, rel=3e-3)


def test_gaps_are_those_of_tblite():
    pytest.importorskip("tblite")
    for item in list(demo("qm9"))[::200]:
        energy, _, gap = labels.xtb(as_atoms(item), "GFN2-xTB")
        assert energy == pytest.approx(item.energy, abs=1e-4)
        assert gap == pytest.approx(item.targets["gap"], abs=1e-3)
    assert all(0 <= item.targets["gap"] < 25 for name in ("qm9", "qmof") for item in everything(name))


@pytest.mark.parametrize("name", ["oc20", "oc22"])
def test_slabs_are_tagged_from_below(name):
    adsorbed = 0
    for item in everything(name):
        z = item.positions[:, 2]
        assert set(item.tags.tolist()) >= {0, 1}
        np.testing.assert_array_equal(item.fixed, item.tags == 0)
        assert z[item.tags == 0].mean() < z[item.tags == 1].mean()
        adsorbed += (item.tags == 2).any()
    assert adsorbed > 0.7 * len(everything(name))


def test_reading_needs_neither_ase_nor_lmdb():
    code = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ase", "lmdb", "tblite", "h5py", "pooch", "rich", "scipy", "mpi4py"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import ejmp
from ejmp.data import DEMO_DOWNSTREAM, DEMO_MIX, demo
print(json.dumps([[name, len(demo(name)), demo(name)[0].energy] for name in DEMO_MIX + DEMO_DOWNSTREAM]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [[name, len(demo(name)), demo(name)[0].energy] for name in NAMES]


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"name: expected one of oc20, .*qmof, got 'oc21'"):
        demo("oc21")
    with pytest.raises(ValueError, match=r"split: oc20 has train, val, got 'test'"):
        demo("oc20", "test")
    with pytest.raises(IndexError, match="rmd17 val: index 60 of 60"):
        demo("rmd17", "val")[60]
    assert demo("rmd17", "val")[-60].id == demo("rmd17", "val")[0].id


def test_what_is_read_cannot_be_changed_for_others():
    with pytest.raises(ValueError, match="read-only"):
        demo("oc20")[0].forces[0] = 0


def test_built_molecules_are_the_ones_named():
    aspirin, peptide = molecules.aspirin(), molecules.peptide()
    for atoms, counts, rings in ((aspirin, {6: 9, 1: 8, 8: 4}, 1), (peptide, {6: 12, 1: 22, 7: 4, 8: 4}, 0)):
        assert Counter(atoms.numbers.tolist()) == counts
        near = molecules.bonds(atoms)
        assert near.sum() // 2 == len(atoms) - 1 + rings
        valence = {1: 1, 6: (3, 4), 7: 3, 8: (1, 2)}
        for z, bonded in zip(atoms.numbers.tolist(), near.sum(axis=1).tolist(), strict=True):
            assert bonded in np.atleast_1d(valence[z])
    near = molecules.bonds(peptide)
    hands = []
    for c in np.flatnonzero(peptide.numbers == 6):
        bonded = np.flatnonzero(near[c])
        if sorted(peptide.numbers[bonded]) == [1, 6, 6, 7]:
            carbonyl = next(i for i in bonded if 8 in peptide.numbers[near[i]])
            methyl = next(i for i in bonded if peptide.numbers[i] == 6 and i != carbonyl)
            nitrogen = next(i for i in bonded if peptide.numbers[i] == 7)
            arms = peptide.positions[[nitrogen, carbonyl, methyl]] - peptide.positions[c]
            hands.append(np.sign(np.linalg.det(arms)))
    assert len(hands) == 3
    assert len(set(hands)) == 1


def test_random_molecules_differ_and_do_not_clash():
    rng = np.random.default_rng(0)
    made = [molecules.random_molecule(rng) for _ in range(100)]
    assert len({atoms.get_chemical_formula() for atoms in made}) > 40
    assert all(set(atoms.numbers.tolist()) <= {1, 6, 7, 8} for atoms in made)
    assert all(sum(atoms.numbers) % 2 == 0 for atoms in made)
    ethanol, ether = molecules.join(*_hydrogens("C2H6", "H2O")), molecules.join(*_hydrogens("CH3OH", "CH4", 8))
    assert molecules.fingerprint(ethanol) != molecules.fingerprint(ether)
    assert molecules.fingerprint(ethanol) == molecules.fingerprint(ethanol[::-1])


def _hydrogens(core, group, on=6):
    from ase.build import molecule

    first, second = molecule(core), molecule(group)
    h = molecules.hydrogens(first, on)[0]
    return first, h, second, int(np.flatnonzero(second.numbers == 1)[0])


def test_thermal_displacements_grow_with_temperature_and_leave_the_fixed():
    atoms = molecules.aspirin()
    moved = {}
    for temperature in (100, 400):
        copies = [thermal.thermal(atoms, temperature, np.random.default_rng(seed)) for seed in range(20)]
        moved[temperature] = np.mean([(copy.positions - atoms.positions) ** 2 for copy in copies])
    assert moved[400] == pytest.approx(4 * moved[100])
    slab = slabs.metal_slab(np.random.default_rng(0))
    shift = thermal.thermal(slab, 500, np.random.default_rng(0), 3.0).positions - slab.positions
    assert not shift[slab.arrays["fixed"]].any()
    assert shift[~slab.arrays["fixed"]].any(axis=1).all()


@pytest.mark.parametrize("make", [slabs.metal_slab, slabs.oxide_slab, frameworks.random_framework])
def test_periodic_builders_repeat_themselves(make):
    first, again = (make(np.random.default_rng(5)) for _ in range(2))
    assert first == again
    assert first.pbc.all()
    assert first.cell.volume > 20


def test_frameworks_close_across_the_cell():
    """Silicon and carbon have four neighbours in the diamond net, rings are complete, and no bond is left open."""
    rng = np.random.default_rng(0)
    solid = frameworks.framework(frameworks.DIAMOND, ["Si", "C"], [frameworks.linker("C2")] * 4, rng)
    assert molecules.bonds(solid).sum(axis=1).tolist() == [4, 4] + [2] * 8
    ringed = frameworks.framework(frameworks.DIAMOND, ["Si", "Si"], [frameworks.linker("benzene")] * 4, rng)
    assert sorted(Counter(molecules.bonds(ringed).sum(axis=1).tolist()).items()) == [(1, 16), (3, 24), (4, 2)]
    clathrate = frameworks.hofmann("Fe", "Ni", "", rng)
    assert Counter(clathrate.symbols) == {"C": 8, "N": 6, "H": 4, "Fe": 1, "Ni": 1}


def test_splits_keep_elements_in_train_and_take_their_share():
    made = [
        ejmp.Structure(numbers=np.array([6] * (i % 20 + 1) + [1]), positions=np.zeros((i % 20 + 2, 3)))
        for i in range(200)
    ]
    made.append(ejmp.Structure(numbers=np.array([79, 6]), positions=np.zeros((2, 3))))
    for seed in range(5):
        found = write.split_by_formula(made, {"val": 0.1, "test": 0.1}, np.random.default_rng(seed))
        assert sorted(i for part in found.values() for i in part) == list(range(201))
        assert 200 in found["train"]
        assert 20 <= len(found["val"]) <= 30
        assert 20 <= len(found["test"]) <= 30


def test_a_set_is_made_again_from_its_seed(tmp_path):
    """A small run of the generator begins with the shipped structures, up to rounding."""
    line = generate(tmp_path, "oc20", scale=0.01, seed=0)
    assert line.startswith("oc20: train ")
    with np.load(tmp_path / "oc20.npz", allow_pickle=False) as file:
        made = dict(zip(file["id"].tolist(), file["energy"].tolist(), strict=True))
    shipped = {item.id: item.energy for item in everything("oc20")}
    assert len(made) == 30
    for name, energy in made.items():
        assert shipped[name] == pytest.approx(energy, abs=1e-3)


def test_the_generator_names_what_it_does_not_know():
    code = [sys.executable, "-m", "ejmp.data.generate", "out", "oc21"]
    run = subprocess.run(code, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "unknown: oc21" in run.stderr or "pip install ejmp[demo]" in run.stderr
