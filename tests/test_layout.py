"""How the project is laid out: what imports what, how long files are, how light `import ejmp` is."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"ase", "lmdb", "deepspeed", "fvcore", "h5py", "mpi4py", "matplotlib", "pooch", "rich", "safetensors", "scipy"}
# Each module may import those before it, not those after it, but for what a method hands over to when it is called.
CALLED = {"model": {"compiled"}}
ORDER = (
    "graph", "config", "structure", "build", "backend", "layers", "geometry", "bases", "interactions", "fused",
    "padding", "model", "compiled", "scaling", "pruning", "checkpoint", "flops", "workloads", "cards", "machine",
    "bench", "profile", "profile_report", "report", "doctor", "relevance", "data.formats", "data.info", "data.units",
    "data.source", "data.pickle_names", "data.unpickle",
    "data.lmdb_pages", "data.oc", "data.xyz", "data.ase_files", "data.oc_text", "data.hdf5", "data.md", "data.qm9",
    "data.qmof", "data.read", "data.record", "data.durable", "data.shard", "data.manifest", "data.store",
    "data.splits", "data.stats", "data.ranks", "data.convert", "data.describe", "data.fetch", "data.permutation",
    "data.balance", "data.mix", "data.batch", "data.loader", "data.embedded", "data", "data.cli", "data.generate",
    "data.generate.thermal", "data.generate.labels", "data.generate.molecules", "data.generate.paths",
    "data.generate.slabs", "data.generate.frameworks", "data.generate.recipes", "data.generate.write",
    "data.generate.__main__", "train", "train.config", "train.flags", "train.task", "train.loss", "train.metrics",
    "train.schedule", "train.ema", "train.groups", "distill", "train.distributed", "train.faults", "train.engine",
    "train.randomness", "train.moments", "train.checkpoint", "train.dropout", "train.sources", "train.survey",
    "train.objective", "train.adapt", "train.logs", "train.evaluate", "train.loop", "train.demo", "train.commands",
    "train.main", "cli",
)  # fmt: skip


SOURCES = sorted(p for part in ("ejmp", "kernels", "benchmarks", "tests") for p in (ROOT / part).rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_run_one_way():
    paths = {path.relative_to(ROOT / "ejmp").with_suffix(""): path for path in (ROOT / "ejmp").rglob("*.py")}
    modules = {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}
    del modules["__init__"]
    assert set(modules) == set(ORDER)
    for name, path in modules.items():
        used = {module.removeprefix("ejmp.") for module in imports(path) if module.startswith("ejmp.")} & set(ORDER)
        late = {other for other in used if ORDER.index(other) >= ORDER.index(name)} - CALLED.get(name, set())
        assert not late, f"ejmp/{name}.py imports {late}"
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not {m.split(".")[0] for m in imports(path)} & (HEAVY | {"ejmp"}), path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


def test_import_is_light():
    """Best of three of the time `import ejmp` adds to `import torch`, and nothing optional comes with it."""
    code = (
        "import sys, time, json, torch, numpy; t = time.perf_counter(); import ejmp; "
        "print(json.dumps([time.perf_counter() - t, sorted(m.split('.')[0] for m in sys.modules)]))"
    )
    seconds = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        took, loaded = json.loads(run.stdout)
        seconds.append(took)
        assert not HEAVY & set(loaded)
    assert min(seconds) < 0.5
