"""What the tests of tracking share: records of made-up runs, and sides that need no build."""

import importlib.metadata
import shutil
import sys

from ejmp.track import side
from ejmp.track.schema import Record
from ejmp_kernels import availability
from support.inputs import ROOT, require_native

MACHINE = {"cpu": "EPYC 9R14", "cores": 2, "threads": 1, "device": "cpu", "torch": "2.13.0", "python": "3.11.7"}


def record(name="pair/forward", *, seconds=(1e-3, 1.1e-3, 1.2e-3), commit="abc1234", **fields):
    fields = {"suite": "quick", "machine": MACHINE, "date": "2026-11-26T20:00:00+00:00"} | fields
    return Record(name=name, seconds=seconds, commit=commit, **fields)


def give_extension(root):
    """Put this checkout's built extension where `side` looks for that of a side with the same sources."""
    require_native()
    kept = side.cache_root() / "extensions" / side.extension_key(root, importlib.metadata.version("torch")) / "_C.so"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(ROOT / "kernels" / "ejmp_kernels" / "_C.so", kept)


def ready_side(name, root):
    """A side made of a folder that is laid out already, with this checkout's extension."""
    assert availability.why_unavailable() is None
    shutil.copy2(ROOT / "kernels" / "ejmp_kernels" / "_C.so", root / "kernels" / "ejmp_kernels" / "_C.so")
    return side.Side(name=name, root=root, commit="none", dirty=False, python=sys.executable, why_no_extension=None)
