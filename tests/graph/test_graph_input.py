"""Bad input to the graph raises a ValueError that names the structure and the field."""

import dataclasses

import numpy as np
import pytest
import torch
from ase.build import molecule
from support.edges import differences, edges_of

from ejmp import Structure, build_graph, graph_from_edges
from ejmp_kernels import availability

GOOD = Structure(numbers=[1, 8], positions=[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], cell=4.0 * np.eye(3), pbc=True)
FLAT, THIN = ([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [4.0, 4.0, height]] for height in (0.0, 0.05))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("positions", [[0.0] * 3, end]) for end in ([np.nan] * 3, [np.inf] * 3, [0.0] * 3, [4.0, 0.0, -4.0], [1.0])),
        *(("positions", value) for value in (np.eye(2), np.eye(3), [["a"] * 3, ["b"] * 3])),
        *(("cell", value) for value in (FLAT, THIN, np.full((3, 3), np.nan), None, np.eye(2))),
        *(("numbers", value) for value in ([1, 0], [121, 1], np.zeros(0, int), [[1, 8]], [1.0, 8.0])),
        *(("tags", value) for value in ([1], [1.0, 2.0], [2, 3], [-1, 0], [1j, 2])),
        *(("pbc", value) for value in ([True, True], 1j, 0.5)),
        *(("positions", [[0.0] * 3, [far, 0, 0]]) for far in (1e14, 1e10, 6e5)),
        ("numbers", [1j, 2]),
    ],
)
def test_impossible_structures_are_named(field, value, backend):
    bad = dataclasses.replace(GOOD, **{field: value})
    for structures, b in ((bad, 0), ([GOOD, bad], 1)):
        with pytest.raises(ValueError, match=f"^structure {b}: {field}: "):
            build_graph(structures, 3.0, backend=backend)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("cutoff", value)
            for value in (0, -1.0, np.nan, np.inf, [3.0], [3.0, -3.0], [], "8", None, 1e13, [3.0, np.nan])
        ),
        *(
            ("max_neighbors", value)
            for value in (0, -1, 2.5, True, [3], [3, 0], [3, 3, 3], [3, 2.5], [True, 3], 2**63 - 1)
        ),
        *(("structures", value) for value in ([], 5, [GOOD, object()])),
        ("backend", "fast"),
        ("dtype", torch.float16),
    ],
)
def test_wrong_options_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected|^structure 1: object has no numbers or positions$"):
        build_graph(**{"structures": [GOOD, GOOD], name: value})


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(availability, "why_unavailable", lambda: "taken away by a test")
    with pytest.raises(RuntimeError, match="taken away by a test"):
        build_graph(GOOD, backend="native")
    with pytest.warns(RuntimeWarning, match="taken away by a test"):
        graph = build_graph(GOOD)
    assert differences(graph, build_graph(GOOD, backend="reference")) == []


@pytest.mark.parametrize("value", [np.float32(8), np.int64(8), torch.tensor(8.0), np.array([8, 8]), (8, 8.0)])
def test_numbers_of_every_library_are_options(value):
    expected = build_graph([GOOD, GOOD], 8.0, 8)
    assert differences(build_graph([GOOD, GOOD], value, 8), expected) == []
    assert differences(build_graph([GOOD, GOOD], 8.0, value), expected) == []


def test_memory_layout_does_not_matter():
    atoms = molecule("CH3CH2OH")
    expected = build_graph(atoms, 8.0)
    positions, numbers = atoms.positions, atoms.numbers
    frozen = positions.copy()
    frozen.setflags(write=False)
    layouts = [np.asfortranarray(positions), frozen, positions.astype(">f8"), torch.tensor(positions).T.contiguous().T]
    for layout in layouts:
        assert differences(build_graph(Structure(numbers=numbers.astype(">i4"), positions=layout), 8.0), expected) == []
    backwards = build_graph(Structure(numbers=numbers[::-1], positions=positions[::-1]), 8.0)
    assert backwards.main.num_edges == expected.main.num_edges


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint64, np.int8, np.int32])
def test_integers_of_every_width_are_numbers(dtype):
    graph = build_graph(dataclasses.replace(GOOD, numbers=np.array([1, 8], dtype)), 3.0)
    assert graph.atomic_numbers.tolist() == [1, 8]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("quad_edges", lambda i, o: (torch.cat([i, i[:1]]), o), "edge_index: expected"),
        ("atom_edges", lambda i, o: (i, o[:, :2]), "offset: expected"),
        ("main", lambda i, o: (i, o[1:]), "offset: expected"),
        ("atom_pairs", lambda i, o: (i.float(), o), "edge_index: expected integers"),
        ("quad_edges", lambda i, o: (i + 1, o), r"atoms must be in 0\.\.5"),
        ("quad_edges", lambda i, o: (i - 1, o), r"atoms must be in 0\.\.5"),
        ("atom_pairs", lambda i, o: ((i + torch.tensor([[3], [0]])) % 6, o), "joins two structures"),
        ("main", lambda i, o: (i[:, 1:], o[1:]), "counter-edge"),
        ("main", lambda i, o: (torch.cat([i, i], 1), torch.cat([o, o])), "there twice"),
        ("quad_edges", lambda i, o: (torch.cat([i, i], 1), torch.cat([o, o])), "there twice"),
        ("atom_edges", lambda i, o: (i[:, :1] * 0 + 1, o[:1]), "structure 0: positions: atoms 1 and 1 are on one spot"),
        ("atom_pairs", lambda i, o: (i, o + torch.tensor([1, 0, 0])), "not zero in a direction that is not periodic"),
        ("atom_pairs", lambda i, o: (i, o.long() + 2**32), "offset: an image more than"),
        ("atom_pairs", lambda i, o: (i > 0, o), "edge_index: expected integers"),
        ("atom_pairs", lambda i, o: (torch.tensor(3), o), "edge_index: expected integers"),
        ("atom_pairs", lambda i, o: (i, "nothing"), "offset: expected an array"),
    ],
)
def test_wrong_edges_are_refused(name, change, message):
    waters = [molecule("H2O"), molecule("H2O")]
    edges = edges_of(build_graph(waters))
    with pytest.raises(ValueError, match=rf"^edges\[.{name}.\]: .*{message}|^{message}"):
        graph_from_edges(waters, edges | {name: change(*edges[name])})
