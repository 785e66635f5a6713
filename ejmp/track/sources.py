"""Which files make a benchmark, and a hash of them: what has the same hash on both sides cannot have become slower."""

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

OWNERS = {
    "triplet": {"triplet"},
    "quadruplet": {"quadruplet"},
    "pair": {"pair"},
    "radial": {"radial"},
    "neighbors": {"neighbors"},
    "sums": {"sums"},
    "edge": {"edge_embedding"},
    "activation": {"activation", "dense"},
    "gemm": {"gemm", "linear", "dense"},
    "dense": {"sums", "edge_embedding", "activation", "linear", "dense"},
}
"""Modules of ejmp_kernels that a file of csrc/ or of the Triton kernels belongs to, by the first word of its name; a
file with another first word belongs to all."""
KERNELS = "kernels/ejmp_kernels"


def op_modules(benchmarks: Path) -> dict[str, tuple[str, ...]]:
    """Return the modules of ejmp_kernels that hold each op, from the table in op_cases.py.

    Raises:
        ValueError: if the file has no such table.
    """
    path = benchmarks / "op_cases.py"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "MODULES":
            return ast.literal_eval(node.value)
    raise ValueError(f"{path}: expected a table MODULES")


@functools.cache
def _imported(path: Path) -> frozenset[str]:
    """Return the modules of ejmp_kernels that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "ejmp_kernels":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ejmp_kernels."):
            found.add(str(node.module).split(".")[1])
    return frozenset(found)


def _closure(root: Path, modules: Iterable[str]) -> set[str]:
    """Return modules with all that they import, as far as there is a file of theirs."""
    left, found = list(modules), set()
    while left:
        name = left.pop()
        path = root / KERNELS / f"{name}.py"
        if name not in found and path.exists():
            found.add(name)
            left += _imported(path)
    return found


def files_of(root: Path, case: str, modules: dict[str, tuple[str, ...]]) -> list[Path]:
    """Return the files of a checkout that make a benchmark.

    Args:
        root: the checkout.
        case: name of the benchmark, such as "pair/forward", "model/6-blocks", "graph/build", "machine/product".
        modules: of each op, from `op_modules`.

    Raises:
        ValueError: if there is no such kind of benchmark.
    """
    what = case.partition("/")[0]
    folders: list[str] = []
    if what == "machine":
        return []
    if what == "model":
        folders, used = ["ejmp/model", "ejmp/graph", KERNELS], {name for names in OWNERS.values() for name in names}
    elif what == "graph":
        folders, used = ["ejmp/graph"], _closure(root, ["neighbors"])
    elif what in modules:
        used = _closure(root, modules[what])
    else:
        raise ValueError(f"case: expected model, graph, machine or one of {', '.join(modules)}, got {case}")
    found = {root / KERNELS / f"{name}.py" for name in used}
    found |= {path for folder in folders for path in (root / folder).rglob("*.py")}
    compiled = [*(root / "csrc").rglob("*"), *(root / KERNELS / "triton_kernels").glob("*")]
    found |= {path for path in compiled if OWNERS.get(path.stem.split("_")[0], used) & used}
    return sorted(path for path in (*found, root / "setup.py") if path.is_file())


def source_hash(root: Path, case: str, modules: dict[str, tuple[str, ...]]) -> str:
    """Return a hash of the files that make a benchmark, and of their names; arguments as for `files_of`."""
    made = hashlib.sha256()
    for path in files_of(root, case, modules):
        made.update(f"\n{path.relative_to(root)}\n".encode() + path.read_bytes())
    return made.hexdigest()[:16]
