"""Hostile sources, small on disk, for `support.attack_sources`. Each function writes one, or returns what does."""

import bz2
import contextlib
import functools
import gzip
import io
import lzma
import math
import os
import socket
import sqlite3
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import torch

from ejmp.data.readers.hdf5 import ANI1X_LAYOUT
from support import data_sources as made

GIB = 1 << 30
ZEROS = bytes(1 << 20)
CIF_HEAD = """data_x
_cell_length_a 100
_cell_length_b 100
_cell_length_c 100
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
"""
CIF_SITES = (
    "loop_\n_atom_site_label\n_atom_site_type_symbol\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\n"
)


def special(kind, name):
    """Return what makes a file of another kind than a regular one under a name in a folder."""

    def make(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            with contextlib.chdir(path.parent):  # the address of a socket is short
                socket.socket(socket.AF_UNIX).bind(path.name)
        else:
            path.symlink_to("/dev/zero")
        return folder if "/" in name else path

    return make


def text(name, contents):
    def make(folder):
        (folder / name).write_bytes(contents.encode() if isinstance(contents, str) else contents)
        return folder / name

    return make


def sparse(name, head=b"", size=6 * GIB):
    """Return what makes a file that begins with some bytes and goes on with zeros that take no space."""

    def make(folder):
        with (folder / name).open("wb") as file:
            file.write(head)
            file.truncate(size)
        return folder / name

    return make


def packed(name, head, compress):
    """Return what makes a compressed file of some bytes and then 1 GiB of zeros: streams of 16 MiB, end to end."""

    def make(folder):
        piece = compress(ZEROS * 16)
        (folder / name).write_bytes(compress(head) + piece * 64)
        return folder / name

    return make


gz, xz, bz = functools.partial(gzip.compress, compresslevel=6), lzma.compress, bz2.compress


def npz_of_zeros(folder):
    shapes = {"nuclear_charges": (5,), "coords": (GIB // 120, 5, 3), "energies": (1,), "forces": (1,)}
    with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, shape in shapes.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": "<f8", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                left = math.prod(shape) * 8
                while left:
                    left -= member.write(ZEROS[: min(left, len(ZEROS))])
    return folder / "a.npz"


def npz_of_shape(folder):
    """An npz whose array announces 48 TB."""
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (1 << 41, 3)})
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        for name in ("nuclear_charges", "coords", "energies", "forces"):
            archive.writestr(f"{name}.npy", member.getvalue())
    return folder / "a.npz"


def tar_with_header(packed):
    def make(folder):
        info = tarfile.TarInfo("pax")
        info.type, info.size = tarfile.XHDTYPE, GIB
        head = info.tobuf(tarfile.USTAR_FORMAT)
        name = "a.tar.gz" if packed else "a.tar"
        if packed:
            (folder / name).write_bytes(gz(head) + gz(ZEROS * 16) * 64)
        else:
            sparse(name, head, GIB + (1 << 20))(folder)
        return folder / name

    return make


def xyz_line(folder):
    """An xyz file of one atom, with a line of 200 MB."""
    (folder / "a.xyz").write_bytes(b"1\n" + b"a=1 " * (50 << 20) + b"\nH 0 0 0\n")
    return folder / "a.xyz"


def xyz_at_one_place(folder):
    (folder / "a.xyz").write_text("100000\n\n" + "H 0 0 0\n" * 100_000)
    return folder / "a.xyz"


def trajectory(folder):
    """A trajectory that announces 10^12 frames."""
    import ase.io

    ase.io.write(folder / "a.traj", made.ase_frames())
    content = bytearray((folder / "a.traj").read_bytes())
    struct.pack_into("<q", content, 32, 10**12)
    (folder / "a.traj").write_bytes(content)
    return folder / "a.traj"


def poscar(count):
    return text("POSCAR", f"x\n1\n9 0 0\n0 9 0\n0 0 9\nH\n{count}\nDirect\n0 0 0\n")


def cif(sites, operations=0):
    """A CIF of sites on a grid, in a cell of 100 A, with operations that shift them."""

    def make(folder):
        side = math.ceil(sites ** (1 / 3))
        shifts = "".join(f"'x+{k / (1000 * max(operations, 1)):.7f},y,z'\n" for k in range(operations))
        loops = f"loop_\n_symmetry_equiv_pos_as_xyz\n{shifts}" if operations else ""
        rows = "".join(
            f"A{k} O {k % side / side:.6f} {k // side % side / side:.6f} {k // side**2 / side:.6f}\n"
            for k in range(sites)
        )
        (folder / "a.cif").write_text(CIF_HEAD + loops + CIF_SITES + rows)
        return folder / "a.cif"

    return make


def cif_of_shifts(folder):
    """200 sites, each at 1,000 places of its own."""
    file = cif(200, 1000)(folder)
    lines = (f"'x,y+{k / 1000:.3f},z'" for k in range(1000))
    head, _, tail = file.read_text().partition("_symmetry_equiv_pos_as_xyz\n")
    rows = tail[tail.index("loop_") :]
    file.write_text(head + "_symmetry_equiv_pos_as_xyz\n" + "\n".join(lines) + "\n" + rows)
    return file


def database(*changes):
    """Return what makes an ASE database, changed by SQL."""

    def make(folder):
        import ase.db

        path = folder / "a.db"
        with ase.db.connect(path) as file:
            for atoms in made.ase_frames():
                file.write(atoms)
        with sqlite3.connect(path) as connection:
            for change in changes:
                connection.execute(change)
        connection.close()
        return path

    return make


ENDLESS_VIEW = (
    "ALTER TABLE systems RENAME TO old",
    "CREATE VIEW systems AS WITH RECURSIVE n(k) AS (SELECT 1 UNION ALL SELECT k + 1 FROM n) SELECT old.* FROM old, n",
)
FALSE_VIEW = (
    *ENDLESS_VIEW, "PRAGMA writable_schema = ON", "UPDATE sqlite_master SET type = 'table' WHERE name = 'systems'",
)  # fmt: skip
COMPUTED = ("ALTER TABLE systems ADD COLUMN more BLOB GENERATED ALWAYS AS (zeroblob(900000000))",)


def hdf5(change):
    """Return what makes an ANI-1x file of one group that a function has changed, which gets the group."""

    def make(folder):
        import h5py

        path = made.write_hdf5(folder / "a.h5", ANI1X_LAYOUT, ["C1H3O1"])
        with h5py.File(path, "a") as file:
            change(folder, file["C1H3O1"])
        return path

    return make


def _other(folder):
    """Another file, of text that must not come into a dataset."""
    (folder / "secret.txt").write_bytes(b"secret! " * 45)
    return folder / "secret.txt"


def external_storage(folder, group):
    del group["coordinates"]
    group.create_dataset("coordinates", (3, 5, 3), "f8", external=[(str(_other(folder)), 0, 360)])


def _other_hdf5(folder):
    (folder / "other").mkdir()
    return made.write_hdf5(folder / "other" / "b.h5", ANI1X_LAYOUT, ["C1H3O1"])


def external_link(name):
    def change(folder, group):
        import h5py

        place = group if name in group else group.file
        if name in place:
            del place[name]
        place[name] = h5py.ExternalLink(str(_other_hdf5(folder)), f"C1H3O1/{name}" if place == group else "C1H3O1")

    return change


def link_to_fifo(folder, group):
    import h5py

    os.mkfifo(folder / "pipe")
    del group["coordinates"]
    group["coordinates"] = h5py.ExternalLink(str(folder / "pipe"), "x")


def virtual(folder, group):
    import h5py

    layout = h5py.VirtualLayout((3, 5, 3), "f4")
    layout[:] = h5py.VirtualSource(str(_other_hdf5(folder)), "C1H3O1/coordinates", (3, 5, 3))
    del group["coordinates"]
    group.create_virtual_dataset("coordinates", layout)


def soft_link_out(folder, group):
    import h5py

    group.file["door"] = h5py.ExternalLink(str(_other_hdf5(folder)), "C1H3O1")
    del group["coordinates"]
    group["coordinates"] = h5py.SoftLink("/door/coordinates")


def soft_link_loop(_folder, group):
    import h5py

    del group["coordinates"]
    group["coordinates"] = h5py.SoftLink("/C1H3O1/coordinates")


def frames_that_are_not_there(_folder, group, frames=10_000_000):
    for name, shape in (("coordinates", (5, 3)), ("wb97x_dz.forces", (5, 3)), ("wb97x_dz.energy", ())):
        del group[name]
        group.create_dataset(name, (frames, *shape), "f4", chunks=(1000, *shape), maxshape=(None, *shape))


def chunk_of_zeros(_folder, group):
    """Forces of 1 GiB in one honest chunk of 1 MB."""
    frames = GIB // 60
    del group["coordinates"], group["wb97x_dz.forces"], group["wb97x_dz.energy"]
    group["wb97x_dz.energy"] = np.zeros(frames, "f4")
    group.create_dataset("coordinates", (frames, 5, 3), "f4", chunks=(1000, 5, 3), compression="gzip")
    array = group.create_dataset("wb97x_dz.forces", (frames, 5, 3), "f4", chunks=(frames, 5, 3), compression="gzip")
    array.id.write_direct_chunk((0, 0, 0), zlib_zeros(frames * 60))


def chunk_that_lies(_folder, group):
    """A chunk of 4 MB that inflates to 3 GiB."""
    frames = (4 << 20) // 60
    for name, shape in (("coordinates", (5, 3)), ("wb97x_dz.forces", (5, 3)), ("wb97x_dz.energy", ())):
        del group[name]
        numbers = np.random.default_rng(0).normal(size=(frames, *shape)).astype("f4")
        array = group.create_dataset(name, data=numbers, chunks=numbers.shape, compression="gzip")
    array = group["coordinates"]
    array.id.write_direct_chunk((0, 0, 0), zlib_zeros(3 * GIB))


def zlib_zeros(size):
    """Zeros compressed, without making them: a block that ends at a whole byte can be repeated."""
    deflate = zlib.compressobj(9)
    head = deflate.compress(b"") + deflate.flush(zlib.Z_FULL_FLUSH)
    block = deflate.compress(ZEROS) + deflate.flush(zlib.Z_FULL_FLUSH)
    last = zlib.compressobj(9, zlib.DEFLATED, -15)
    tail = last.compress(bytes(size % len(ZEROS))) + last.flush()
    check = (size % 65521) << 16 | 1
    return head + block * (size // len(ZEROS)) + tail + struct.pack(">I", check)


def lmdb_with_zip(folder):
    """A record whose tensor is a zip file of a compressed storage of 256 MiB."""
    packed = io.BytesIO()
    whole = io.BytesIO()
    torch.save(torch.zeros(1 << 26).untyped_storage(), whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    raw = packed.getvalue()
    load = b"ctorch.storage\n_load_from_bytes\n" + b"B" + struct.pack("<I", len(raw)) + raw + b"\x85R."
    return made.write_lmdb(folder / "data.lmdb", [load])


def lmdb_of_records(folder):
    """A sparse LMDB file that announces 10^11 records."""
    path = made.write_oc(folder)
    content = bytearray(path.read_bytes())
    for page in (0, 1):
        struct.pack_into("<Q", content, page * 4096 + 120, 10**11)
    path.write_bytes(content)
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    return path
