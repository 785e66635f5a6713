"""Porous frameworks of ideal geometry: nodes of a net joined by straight linkers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ejmp.data.generate.molecules import bonds, join, rotation, turn

TETRAHEDRAL = ("C", "Si", "Ge", "Sn")
TRIGONAL = ("B", "N")
OCTAHEDRAL = ("Fe", "Co", "Mn", "Cr", "Ti", "Zr", "Al", "Ga", "Sc", "In")
DIVALENT = ("Zn", "Cd", "Be", "Mg")
SQUARE = ("Ni", "Pd", "Pt")
AXIAL = ("Fe", "Co", "Ni", "Cu", "Zn", "Mg", "Mn")
ON_RING = ("", "F", "Cl", "OH", "NH2", "CH3", "CN")


@dataclass(frozen=True, kw_only=True)
class Net:
    """A periodic net whose edges all have the same length."""

    cell: np.ndarray[Any, Any]
    """Lattice vectors, [3, 3], in units of the length of an edge; a row of zeros stands for the stacking of layers."""
    nodes: np.ndarray[Any, Any]
    """Fractional coordinates of the nodes, [n, 3]."""
    edges: Sequence[tuple[int, int, tuple[int, int, int]]]
    """For each edge its first node, its second node, and the cell that the second one is in."""


DIAMOND = Net(
    cell=np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) * (2 / np.sqrt(3)),
    nodes=np.array([[0, 0, 0], [0.25, 0.25, 0.25]]),
    edges=((0, 1, (0, 0, 0)), (0, 1, (-1, 0, 0)), (0, 1, (0, -1, 0)), (0, 1, (0, 0, -1))),
)
CUBIC = Net(cell=np.eye(3), nodes=np.zeros((1, 3)), edges=((0, 0, (1, 0, 0)), (0, 0, (0, 1, 0)), (0, 0, (0, 0, 1))))
HONEYCOMB = Net(
    cell=np.array([[np.sqrt(3), 0, 0], [np.sqrt(3) / 2, 1.5, 0], [0, 0, 0]]),
    nodes=np.array([[0, 0, 0], [1 / 3, 1 / 3, 0]]),
    edges=((0, 1, (0, 0, 0)), (0, 1, (-1, 0, 0)), (0, 1, (0, -1, 0))),
)


def linker(kind: str, group: str = "") -> Any:
    """Return a straight linker on the x axis, its first atom at the origin; `info["end"]` is its other end.

    Args:
        kind: "C2", "C4" (alkynes), "CN" (cyanide), "benzene" or "pyrazine" (joined at opposite atoms).
        group: the group that replaces one hydrogen of a ring: "", "F", "Cl", "OH", "NH2", "CH3" or "CN".
    """
    from ase import Atoms  # noqa: PLC0415
    from ase.build import molecule  # noqa: PLC0415

    rods = {"C2": ("CC", (0, 1.21)), "C4": ("CCCC", (0, 1.22, 2.59, 3.81)), "CN": ("CN", (0, 1.16))}
    if kind in rods:
        symbols, along = rods[kind]
        return Atoms(symbols, [(x, 0, 0) for x in along], info={"end": len(symbols) - 1})
    ring = molecule("C6H6")
    center = ring.positions.mean(axis=0)
    carbons = np.flatnonzero(ring.numbers == 6)
    first = int(carbons[0])
    last = int(carbons[np.argmax(np.linalg.norm(ring.positions[carbons] - ring.positions[first], axis=1))])
    if group:
        meta = next(c for c in np.flatnonzero(bonds(ring)[first]).tolist() if ring.numbers[c] == 6)
        h = next(h for h in np.flatnonzero(bonds(ring)[meta]).tolist() if ring.numbers[h] == 1)
        ring = _substitute(ring, h, group)
    ends = ring.positions[[first, last]]
    drop = [int(np.argmin(np.where(ring.numbers == 1, np.linalg.norm(ring.positions - x, axis=1), 9))) for x in ends]
    if kind == "pyrazine":
        ring.numbers[[first, last]] = 7
    order = [first, *(i for i in range(len(ring)) if i not in {first, last, *drop}), last]
    normal = np.cross(ends[0] - center, ring.positions[int(carbons[1])] - center)
    x = (ends[1] - ends[0]) / np.linalg.norm(ends[1] - ends[0])
    z = normal / np.linalg.norm(normal)
    piece = ring[order]
    piece.positions = (piece.positions - ends[0]) @ np.array([x, np.cross(z, x), z]).T
    piece.info = {"end": len(piece) - 1}
    return piece


def _substitute(ring: Any, h: int, group: str) -> Any:
    """Replace a hydrogen of a ring by a group; a group of one atom takes the hydrogen's place in the order."""
    from ase.build import molecule  # noqa: PLC0415

    if group in {"F", "Cl"}:
        carbon = ring.positions[int(np.argsort(np.linalg.norm(ring.positions - ring.positions[h], axis=1))[1])]
        ring[h].symbol = group
        ring.positions[h] = carbon + (ring.positions[h] - carbon) * {"F": 1.24, "Cl": 1.60}[group]
        return ring
    name, attached = {"OH": ("H2O", 1), "NH2": ("NH3", 1), "CH3": ("CH4", 1), "CN": ("HCN", 2)}[group]
    return join(ring, h, molecule(name), attached)


def framework(net: Net, nodes: Sequence[str], linkers: Sequence[Any], rng: np.random.Generator) -> Any:
    """Return a framework: an atom on every node, a linker on every edge, turned about itself at random.

    Args:
        net: the nodes and edges.
        nodes: element of each node, [n] symbols.
        linkers: a linker for every edge, all of the same length.
        rng: random numbers for the turns of the linkers and the distance of layers.
    """
    from ase import Atoms  # noqa: PLC0415
    from ase.data import covalent_radii  # noqa: PLC0415

    solid = Atoms(nodes, np.zeros((len(nodes), 3)))
    i, j, _ = net.edges[0]
    ends = linkers[0].numbers[0], linkers[0].numbers[linkers[0].info["end"]]
    reach = [covalent_radii[solid.numbers[node]] + covalent_radii[end] for node, end in zip((i, j), ends, strict=True)]
    edge = sum(reach) + linkers[0].positions[linkers[0].info["end"], 0]
    cell = net.cell * edge
    flat = np.linalg.norm(cell[2]) == 0
    solid.set_cell(cell + np.diag([0, 0, rng.uniform(3.4, 4.2) if flat else 0.0]))
    solid.positions = net.nodes @ cell
    for (start, end, shift), piece in zip(net.edges, linkers, strict=True):
        a, b = solid.positions[start], net.nodes[end] @ cell + np.array(shift) @ cell
        along = (b - a) / np.linalg.norm(b - a)
        spin = rotation(np.array([1.0, 0, 0]), 0.0 if flat else rng.uniform(0, np.pi))
        placed = piece.copy()
        placed.positions = placed.positions @ (turn(np.array([1.0, 0, 0]), along) @ spin).T + a + reach[0] * along
        solid += placed
    solid.pbc = True
    return solid


def hofmann(axial: str, square: str, group: str, rng: np.random.Generator) -> Any:
    """Return a Hofmann clathrate M(pyrazine)M'(CN)4: square cyanide layers of M and M' on pyrazine pillars on M."""
    from ase import Atoms  # noqa: PLC0415
    from ase.data import atomic_numbers, covalent_radii  # noqa: PLC0415

    radius = {s: covalent_radii[atomic_numbers[s]] for s in (axial, square, "C", "N")}
    to_n, to_c = 0.75 + radius[axial] * 0.55 + 0.65, radius[square] + radius["C"] * 0.8
    half = to_n + 1.16 + to_c
    pillar = linker("pyrazine", group)
    height = 2 * to_n + pillar.positions[pillar.info["end"], 0]
    side = np.sqrt(2) * half
    solid = Atoms([axial, square], [(0, 0, 0), (side / 2, side / 2, 0)], cell=[side, side, height], pbc=True)
    for x, y in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        out = np.array([x, y, 0]) / np.sqrt(2)
        solid += Atoms("NC", [out * to_n, out * (to_n + 1.16)])
    spin = rotation(np.array([1.0, 0, 0]), rng.uniform(0, np.pi))
    pillar.positions = pillar.positions @ (turn(np.array([1.0, 0, 0]), np.array([0, 0, 1.0])) @ spin).T + [0, 0, to_n]
    return solid + pillar


def random_framework(rng: np.random.Generator) -> Any:
    """Return a framework of one of four families with random metals or nodes, linkers and functional groups."""
    family = rng.choice(["diamond", "cyanide", "layers", "hofmann"], p=[0.55, 0.08, 0.15, 0.22])
    if family == "hofmann":
        return hofmann(str(rng.choice(AXIAL)), str(rng.choice(SQUARE)), str(rng.choice(ON_RING)), rng)
    if family == "cyanide":
        if rng.random() < 0.5:
            return framework(CUBIC, [str(rng.choice(OCTAHEDRAL))], [linker("CN")] * 3, rng)
        return framework(DIAMOND, [str(rng.choice(DIVALENT))] * 2, [linker("CN")] * 4, rng)
    net, nodes = (DIAMOND, TETRAHEDRAL) if family == "diamond" else (HONEYCOMB, TRIGONAL)
    kind = str(rng.choice(["C2", "C4", "benzene"], p=[0.15, 0.15, 0.7]))
    count = len(net.edges)
    if kind != "benzene":
        return framework(net, rng.choice(nodes, 2).tolist(), [linker(kind)] * count, rng)
    group = str(rng.choice(ON_RING))
    decorated = rng.random(count) < 0.5
    return framework(net, rng.choice(nodes, 2).tolist(), [linker(kind, group if d else "") for d in decorated], rng)
