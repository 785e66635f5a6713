"""The split rules agree with the same rules written out, and statistics with direct computation."""

import numpy as np
import pytest

from ejmp.catalog import CATALOG
from ejmp.data import Part, Structure
from ejmp.data.store.splits import choose, choose_all, choose_groups
from ejmp.data.store.stats import Tally


def in_slices(total, size=1000, name="file"):
    starts = range(0, total, size)
    return [Part(name=f"{name}:{start}-{start + size}", count=min(size, total - start)) for start in starts]


def numbers(chosen, parts):
    """Return the numbers in the source of the chosen structures."""
    first = dict(
        zip((part.name for part in parts), np.cumsum([0, *(part.count for part in parts)]).tolist(), strict=False)
    )
    return [first[piece.part.name] + int(index) for piece in chosen for index in piece.indices]


def shuffled(total):
    order = np.arange(total)
    np.random.RandomState(42).shuffle(order)
    return order


@pytest.mark.parametrize(
    ("kind", "name", "total", "train", "val"),
    [
        ("rmd17", "rmd17_aspirin.npz", 100_000, 950, 50),
        ("md22", "md22_Ac-Ala3-NHMe.npz", 85_109, 5_700, 300),
        ("md22", "md22_DHA.npz", 69_753, 7_600, 400),
        ("md22", "md22_stachyose.npz", 27_272, 7_600, 400),
        ("md22", "md22_AT-AT.npz", 20_001, 2_850, 150),
        ("md22", "md22_AT-AT-CG-CG.npz", 10_153, 1_900, 100),
        ("md22", "md22_buckyball-catcher.npz", 6_102, 570, 30),
        ("md22", "md22_double-walled_nanotube.npz", 5_032, 760, 40),
        ("qm9", "qm9_v3.pt", 130_831, 110_831, 10_000),
        ("spice", "dipeptides.h5", 26_279, 21_023, 2_629),
        ("qmof", "qmof_database", 20_375, 16_300, 2_038),
    ],
)
def test_random_splits(kind, name, total, train, val):
    parts = in_slices(total, name=name)
    chosen = choose(kind, parts, "a folder")
    order = shuffled(total)
    expected = {"train": order[:train], "val": order[train : train + val], "test": order[train + val :]}
    assert list(chosen) == ["train", "val", "test"]
    for split, want in expected.items():
        assert numbers(chosen[split], parts) == sorted(want.tolist())


def test_a_folder_of_molecules_is_divided_file_by_file():
    files = [in_slices(total, name=f"rmd17_{total}.npz") for total in (1500, 2500)]
    chosen = choose("rmd17", files[0] + files[1], "a folder")
    both = files[0] + files[1]
    expected = [*shuffled(1500)[950:1000], *(shuffled(2500)[950:1000] + 1500)]
    assert numbers(chosen["val"], both) == sorted(expected[:50]) + sorted(expected[50:])
    assert {split: len(numbers(pieces, both)) for split, pieces in chosen.items()} == {
        "train": 1900,
        "val": 100,
        "test": 2000,
    }


def test_the_division_into_parts_does_not_matter():
    for parts in (in_slices(1234, 1234), in_slices(1234, 7), [*in_slices(1234, 100), Part(name="none", count=0)]):
        assert numbers(choose("spice", parts, "x")["val"], parts) == sorted(shuffled(1234)[987:1111].tolist())


def frames_by_formula(chosen):
    found = {}
    for piece in chosen:
        formula = piece.part.name.split(":")[0]
        found[formula] = found.get(formula, 0) + len(piece.indices)
    return found


def test_ani1x_goes_by_formula():
    """No formula is in two splits, at the full size of ANI-1x: 3,114 formulas, 4,956,005 frames."""
    random = np.random.default_rng(0)
    counts = np.diff(np.sort(random.choice(np.arange(1, 4_956_005), 3_113, replace=False)), prepend=0, append=4_956_005)
    parts = [
        Part(name=f"C{k}H{k}:{start}-{start + 1000}", count=min(1000, count - start))
        for k, count in enumerate(counts.tolist())
        for start in range(0, count, 1000)
    ]
    chosen = choose("ani1x", parts, "ani1x.h5")
    found = {split: frames_by_formula(pieces) for split, pieces in chosen.items()}
    assert not set(found["train"]) & set(found["val"])
    assert not set(found["train"]) & set(found["test"])
    assert not set(found["val"]) & set(found["test"])
    for frames in found.values():
        assert all(counts[int(formula.split("H")[1])] == count for formula, count in frames.items())
    assert sum(map(len, found.values())) == 3_114
    names = np.array([f"C{k}H{k}" for k in range(3_114)])
    np.random.RandomState(42).shuffle(names)
    rest = names.tolist()
    for split in ("val", "test"):
        taken = 0
        for formula in rest[: len(found[split])]:
            assert taken < 495_600
            assert formula in found[split]
            taken += found[split][formula]
        assert taken >= 495_600
        rest = rest[len(found[split]) :]


def test_a_small_ani1x_keeps_a_training_split():
    parts = [Part(name=f"C{k}", count=10) for k in range(30)]
    chosen = choose("ani1x", parts, "small.h5")
    assert {split: len(pieces) for split, pieces in chosen.items()} == {"train": 24, "val": 3, "test": 3}


def test_given_splits():
    parts = [Part(name=name, count=3, split=split) for name, split in (("a", "val"), ("b", "train"), ("c", "val"))]
    chosen = choose("transition1x", parts, "x")
    assert {split: [piece.part.name for piece in pieces] for split, pieces in chosen.items()} == {
        "val": ["a", "c"],
        "train": ["b"],
    }
    assert numbers(choose_all(parts, "test")["test"], parts) == list(range(9))


@pytest.mark.parametrize(
    ("kind", "name", "total", "message"),
    [
        ("oc20", "file.npz", 10, "does not say what split file.npz:0-1000 belongs to; say --split"),
        ("rmd17", "x.npz", 999, "needs 1000 structures, got 999"),
        ("qm9", "x", 20_000, "needs 20001 structures, got 20000"),
        ("md22", "md22_water.npz", 10_000, "expected md22_MOLECULE.npz, MOLECULE one of Ac-Ala3-NHMe"),
        ("md22", "md22_DHA.npz", 7_999, "needs 8000 structures"),
        ("spice", "x", 0, "expected structures, got none"),
    ],
)
def test_rules_that_cannot_be_followed(kind, name, total, message):
    with pytest.raises(ValueError, match=message):
        choose(kind, in_slices(total, name=name), name)


def test_md22_sizes_are_the_specification(shared):
    specification = shared("spec/data.md").read_text()
    for molecule, size in CATALOG["md22"].split.sizes.items():
        assert f"{molecule} {size}" in specification


def molecule(counts, energy):
    numbers = np.repeat(list(counts), list(counts.values()))
    return Structure(numbers=numbers, positions=np.zeros((len(numbers), 3)), energy=energy)


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("kind", ["many", "one molecule", "two that vary together"])
def test_linear_reference_is_least_squares_of_smallest_norm(kind, pieces):
    random = np.random.default_rng(0)
    structures = []
    for _ in range(6000 if pieces == 1 else 300):
        c, h, o = random.integers(0, 30, 3).tolist()
        counts = {"many": {1: h, 6: c + 1, 8: o}, "one molecule": {1: 6, 6: 2, 8: 1}}.get(
            kind, {1: c + 1, 6: c + 1, 8: h}
        )
        energy = -13.6 * counts[1] - 1030.0 * counts[6] - 2040.0 * counts[8] + random.normal()
        structures.append(molecule(counts, energy))
    tally = Tally()
    for k in range(pieces):
        part = Tally()
        for structure in structures[k::pieces]:
            part.add(structure)
        tally.merge(Tally.from_arrays(part.to_arrays()))
    rows = np.array([[np.sum(s.numbers == z) for z in (1, 6, 8)] for s in structures], float)
    energies = np.array([s.energy for s in structures])
    expected = np.linalg.pinv(rows, rcond=1e-10) @ energies
    np.testing.assert_allclose([tally.linear_reference()[z] for z in (1, 6, 8)], expected, rtol=1e-8)
    rest = energies - rows @ expected
    assert tally.statistics()["energy"].mean == pytest.approx(rest.mean(), abs=1e-7)
    assert tally.statistics()["energy"].std == pytest.approx(rest.std(), rel=1e-7)


def test_nothing_seen_gives_no_statistics():
    assert Tally().statistics() == Tally().linear_reference() == {}


def test_own_frames_of_one_composition_are_held_out_in_blocks():
    """Neighbours in time are in one split, up to the ends of twenty blocks."""
    parts = in_slices(200, size=70)
    chosen = choose_groups(["CH4"] * 200, parts, "frames.xyz")
    found = {split: numbers(pieces, parts) for split, pieces in chosen.items()}
    assert sorted(n for split in found.values() for n in split) == list(range(200))
    assert {split: len(n) for split, n in found.items()} == {"train": 160, "val": 20, "test": 20}
    assert {len({n // 10 for n in found[split]}) for split in ("val", "test")} == {2}


def test_own_frames_of_many_compositions_are_held_out_by_composition():
    formulas = [f"C{n % 30}" for n in range(300)]
    parts = in_slices(300, size=300)
    chosen = choose_groups(formulas, parts, "frames.xyz")
    found = {split: {formulas[n] for n in numbers(pieces, parts)} for split, pieces in chosen.items()}
    assert {split: len(names) for split, names in found.items()} == {"train": 24, "val": 3, "test": 3}
    assert not found["train"] & found["val"]
    assert not found["val"] & found["test"]


def test_too_few_own_frames():
    with pytest.raises(ValueError, match=r"frames.xyz: its split rule needs 10 structures, got 9"):
        choose_groups(["H2"] * 9, in_slices(9), "frames.xyz")
