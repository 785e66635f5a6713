"""Small sources in the layouts of the datasets, and pickles of PyG data made without PyG."""

import contextlib
import json
import lzma
import pickle
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import torch

from ejmp.data import FORMATS, ReadOptions, Structure, read
from ejmp.data.readers.by_name import configured
from ejmp.data.readers.options import Survey

N = 5
NUMBERS = np.array([6, 1, 1, 8, 1])
FRAMES = 3
COLUMNS = "species:S:1:pos:R:3:forces:R:3"


def truth(seed=0, frames=FRAMES, n=N):
    """Return positions [frames, n, 3], energies [frames] and forces [frames, n, 3] without units."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(frames, n, 3)) * 2, rng.normal(size=frames) - 40, rng.normal(size=(frames, n, 3))


@contextlib.contextmanager
def pyg_modules(layout):
    """Install modules whose classes pickle under PyG's names, with the state that a version of PyG has."""

    class Storage:
        def __getstate__(self):
            return dict(self.__dict__)

    class Data:
        def __init__(self, **values):
            if layout == "1.x":
                self.__dict__.update(dict.fromkeys(("x", "edge_index", "edge_attr", "y", "pos", "normal", "face")))
                self.__dict__.update(values)
            else:
                store = Storage()
                store.__dict__.update(_mapping=values, _parent=self)
                self.__dict__.update(_edge_attr_cls=EdgeAttr, _tensor_attr_cls=TensorAttr, _store=store)

    class EdgeAttr: ...

    class TensorAttr: ...

    data, storage = types.ModuleType("torch_geometric.data.data"), types.ModuleType("torch_geometric.data.storage")
    for cls, module, name in (
        (Data, data, "Data"),
        (EdgeAttr, data, "DataEdgeAttr"),
        (TensorAttr, data, "DataTensorAttr"),
        (Storage, storage, "GlobalStorage"),
    ):
        cls.__name__ = cls.__qualname__ = name
        cls.__module__ = module.__name__
        setattr(module, name, cls)
    names = ("torch_geometric", "torch_geometric.data")
    modules = {name: types.ModuleType(name) for name in names} | {data.__name__: data, storage.__name__: storage}
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield data.Data
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)


def oc_record(k=0, layout="2.x", protocol=-1, **changes):
    """Return one record of an OC20 LMDB file; fields that are changed to `...` are left out."""
    positions, energy, forces = truth()
    values = {
        "pos": torch.tensor(positions[k], dtype=torch.float32),
        "atomic_numbers": torch.tensor(NUMBERS, dtype=torch.float32),
        "cell": torch.tensor(np.diag([7.0, 8.0, 20.0]) + 0.5, dtype=torch.float32)[None],
        "natoms": N,
        "tags": torch.tensor([0, 0, 1, 2, 2]),
        "fixed": torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]),
        "force": torch.tensor(forces[k], dtype=torch.float32),
        "y": float(energy[k]),
        "sid": 1234,
        "fid": k,
    }
    values = {name: value for name, value in (values | changes).items() if value is not ...}
    with pyg_modules(layout) as data:
        return pickle.dumps(data(**values), protocol=protocol)


def write_lmdb(path, records, length=None):
    import lmdb

    with lmdb.open(str(path), subdir=False, map_size=1 << 26, lock=False) as file, file.begin(write=True) as change:
        for k, record in enumerate(records):
            change.put(str(k).encode(), record)
        change.put(b"length", pickle.dumps(len(records) if length is None else length))
    return path


def write_oc(path):
    return write_lmdb(path / "data.0000.lmdb", [oc_record(k) for k in range(FRAMES)])


def xyz_text(comments, units=1.0):
    positions, energy, forces = truth()
    symbols = {1: "H", 6: "C", 8: "O"}
    lines = []
    for k, comment in enumerate(comments):
        lines += [str(N), comment.format(energy=energy[k])]
        rows = zip(NUMBERS, positions[k], forces[k] * units, strict=True)
        lines += [f"{symbols[z]} {' '.join(f'{v:.12g}' for v in (*r, *f))}" for z, r, f in rows]
    return "\n".join(lines) + "\n"


def write_oc20_text(path, *, packed=True):
    lattice = 'Lattice="9 0 0 0 9 0 0 0 20" pbc="T T T"'
    text = xyz_text([f"{lattice} Properties={COLUMNS} energy={{energy}}"] * FRAMES)
    labels = "".join(f"random12,frame{10 * k},-{k}.5\n" for k in range(FRAMES))
    if packed:
        (path / "0.txt.xz").write_bytes(lzma.compress(labels.encode()))
        (path / "0.extxyz.xz").write_bytes(lzma.compress(text.encode()))
    else:
        (path / "0.txt").write_text(labels)
        (path / "0.extxyz").write_text(text)
    return path


def write_hdf5(path, layout, groups, **changes):
    """Write an HDF5 file with the same frames in each group; arrays that are changed to `...` are left out."""
    import h5py

    positions, energy, forces = truth()
    arrays = {
        layout.numbers: NUMBERS.astype(np.uint8),
        layout.positions: positions.astype(np.float32),
        layout.energy: energy,
        layout.forces: forces.astype(np.float32),
        **dict.fromkeys(layout.targets, energy / 2),
    }
    with h5py.File(path, "w") as file:
        for group in groups:
            for name, array in (arrays | changes).items():
                if array is not ...:
                    file.create_dataset(f"{group}/{name}", data=array)
    return path


def write_npz(path, layout, **changes):
    positions, energy, forces = truth()
    arrays = {layout.numbers: NUMBERS, layout.positions: positions, layout.energy: energy, layout.forces: forces}
    np.savez(path, **{name: array for name, array in (arrays | changes).items() if array is not ...})
    return path


def write_md22_xyz(path):
    path.write_text(xyz_text([f"Energy={{energy}} Properties={COLUMNS}", "{energy}", "energy={energy}"]))
    return path


METHANE = """5
gdb {number}\t157.7118\t157.70997\t157.70699\t0.\t13.21\t-0.3877\t0.1171\t0.5048\t35.3641\t0.044749\t-40.47893\
\t-40.476062\t-40.475117\t-40.498597\t6.469\t
C\t-0.0126981359\t 1.0858041578\t 0.0080009958\t-0.535689
H\t 0.002150416\t-6.0313176*^-3\t 0.0019761204\t 0.133921
H\t 1.0117308433\t 1.4637511618\t 2.765748*^-4\t 0.133922
H\t-0.540815069\t 1.4475266138\t-0.8766437152\t 0.133923
H\t-0.5238136345\t 1.4379326443\t 0.9063972942\t 0.133923
1341.307\t1341.3284\t1341.365\t1562.6731\t1562.7453\t3038.3205\t3151.6034\t3151.6788\t3151.7078
C\tC\t
InChI=1S/CH4/h1H4\tInChI=1S/CH4/h1H4
"""


def write_qm9_raw(path, numbers=(1, 2, 3)):
    for number in numbers:
        (path / f"dsgdb9nsd_{number:06d}.xyz").write_text(METHANE.replace("{number}", str(number)))
    return path


def write_qm9_tar(path, folder, mode="w:bz2"):
    with tarfile.open(path, mode) as archive:
        for file in sorted(folder.glob("*.xyz")):
            archive.add(file, file.name)
    return path


def write_qm9_pt(path, layout="2.x", form="list"):
    """Write PyG's file of three molecules: a list of Data, of dicts, or Data joined end to end."""
    positions, _, _ = truth()
    y = torch.arange(3 * 19, dtype=torch.float32).reshape(3, 19) / 8
    z, pos = torch.tensor(NUMBERS), torch.tensor(positions, dtype=torch.float32)
    names = [f"gdb_{k + 1}" for k in range(3)]
    with pyg_modules(layout) as data:
        if form == "joined":
            whole = {"z": z.repeat(3), "pos": pos.reshape(-1, 3), "y": y, "idx": torch.arange(3), "name": names}
            bounds = dict.fromkeys(("z", "pos"), torch.tensor([0, N, 2 * N, 3 * N]))
            bounds |= dict.fromkeys(("y", "idx", "name"), torch.arange(4))
            saved = (whole, bounds, data) if layout == "2.x" else (data(**whole), bounds)
        else:
            items = [{"z": z, "pos": pos[k], "y": y[k : k + 1], "name": names[k], "idx": k} for k in range(3)]
            saved = items if form == "dicts" else [data(**item) for item in items]
        torch.save(saved, path)
    return path


def write_qmof_json(path):
    site = {"label": "Zn1", "species": [{"element": "Zn", "occu": 1}], "xyz": [0.5, 1.0, 1.5]}
    other = {"label": "O", "species": [{"element": "O", "occu": 1}], "xyz": [2.5, 1.0, 1.5]}
    structure = {"lattice": {"matrix": [[8, 0, 0], [1, 9, 0], [0, 0, 10]]}, "sites": [site, other]}
    names = ("qmof-1", "qmof-2", "qmof-3")
    gaps = ({"pbe": {"bandgap": 1.25}}, {"pbe": {"bandgap": 0.0}}, {"pbe": {"bandgap": None}})
    labels = [{"qmof_id": name, "outputs": gap} for name, gap in zip(names, gaps, strict=True)]
    (path / "qmof.json").write_text(json.dumps(labels))
    structures = [{"qmof_id": name, "structure": structure} for name in names]
    (path / "qmof_structure_data.json").write_text(json.dumps(structures))
    return path


def ase_frames():
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.constraints import FixAtoms

    positions, energy, forces = truth()
    frames = []
    for k in range(FRAMES):
        atoms = Atoms(NUMBERS, positions[k], cell=np.diag([7, 8, 9.0]), pbc=[True, True, False], tags=[0, 0, 1, 2, 2])
        atoms.set_constraint(FixAtoms([0, 1]))
        atoms.calc = SinglePointCalculator(atoms, energy=energy[k], forces=forces[k])
        frames.append(atoms)
    return frames


def everything(path, name, **options):
    """Return all structures of a source, after checking what holds for every source."""
    options = ReadOptions(**options)
    chosen = configured(FORMATS[name], name, options, Survey())
    parts = chosen.parts(Path(path))
    assert parts == chosen.parts(Path(path))
    assert len({part.name for part in parts}) == len(parts)
    found = []
    for part in parts:
        of_part = list(chosen.read(Path(path), part))
        assert len(of_part) == part.count
        found += of_part
    assert len({structure.id for structure in found}) == len(found) > 0
    for s in found:
        assert isinstance(s, Structure)
        assert (s.numbers.dtype, s.positions.dtype) == (np.int64, np.float64)
        assert s.positions.shape == (len(s.numbers), 3)
        assert s.forces is None or (s.forces.shape == s.positions.shape and s.forces.dtype.kind == "f")
        assert s.energy is None or type(s.energy) is float
        assert s.tags is None or s.tags.dtype == np.int64
        assert s.fixed is None or s.fixed.dtype == bool
    assert [s.id for s in read(path, format=name, options=options)] == [s.id for s in found]
    return found
