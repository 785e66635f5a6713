"""Structures to measure on: four batches that are built in, or anything that ase.io reads."""

import fnmatch
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ejmp.catalog import CATALOG
from ejmp.graph.structure import Structure

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A batch of structures with the graph settings its dataset is used with."""

    name: str
    """Name of the batch in results."""
    structures: list[Any]
    """The structures, as `ejmp.build_graph` takes them."""
    cutoff: float
    """Cutoff of the graph, in A."""
    max_neighbors: list[int]
    """Largest number of neighbours of an atom, one number per structure."""


def _as_in(dataset: str, name: str, structures: list[Any]) -> Workload:
    """Return a workload with the graph settings of a dataset."""
    graph = CATALOG[dataset].graph
    neighbors = [graph.neighbors_of(len(item.numbers)) for item in structures]
    return Workload(name=name, structures=structures, cutoff=graph.cutoff, max_neighbors=neighbors)


def framework() -> Workload:
    """Return the primitive cell of MOF-5 (106 atoms), at QMOF's settings.

    Fm-3m, a = 25.832 A, positions rounded to 1e-4 from Eddaoudi et al., Science 295, 469 (2002), IRMOF-1.
    """
    from ase.spacegroup import crystal  # noqa: PLC0415

    sites = {
        "Zn": [(0.2934, 0.2934, 0.2934)],
        "O": [(0.25, 0.25, 0.25), (0.2819, 0.2181, 0.1340)],
        "C": [(0.25, 0.25, 0.1113), (0.25, 0.25, 0.0538), (0.2829, 0.2171, 0.0269)],
        "H": [(0.3049, 0.1951, 0.0448)],
    }
    symbols = [symbol for symbol, places in sites.items() for _ in places]
    basis = [place for places in sites.values() for place in places]
    cell = [25.832] * 3 + [90] * 3
    atoms = crystal(symbols, basis, spacegroup=225, cellpar=cell, primitive_cell=True)
    return _as_in("qmof", "framework", [atoms])


def molecules() -> Workload:
    """Return 32 molecules of the G2 set with four atoms or more (ase.collections), at QM9's settings."""
    from ase.collections import g2  # noqa: PLC0415

    chosen = [atoms for name in g2.names if len(atoms := g2[name]) >= 4][:32]
    return _as_in("qm9", "molecules", chosen)


def slab() -> Workload:
    """Return CO on a 3x3x4 copper (111) slab with OC20's tags, at OC20's settings."""
    from ase.build import add_adsorbate, fcc111, molecule  # noqa: PLC0415

    atoms = fcc111("Cu", (3, 3, 4), vacuum=10.0, periodic=True)
    atoms.set_tags([1 if layer == 1 else 0 for layer in atoms.get_tags()])
    carbon_monoxide = molecule("CO")
    carbon_monoxide.rotate(180, "x")
    carbon_monoxide.set_tags([2, 2])
    add_adsorbate(atoms, carbon_monoxide, height=1.85, position="ontop", mol_index=1)
    return _as_in("oc20", "slab", [atoms])


def rocksalt(structures: int = 1, *, repeats: int = 2) -> Workload:
    """Return rattled crystals of sodium chloride, 8 repeats^3 atoms each, at OC20's settings; needs no ase.

    Args:
        structures: number of crystals, each rattled differently.
        repeats: number of cubic cells of 5.64 A along each axis.
    """
    cell = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]) / 2
    places = np.stack(np.meshgrid(*[np.arange(repeats)] * 3, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    ideal = 5.64 * (places + cell).reshape(-1, 3)
    numbers = np.tile([11] * 4 + [17] * 4, repeats**3)
    rng = np.random.default_rng(0)
    found = [
        Structure(
            numbers=numbers,
            positions=ideal + rng.normal(0, 0.05, ideal.shape),
            cell=5.64 * repeats * np.eye(3),
            pbc=True,
        )
        for _ in range(structures)
    ]
    return _as_in("oc20", "rocksalt", found)


BUILT_IN = {"framework": framework, "molecules": molecules, "slab": slab, "rocksalt": rocksalt}
"""Functions that make the built-in batches, by name."""


def read_structures(path: Path, *, select: str = "*", most: int = 1) -> list[Any]:
    """Read the first structures of a file, folder or zip archive, in the order of their names.

    Args:
        path: a file ase.io reads, or a folder or zip archive of such files.
        select: glob that the names of files in a folder or archive must match.
        most: largest number of structures to read; a file may hold several.

    Raises:
        FileNotFoundError: if there is no such path.
        ValueError: if nothing matches or a file cannot be read, naming it.
    """
    found: list[Any] = []
    for name, frames in _frames(path, select):
        for atoms in frames:
            atoms.info["name"] = name
            found.append(atoms)
            if len(found) == most:
                return found
    if not found:
        raise ValueError(f"{path}: no structure whose file matches {select!r}")
    return found


def _frames(path: Path, select: str) -> "Iterator[tuple[str, Any]]":
    if not path.exists():
        raise FileNotFoundError(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _is_wanted(file.name, select))
        yield from ((file.name, _read(file)) for file in files)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
            for name in sorted(archive.namelist()):
                base = Path(name).name
                if not name.endswith("/") and _is_wanted(base, select):
                    Path(folder, base).write_bytes(archive.read(name))
                    yield base, _read(Path(folder, base))
    else:
        yield path.name, _read(path)


def _is_wanted(name: str, select: str) -> bool:
    return fnmatch.fnmatch(name, select) and not name.startswith(".")


def _read(file: Path) -> list[Any]:
    import ase.io  # noqa: PLC0415

    try:
        frames = ase.io.read(file, index=":")
    except Exception as error:
        raise ValueError(f"{file.name}: ase.io cannot read it ({type(error).__name__}: {error})") from error
    return frames if isinstance(frames, list) else [frames]


def from_files(path: Path, *, select: str = "*", most: int = 1, cutoff: float | None = None) -> Workload:
    """Make a workload of files: QMOF's settings (19 A) for periodic structures, QM9's (8 A) for molecules.

    Args:
        path: what to read, as for `read_structures`.
        select: which files to read, as for `read_structures`.
        most: largest number of structures, as for `read_structures`.
        cutoff: cutoff in A, instead of the dataset's.
    """
    structures = read_structures(path, select=select, most=most)
    if cutoff is None:
        cutoff = CATALOG["qmof" if any(atoms.pbc.any() for atoms in structures) else "qm9"].graph.cutoff
    names = [str(atoms.info["name"]) for atoms in structures]
    name = names[0] if len(names) == 1 else f"{len(names)} structures of {path.name}"
    neighbors = [CATALOG["qmof"].graph.neighbors_of(len(atoms)) for atoms in structures]
    return Workload(name=name, structures=structures, cutoff=cutoff, max_neighbors=neighbors)
