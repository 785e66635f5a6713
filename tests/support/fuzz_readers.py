"""Feed damaged sources to every reader: `PYTHONPATH=tests python -m support.fuzz_readers EXAMPLES`, or `make fuzz`.

Small valid sources are cut, overwritten, and added to. A reader may yield structures, or raise ValueError or OSError;
anything else is a failure, and so is an input that takes SECONDS or MEMORY. A failure is printed with its input by
hypothesis; one that ends the process leaves it in the folder that is printed first.
"""

import argparse
import resource
import shutil
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch  # noqa: F401, before its first use is timed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ejmp.data import read
from ejmp.data.readers.hdf5 import ANI1X_LAYOUT, SPICE_LAYOUT, TRANSITION1X_LAYOUT
from ejmp.data.readers.md import MD22_LAYOUT, RMD17_LAYOUT
from ejmp.data.readers.unpickle import fields, loads
from support import data_sources as made

SECONDS = 20
MEMORY = 1 << 20
"""Most memory that an input may add to that before the first one, KiB."""
TOKENS = (
    b"", b"\n", b" ", b",", b"\0", b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\0" * 16, b"-1", b"0", b"99999999999999999999",
    b"1e999", b"nan", b"NaN", b"inf", b"null", b"[]", b"{}", b"X", b"H", b"*^", b"_JSON {", b"\xe2\x82\xac", b"c", b"R",
)  # fmt: skip
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "insert", "delete", "cut", "repeat", "bit"]),
        st.integers(0, 1 << 16),
        st.sampled_from(TOKENS) | st.binary(max_size=9),
        st.integers(0, 64),
    ),
    min_size=1,
    max_size=4,
)


def _ase(ending):
    def write(path):
        import ase.io

        ase.io.write(path / f"a{ending}", made.ase_frames()[: 1 if ending in (".cif", ".vasp") else None])

    return write


def _ase_database(path):
    import ase.db

    with ase.db.connect(path / "a.db") as database:
        for atoms in made.ase_frames():
            database.write(atoms, gap=1.5, data={"dipole": 0.25})


def _qmof_csv(path):
    _ase(".cif")(path)
    (path / "gaps.csv").write_text("qmof_id,BG_PBE\na,1.5\n")


def _qm9_tar(path):
    folder = path / "raw"
    folder.mkdir()
    made.write_qm9_tar(path / "a.tar", made.write_qm9_raw(folder), "w")
    shutil.rmtree(folder)


H5_GROUPS = ["train/C1H3O1/rxn0", "train/C1H3O1/rxn1"]
WRITERS = {
    "oc20": [made.write_oc],
    "oc22": [made.write_oc],
    "oc20_text": [made.write_oc20_text, lambda path: made.write_oc20_text(path, packed=False)],
    "ani1x": [lambda path: made.write_hdf5(path / "a.h5", ANI1X_LAYOUT, H5_GROUPS)],
    "transition1x": [lambda path: made.write_hdf5(path / "a.h5", TRANSITION1X_LAYOUT, H5_GROUPS)],
    "spice": [lambda path: made.write_hdf5(path / "a.h5", SPICE_LAYOUT, H5_GROUPS)],
    "rmd17": [lambda path: made.write_npz(path / "a.npz", RMD17_LAYOUT)],
    "md22": [
        lambda path: made.write_npz(path / "a.npz", MD22_LAYOUT),
        lambda path: made.write_md22_xyz(path / "a.xyz"),
    ],
    "qm9": [
        lambda path: made.write_qm9_raw(path, [1]),
        _qm9_tar,
        lambda path: made.write_qm9_pt(path / "a.pt"),
        lambda path: made.write_qm9_pt(path / "a.pt", "1.x", "joined"),
    ],
    "qmof": [made.write_qmof_json, _qmof_csv],
    "ase": [*map(_ase, (".extxyz", ".traj", ".cif", ".vasp")), _ase_database],
}
ONE_FILE = (".h5", ".tar", ".pt")


def damage(content, changes):
    """Return a source with changes at bytes that are not zero, because some formats have long runs of zeros."""
    content = bytearray(content)
    for kind, at, data, size in changes:
        full = [k for k, value in enumerate(content) if value] if len(content) < 1 << 15 else range(len(content))
        at = full[at % len(full)] if full else 0
        if kind == "overwrite":
            content[at : at + len(data)] = data
        elif kind == "insert":
            content[at:at] = data
        elif kind == "delete":
            del content[at : at + size]
        elif kind == "cut":
            del content[at:]
        elif kind == "repeat":
            content[at:at] = content[at : at + size]
        elif content:
            content[at] ^= 1 << size % 8
    return bytes(content)


def fuzz(name, examples, folder):
    """Read damaged sources of one format; return how many were read completely, and how many refused."""
    sources = []
    for k, write in enumerate(WRITERS[name]):
        place = folder / f"{name}-{k}"
        place.mkdir()
        write(place)
        sources += [(place, file.name, file.read_bytes()) for file in sorted(place.iterdir())]
    counts = {"read": 0, "refused": 0}
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + MEMORY

    @settings(
        max_examples=examples,
        deadline=timedelta(seconds=SECONDS),
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, len(sources) - 1), CHANGES, st.booleans() | st.binary(max_size=200))
    def run(which, changes, other):
        place, file, good = sources[which]
        (place / file).write_bytes(other if isinstance(other, bytes) else damage(good, changes))
        source = place / file if file.endswith(ONE_FILE) else place
        try:
            for _ in read(source, format=name):
                pass
            counts["read"] += 1
        except (ValueError, OSError):
            counts["refused"] += 1
        finally:
            (place / file).write_bytes(good)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < most

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run()
    return counts


def fuzz_unpickle(examples):
    """Read damaged records of both layouts of PyG, as pickles without a file around them."""
    records = [made.oc_record(0, layout, protocol) for layout in ("1.x", "2.x") for protocol in (2, 4, 5)]
    counts = {"read": 0, "refused": 0}

    @settings(max_examples=examples, deadline=timedelta(seconds=SECONDS), database=None)
    @given(st.sampled_from(records), CHANGES)
    def run(record, changes):
        try:
            fields(loads(damage(record, changes)))
            counts["read"] += 1
        except ValueError:
            counts["refused"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run()
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("examples", type=int)
    parser.add_argument("formats", nargs="*", default=[*WRITERS, "unpickle"])
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))
    folder = Path(tempfile.mkdtemp())
    sys.stdout.write(f"{folder}\n")
    for name in options.formats:
        start = time.perf_counter()
        counts = fuzz_unpickle(options.examples) if name == "unpickle" else fuzz(name, options.examples, folder)
        sys.stdout.write(f"{name}: {counts['read']} read, {counts['refused']} refused, ")
        sys.stdout.write(f"{time.perf_counter() - start:.0f} s\n")
        sys.stdout.flush()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
