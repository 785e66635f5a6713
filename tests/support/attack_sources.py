"""Attack everything that reads files: `PYTHONPATH=tests python -m support.attack_sources [--short] [KIND ...]`.

Each attempt is a process of its own with SECONDS of time and MEMORY more than this one has. It must end as its row
says: "refused", by a ValueError or OSError that names the file, or "read". Everything else is a failure: another error,
the end of the process, too much time, or more than RESIDENT of memory. The table at the end counts outcomes by kind;
the exit status is 1 if there is a failure.
"""

import argparse
import contextlib
import io
import os
import shutil
import sys
import time
import warnings

import h5py  # noqa: F401, the packages that readers import are there before time and memory are measured
import scipy.spatial  # noqa: F401
import torch

import ejmp
from ejmp.data import convert, open_store, read
from support import hostile_files as files
from support import hostile_models as models
from support.attacks import Attempt, attack


def reads(format=None):  # noqa: A002
    def use(path):
        warnings.simplefilter("ignore")
        return sum(1 for _ in read(path, format=format))

    return use


def loads(path):
    return ejmp.load(path, backend="reference").config.blocks


def opens(path):
    return sum(1 for _ in open_store(path))


def configures(path):
    from ejmp.cli import make_parser

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            make_parser().parse_args(["bench", "--config", str(path)])
        except SystemExit as error:
            raise ValueError(said.getvalue()[-1000:]) from error


READERS = {
    "a.xyz": "ase", "a.cif": "ase", "a.db": "ase", "a.traj": "ase", "a.h5": "ani1x", "a.npz": "rmd17", "a.lmdb": "oc20",
    "a.pt": "qm9", "a.tar": "qm9", "a.any": None,
}  # fmt: skip


def special_files():
    """Files that are no regular ones, in every place where a file is opened."""
    for kind in ("fifo", "socket", "/dev/zero"):
        for k, (name, format_) in enumerate(READERS.items()):
            make = files.special(kind, name)
            yield Attempt("special files", f"{kind} as {name}", make, reads(format_), short=k % 3 == 0)
        yield Attempt("special files", f"{kind} as a.toml", files.special(kind, "a.toml"), configures)
        for name in ("a.safetensors", "a.pt"):
            yield Attempt("special files", f"{kind} as {name}", files.special(kind, name), loads)
        for name in ("config.json", "model.safetensors", "tasks.json"):
            yield Attempt("special files", f"{kind} as model/{name}", _in_model(kind, name), loads)
        for name in ("dataset.json", "num_atoms.npy", "shard-00000.lmdb"):
            yield Attempt("special files", f"{kind} as a store's {name}", _in_store(kind, name), opens)


def _in_model(kind, name):
    def make(folder):
        models.model()(folder)
        return files.special(kind, f"model/{name}")(folder) / "model"

    return make


def _in_store(kind, name):
    def make(folder):
        source = files.made.write_md22_xyz(folder / "a.xyz")
        (split,) = convert(source, folder / "store", format="ase", split="train")
        return files.special(kind, f"store/train/{name}")(folder) / split.relative_to(folder)

    return make


def bombs():
    """Little that unpacks to 1 GiB."""
    head = files.CIF_HEAD.encode()
    for ending, compress in ((".gz", files.gz), (".xz", files.xz), (".bz2", files.bz)):
        for name, start in (("a.cif", head), ("a.xyz", b"1\n\nH 0 0 0\n")):
            make = files.packed(name + ending, start, compress)
            yield Attempt("bombs", f"1 GiB in {name}{ending}", make, reads("ase"), short=ending == ".gz")
        make = files.packed(f"a.extxyz{ending}", b"1\n\nH 0 0 0\n", compress)
        yield Attempt("bombs", f"1 GiB in a.extxyz{ending}", _with_text(make), reads("oc20_text"), short=False)
    yield Attempt("bombs", "1 GiB in an npz", files.npz_of_zeros, reads("rmd17"), short=False)
    yield Attempt("bombs", "1 GiB in an npz to recognise", files.npz_of_zeros, reads(), short=False)
    yield Attempt("bombs", "an npz of 48 TB", files.npz_of_shape, reads("rmd17"))
    for is_packed in (False, True):
        make = files.tar_with_header(is_packed)
        yield Attempt("bombs", f"tar header of 1 GiB, packed: {is_packed}", make, reads("qm9"))
    yield Attempt("bombs", "128 MiB in a compressed .pt", models.compressed_checkpoint, loads, short=False)
    yield Attempt(
        "bombs", "128 MiB in a compressed .pt of molecules", models.compressed_checkpoint, reads("qm9"), short=False
    )
    yield Attempt("bombs", "a zip in an LMDB record", files.lmdb_with_zip, reads("oc20"), short=False)
    yield Attempt("bombs", "1 GiB in an HDF5 chunk", files.hdf5(files.chunk_of_zeros), reads("ani1x"))
    yield Attempt("bombs", "an HDF5 chunk that lies", files.hdf5(files.chunk_that_lies), reads("ani1x"))


def _with_text(make):
    def both(folder):
        (folder / "a.txt").write_text("system,frame0,0\n")
        return make(folder)

    return both


SPARSE = {
    "a.xyz": (b"1\n\n", "ase"),
    "a.cif": (files.CIF_HEAD.encode(), "ase"),
    "a.json": (b'{"ids": [', "ase"),
    "a.npz": (b"PK\x03\x04", "rmd17"),
    "a.pt": (b"PK\x03\x04", "qm9"),
    "a.h5": (b"\x89HDF\r\n\x1a\n", "spice"),
    "a.traj": (b"- of UlmASE-Trajectory", "ase"),
    "a.lmdb": (bytes(16), "oc20"),
    "a.db": (b"SQLite format 3\0", "ase"),
}
"""Files that begin with these bytes and go on with zeros, and the format they are read as."""


def sizes():
    """Sizes that are announced, and files of zeros that take no space."""
    make = files.hdf5(files.frames_that_are_not_there)
    yield Attempt("sizes", "10^7 frames that HDF5 does not store", make, reads("ani1x"))
    yield Attempt("sizes", "a line of 200 MB of xyz", files.xyz_line, reads("ase"))
    yield Attempt("sizes", "99,999,999 atoms of xyz", files.text("a.xyz", "99999999\n\nH 0 0 0\n"), reads("ase"))
    for count in ("300000000", "300_000_000", "+300000000", "300000000 -299999999"):
        yield Attempt("sizes", f"POSCAR of {count} atoms", files.poscar(count), reads("ase"))
    yield Attempt(
        "sizes",
        "CIF with a word of 1 MB",
        files.text("a.cif", files.CIF_HEAD + files.CIF_SITES + "A" * 10**6),
        reads("ase"),
    )
    yield Attempt("sizes", "CIF of 200 sites x 1,000 operations", files.cif_of_shifts, reads("ase"))
    yield Attempt(
        "sizes", "CIF of 200 sites x 1,000 equal operations", files.cif(200, 1000), reads("ase"), "read", short=False
    )
    yield Attempt("sizes", "CIF of 2,000 sites", files.cif(2000), reads("ase"), "read")
    yield Attempt("sizes", "CIF of 20,000 sites", files.cif(20_000), reads("ase"), "read", short=False)
    yield Attempt(
        "sizes",
        "CIF of 20,000 sites at one place",
        files.text("a.cif", files.CIF_HEAD + files.CIF_SITES + "A O 0 0 0\n" * 20_000),
        reads("ase"),
        short=False,
    )
    yield Attempt("sizes", "endless view in an ASE database", files.database(*files.ENDLESS_VIEW), reads("ase"))
    yield Attempt("sizes", "endless view called a table", files.database(*files.FALSE_VIEW), reads("ase"))
    yield Attempt("sizes", "computed column in an ASE database", files.database(*files.COMPUTED), reads("ase"))
    yield Attempt("sizes", "10^11 records of LMDB", files.lmdb_of_records, reads("oc20"))
    for name, (start, format_) in SPARSE.items():
        yield Attempt("sizes", f"sparse {name} of 6 GiB", files.sparse(name, start), reads(format_))
    yield Attempt("sizes", "settings of 2 MB", files.text("a.json", "[" + "1," * 10**6 + "1]"), configures)
    yield Attempt("sizes", "settings of 10^5 levels", files.text("a.json", "[" * 10**5), configures)
    levels = ", ".join(f"&a{k} [{f'*a{k - 1}, ' * 9}x]" for k in range(1, 15))
    laugh = f"seconds: [&a0 [x, x], {levels}]\n"
    yield Attempt("sizes", "billion laughs", files.text("a.yaml", laugh), configures)
    yield Attempt("sizes", "100,000 atoms at one place", files.xyz_at_one_place, reads("ase"), short=False)
    yield Attempt(
        "sizes",
        "a comment of 1 MB",
        files.text("a.xyz", "1\n" + "a=1 " * 260_000 + "\nH 0 0 0\n"),
        reads("ase"),
        "read",
    )
    yield Attempt("sizes", "a trajectory of 10^12 frames", files.trajectory, reads("ase"))
    yield Attempt("sizes", "JSON of 10^5 levels", files.text("a.json", '{"ids": ' + "[" * 10**5), reads("ase"))


def other_files():
    """HDF5 files whose numbers are elsewhere."""
    changes = {
        "external storage": files.external_storage,
        "external link to an array": files.external_link("coordinates"),
        "external link to atomic numbers": files.external_link("atomic_numbers"),
        "external link to a group": files.external_link("C2H6"),
        "external link to a FIFO": files.link_to_fifo,
        "virtual dataset": files.virtual,
        "soft link out of the file": files.soft_link_out,
        "soft link to itself": files.soft_link_loop,
    }
    for name, change in changes.items():
        for format_ in ("ani1x", None):
            yield Attempt("other files", f"{name}, {format_ or 'recognised'}", files.hdf5(change), reads(format_))


COUNTS = (
    *("blocks", "num_tasks", "num_concat", "num_global_out_layers", "emb_size_edge", "num_radial"),
    "num_spherical",
)


def configs():
    """Sizes of models that nobody has."""
    for field in COUNTS:
        for value in (10**8, 10**9, 2**63, -1, 1.5, "8", None, [8]):
            yield Attempt(
                "configs", f"{field} of {value!r}", models.model(**{field: value}), loads, short=value == 10**9
            )
    many = {"blocks": 60_000, "num_concat": 60_000, "emb_size_edge": 1, "emb_size_atom": 1}
    yield Attempt("configs", "2e10 layers of one channel", models.model(**many), loads)
    wide = {"blocks": 1000, "emb_size_edge": 60_000}
    yield Attempt("configs", "4e13 parameters", models.model(**wide), loads)
    yield Attempt("configs", "10^5 levels", models.config_text("[" * 10**5), loads)
    yield Attempt("configs", "not a dict", models.config_text("[1]"), loads)
    yield Attempt("configs", "NaN as cutoff", models.model(rbf_cutoff=float("nan")), loads)
    yield Attempt("configs", "blocks kept that are text", models.model(kept_blocks=["0"]), loads)


def checkpoints():
    """Weights that are no numbers, or not there."""
    change, first = models.checkpoint, models.set_to
    made = {
        "NaN": change(first(models.with_one(float("nan")))),
        "infinity": change(first(models.with_one(float("-inf")))),
        "NaN in a scale factor": change(
            first(lambda t: t * float("nan"), "backbone.out_blocks.0.scale_sum.scale_factor")
        ),
        "sparse": change(first(lambda t: t.to_sparse())),
        "sparse CSR": change(first(lambda t: t.to_sparse_csr())),
        "float8": change(first(lambda t: t.to(torch.float8_e4m3fn))),
        "complex": change(first(lambda t: t.to(torch.complex64))),
        "integers": change(first(lambda t: t.long())),
        "stride 0": change(first(lambda t: t[:1].expand(t.shape))),
        "2.7e11 by stride 0": change(models.stride_zero),
        "a storage beyond its record": models.storage_beyond_its_record,
        "sparse .pt of 6 GiB": files.sparse("b.pt", b"PK\x03\x04"),
        "sparse .pt of 6 GiB, before torch 1.6": files.sparse("b.pt", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."),
    }
    for name, make in made.items():
        yield Attempt("checkpoints", name, make, loads)
    big = {models.FIRST: {"dtype": "F32", "shape": [1 << 15, 3 << 14], "data_offsets": [0, 6 << 30]}}
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    made = {
        "6 GiB of one tensor": (big, 6 << 30),
        "tensors on top of each other": ({"a": one, "b": one}, 8),
        "a hole": ({"a": one, "b": one | {"data_offsets": [16, 24]}}, 24),
        "less than announced": ({"a": one}, 4),
        "more than announced": ({"a": one}, 12),
        "a negative place": ({"a": one | {"data_offsets": [-8, 0]}}, 8),
        "a shape that overflows": ({"a": one | {"shape": [1 << 40, 1 << 40]}}, 8),
        "an unknown type": ({"a": one | {"dtype": "X"}}, 8),
        "no dict": ([1], 0),
        "no rows": ({"a": 1}, 0),
    }
    for name, (header, size) in made.items():
        yield Attempt("safetensors", name, models.safetensors(header, size), loads)
    for length in (1 << 62, 99_999_999, 0):
        make = models.safetensors(big, 6 << 30, length)
        yield Attempt("safetensors", f"a header of {length} bytes", make, loads)
    yield Attempt("checkpoints", "a good one", models.checkpoint(lambda state: None), loads, "read")
    yield Attempt("configs", "a good one", models.model(), loads, "read")


def meanwhile():
    """Files that grow, shrink, are replaced or go while they are converted."""
    changes = {
        "grows": lambda path: path.open("a").write("5\n"),
        "shrinks": lambda path: os.truncate(path, path.stat().st_size // 2),
        "is replaced": lambda path: (
            shutil.copy(path, path.with_suffix(".new")) and path.with_suffix(".new").replace(path)
        ),
        "is rewritten": lambda path: path.write_text(path.read_text().replace("5\n", "6\n", 1)),
        "goes": lambda path: path.unlink(),
    }
    for name, change in changes.items():
        for is_folder in (False, True):
            where = "in a folder" if is_folder else "alone"
            yield Attempt("meanwhile", f"a file {name}, {where}", _frames(is_folder), _converts(change))


def _frames(is_folder):
    def make(folder):
        comments = [f"Properties={files.made.COLUMNS} energy={{energy}}"] * 3
        source = folder / "source"
        source.mkdir()
        for name in ("a.xyz", "b.xyz")[: 1 + is_folder]:
            (source / name).write_text(files.made.xyz_text(comments) * 100)
        return source if is_folder else source / "a.xyz"

    return make


def _converts(change):
    """Return what converts a source that changes while its first shard is read; nothing of it may be stored."""

    def use(path):
        dest = path.parent / "store"
        seen = []

        def progress(done, _total):
            if done and not seen:
                seen.append(done)
                change(path / "b.xyz" if path.is_dir() else path)

        try:
            convert(path, dest, format="ase", split="train", shard_size=150, progress=progress)
        finally:
            if list(dest.glob("*/dataset.json")) + list(dest.glob("*/shard-*.lmdb")):
                os._exit(9)

    return use


def all_attempts():
    for make in (special_files, bombs, sizes, other_files, configs, checkpoints, meanwhile):
        yield from make()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="the part that tests run")
    parser.add_argument("--quiet", action="store_true", help="failures and the table alone")
    parser.add_argument("kinds", nargs="*", help="special files, bombs, ...; default: all")
    options = parser.parse_args()
    chosen = [a for a in all_attempts() if (a.short or not options.short) and a.kind in (options.kinds or [a.kind])]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    models.weights()
    start = time.perf_counter()
    counts, failures = attack(chosen, None if options.quiet else sys.stdout)
    sys.stdout.write("\n".join([*failures, "", f"{'kind':16}{'attempts':>9}  outcome"]) + "\n")
    for kind, outcomes in counts.items():
        text = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        sys.stdout.write(f"{kind:16}{sum(outcomes.values()):9}  {text}\n")
    sys.stdout.write(f"{len(chosen)} attempts, {len(failures)} failures, {time.perf_counter() - start:.0f} s\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
