"""Sizes of JMP's pre-training mix, made up to look like the real ones (their index is not at hand).

Atoms: OC20 20 to 225, mean 75; OC22 20 to 228, mean 80; ANI-1x 4 to 30, mean 15; Transition-1x 4 to 23, mean 14. Edges
at 12 A and 30 neighbours: 30 per atom of a slab (copper slabs with an adsorbate have 29.7 to 30.1), all pairs of a
molecule up to the same.
"""

import numpy as np

SIZES = (100_000_000, 8_000_000, 2_000_000, 10_000_000)
"""Number of structures in OC20, OC22, ANI-1x, Transition-1x."""


def draw_atoms(dataset, count, rng):
    """Draw numbers of atoms of some structures of a dataset, which is given by its place in SIZES."""
    if dataset < 2:
        shape, mean, most = ((5.5, 55, 225), (4.0, 60, 228))[dataset]
        return np.clip(20 + rng.gamma(shape, mean / shape, count), 20, most).astype(np.uint16)
    mean, std, most = ((15.3, 4.0, 30), (13.5, 3.0, 23))[dataset - 2]
    return np.clip(rng.normal(mean, std, count).round(), 4, most).astype(np.uint16)


def draw_edges(dataset, count, rng):
    """Draw numbers of main edges of some structures of a dataset, which is given by its place in SIZES."""
    atoms = draw_atoms(dataset, count, rng)
    return atoms * np.minimum(atoms - 1, 30)


def write_index(folder, sizes=SIZES):
    """Write each structure's number of edges, two bytes each, into a file per dataset; return the files."""
    paths = []
    for dataset, size in enumerate(sizes):
        rng = np.random.default_rng(dataset)
        paths.append(folder / f"edges_{dataset}.npy")
        edges = np.lib.format.open_memmap(paths[-1], mode="w+", dtype=np.uint16, shape=(size,))
        some = draw_edges(dataset, min(size, 1_000_000), rng)
        for start in range(0, size, len(some)):
            edges[start : start + len(some)] = some[: size - start]
        edges.flush()
    return paths
