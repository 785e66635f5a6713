"""Closed-shell molecules of H, C, N and O, grown from small ones by replacing hydrogens."""

from typing import Any

import numpy as np

CORES = (
    "CH4", "NH3", "H2O", "C2H6", "C2H4", "C2H2", "HCN", "H2CO", "CH3OH", "H3CNH2", "CH3CN", "N2H4", "H2O2", "C3H8",
    "HCOOH", "CH3CHO", "CH3COOH", "CH3CONH2", "CH3NO2", "HCOOCH3", "OCHCHO", "CH3COCH3", "CH3OCH3", "H2CCO",
    "CH2OCH2", "CH2NHCH2", "C3H6_D3h", "C3H4_C2v", "C3H4_C3v", "C3H4_D2d", "cyclobutane", "cyclobutene",
    "bicyclobutane", "methylenecyclopropane", "C5H8", "butadiene", "isobutene", "2-butyne", "trans-butane",
    "isobutane", "H2CCHCN", "C4H4NH", "C4H4O", "C5H5N", "C6H6", "C2H6NH", "C3H9N", "C2H6CHOH",
)  # fmt: skip
"""Molecules to start from, by their names in ASE's g2 collection."""
GROUPS = (
    "CH4", "CH4", "NH3", "H2O", "H2O", "HCN", "C2H2", "C2H4", "H2CO", "HCOOH", "CH3OH", "H3CNH2", "CH3OCH3", "C2H6",
    "CH3CONH2", "CH2OCH2", "CH2NHCH2", "CH3NO2",
)  # fmt: skip
"""Molecules that become groups by losing a hydrogen; those that are here twice are twice as frequent."""


def bonds(atoms: Any) -> np.ndarray[Any, Any]:
    """Return which atoms are bonded, [n, n]: nearer than 1.25 times the sum of their covalent radii."""
    from ase.data import covalent_radii  # noqa: PLC0415

    radii = covalent_radii[atoms.numbers]
    near = atoms.get_all_distances(mic=bool(atoms.pbc.any())) < 1.25 * (radii[:, None] + radii)
    np.fill_diagonal(near, val=False)
    return near


def side(near: np.ndarray[Any, Any], a: int, b: int) -> list[int] | None:
    """Return the atoms on b's side of the bond between a and b, or None if the bond is part of a ring."""
    found, todo = {b}, [b]
    while todo:
        atom = todo.pop()
        for other in np.flatnonzero(near[atom]).tolist():
            if atom == b and other == a:
                continue
            if other == a:
                return None
            if other not in found:
                found.add(other)
                todo.append(other)
    return sorted(found)


def rotation(axis: np.ndarray[Any, Any], angle: float) -> np.ndarray[Any, Any]:
    """Return the matrix of a rotation by an angle in radians (Rodrigues); multiply row vectors by its transpose."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def turn(start: np.ndarray[Any, Any], end: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the rotation that takes one unit vector to another."""
    axis = np.cross(start, end)
    if np.linalg.norm(axis) < 1e-8:
        axis = np.cross(start, [1.0, 0.3, 0.2])
        return np.eye(3) if start @ end > 0 else rotation(axis, np.pi)
    return rotation(axis, float(np.arccos(np.clip(start @ end, -1, 1))))


def join(core: Any, h: int, group: Any, g: int) -> Any:
    """Join two molecules by a bond where each had a hydrogen, turned so that they are as far apart as possible.

    The atoms of the core, without hydrogen h, keep their order; those of the group, without hydrogen g, follow.
    """
    from ase.data import covalent_radii  # noqa: PLC0415

    a = int(np.flatnonzero(bonds(core)[h])[0])
    b = int(np.flatnonzero(bonds(group)[g])[0])
    out = _unit(core.positions[h] - core.positions[a])
    length = covalent_radii[core.numbers[a]] + covalent_radii[group.numbers[b]]
    into = turn(_unit(group.positions[g] - group.positions[b]), -out)
    hung = (group.positions - group.positions[b]) @ into.T
    kept, added = np.arange(len(core)) != h, np.arange(len(group)) != g
    others = core.positions[kept & (np.arange(len(core)) != a)]
    best, best_gap = hung, -1.0
    for angle in np.arange(24) * (np.pi / 12):
        placed = hung @ rotation(out, angle).T + core.positions[a] + length * out
        apart = np.linalg.norm(placed[added][:, None] - others, axis=-1)
        gap = float(apart.min()) if apart.size else 0.0
        if gap > best_gap + 1e-6:
            best, best_gap = placed, gap
    joined, piece = core[kept], group[added]
    piece.positions = best[added]
    return joined + piece


def hydrogens(atoms: Any, on: int) -> list[int]:
    """Return the hydrogens bonded to any atom of element `on`, or to the atom -1 - `on` if it is negative."""
    near = bonds(atoms)
    held = near[:, atoms.numbers == on].any(axis=1) if on > 0 else near[:, -1 - on]
    return np.flatnonzero((atoms.numbers == 1) & held).tolist()


def random_molecule(rng: np.random.Generator, max_heavy: int = 8) -> Any:
    """Return a random unrelaxed molecule: a core with up to four groups, at most max_heavy atoms but hydrogen."""
    from ase.build import molecule  # noqa: PLC0415

    atoms = molecule(rng.choice(CORES))
    for _ in range(rng.integers(0, 5)):
        group = molecule(rng.choice(GROUPS))
        if (atoms.numbers > 1).sum() + (group.numbers > 1).sum() > max_heavy:
            continue
        h = int(rng.choice(np.flatnonzero(atoms.numbers == 1))) if 1 in atoms.numbers else -1
        g = int(rng.choice(np.flatnonzero(group.numbers == 1)))
        if h < 0 or not bonds(atoms)[h].any():
            continue
        ends = atoms.numbers[bonds(atoms)[h]][0], group.numbers[bonds(group)[g]][0]
        if 6 in ends:  # no chains of N and O
            atoms = join(atoms, h, group, g)
    atoms.set_initial_magnetic_moments(None)
    return atoms


def fingerprint(atoms: Any) -> bytes:
    """Return bytes that are equal for molecules with the same bonds between elements, and hardly for any others."""
    roots = np.sqrt(atoms.numbers)
    graph = bonds(atoms) * np.outer(roots, roots) + np.diag(atoms.numbers)
    return (np.linalg.eigvalsh(graph).round(4) + 0.0).tobytes()


def clashes(atoms: Any) -> bool:
    """Return whether atoms are unphysically near each other: two hydrogens within 1.4 A, any two within 0.9 A."""
    distances = atoms.get_all_distances(mic=bool(atoms.pbc.any()))
    np.fill_diagonal(distances, 9.0)
    hydrogen = atoms.numbers == 1
    return bool((distances < 0.9).any() or (distances[np.ix_(hydrogen, hydrogen)] < 1.4).any())


def aspirin() -> Any:
    """Return acetylsalicylic acid (21 atoms), unrelaxed."""
    from ase.build import molecule  # noqa: PLC0415

    acid, acetic = molecule("HCOOH"), molecule("CH3COOH")
    ring = molecule("C6H6")
    first = hydrogens(ring, 6)[0]
    carbon = int(np.flatnonzero(bonds(ring)[first])[0])
    ortho = next(c for c in np.flatnonzero(bonds(ring)[carbon]).tolist() if ring.numbers[c] == 6)
    ester_h = hydrogens(ring, -1 - ortho)[0]
    acetyl = join(ring, ester_h, acetic, hydrogens(acetic, 8)[0])
    return join(acetyl, first - (ester_h < first), acid, hydrogens(acid, 6)[0])


def peptide(residues: int = 3) -> Any:
    """Return acetyl-(alanine)n-N-methylamide with trans amides and one handedness, unrelaxed (n = 3: 42 atoms)."""
    from ase.build import molecule  # noqa: PLC0415

    methane, formaldehyde, ammonia = molecule("CH4"), molecule("H2CO"), molecule("NH3")
    formamide = join(formaldehyde, hydrogens(formaldehyde, 6)[0], ammonia, 1)
    chain = molecule("CH3CONH2")
    for _ in range(residues):
        chain = join(chain, _trans_hydrogen(chain), methane, 1)
        chain = join(chain, _left_hydrogen(chain), methane, 1)
        chain = join(chain, _left_hydrogen(chain), formamide, hydrogens(formamide, 6)[0])
    return join(chain, _trans_hydrogen(chain), methane, 1)


def _trans_hydrogen(chain: Any) -> int:
    """Return the hydrogen of the only NH2 that is nearest to the amide's oxygen."""
    near = bonds(chain)
    nitrogen = next(n for n in np.flatnonzero(chain.numbers == 7).tolist() if len(hydrogens(chain, -1 - n)) == 2)
    carbon = next(c for c in np.flatnonzero(near[nitrogen]).tolist() if chain.numbers[c] == 6)
    oxygen = next(o for o in np.flatnonzero(near[carbon]).tolist() if chain.numbers[o] == 8)
    return min(hydrogens(chain, -1 - nitrogen), key=lambda h: chain.get_distance(h, oxygen))


def _left_hydrogen(chain: Any) -> int:
    """Return the hydrogen to replace on the newest alpha carbon: the first of a CH3, the left one of a CH2."""
    near = bonds(chain)
    carbons = [c for c in np.flatnonzero(chain.numbers == 6).tolist() if (chain.numbers[near[c]] == 7).any()]
    alpha = max(c for c in carbons if len(hydrogens(chain, -1 - c)) > 1)
    held = hydrogens(chain, -1 - alpha)
    if len(held) == 3:
        return held[0]
    others = set(np.flatnonzero(near[alpha]).tolist()) - set(held)
    nitrogen, side_chain = sorted(others, key=lambda i: -chain.numbers[i])
    arms = [chain.positions[i] - chain.positions[alpha] for i in (nitrogen, side_chain)]
    return max(held, key=lambda h: float(np.cross(*arms) @ (chain.positions[h] - chain.positions[alpha])))


def _unit(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return vector / np.linalg.norm(vector)
