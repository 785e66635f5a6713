"""How the project is laid out: what imports what, how long files and functions are, how light `import ejmp` is."""

import ast
import functools
import json
import re
import subprocess
import sys

import pytest
from support.inputs import ROOT

HEAVY = {
    "ase",
    "lmdb",
    "deepspeed",
    "fvcore",
    "h5py",
    "mpi4py",
    "matplotlib",
    "pooch",
    "ruptures",
    "rich",
    "safetensors",
    "scipy",
    "torch_geometric",
    "torch_sim",
}
ORDER = (
    "limits",
    ("config_file", "cores", "lock", "markdown", "progress", "provenance"),
    "graph",
    "catalog",
    "fetch",
    ("model", "data"),
    "compress",
    "predict",
    ("pyg", "torchsim", "export"),
    "train",
    "measure",
    "track",
    "study",
    "cli",
)
"""The rooms of ejmp, each of which may import those before it; the kernels come before all of them."""
RANK = {room: i for i, rooms in enumerate(ORDER) for room in ((rooms,) if isinstance(rooms, str) else rooms)}
SOURCES = sorted(
    path for part in ("ejmp", "kernels", "benchmarks", "launch", "tests") for path in (ROOT / part).rglob("*.py")
)
OURS = [path for path in SOURCES if path.relative_to(ROOT).parts[0] != "tests"]
LONGEST_FUNCTION, LONGEST_FILE = 60, 400


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


def name_of(path):
    """The dotted name of a module below ejmp/."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in SOURCES if path.relative_to(ROOT).parts[0] == "ejmp"}


def imports(path):
    """Every module that a file imports, anywhere in it, and every name it takes from one."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(name):
    return {module for module in imports(MODULES[name]) if module in MODULES} - {name}


def room(name):
    return name.split(".")[1]


def test_every_package_is_a_room():
    assert {room(name) for name in MODULES if name != "ejmp"} == set(RANK)


def test_arrows_run_one_way():
    """Below `ejmp/__init__.py`, which gives the public names when they are first used."""
    backwards = [
        f"{name} imports {other}"
        for name in MODULES
        if name != "ejmp"
        for other in imported_modules(name) - {"ejmp"}
        if room(other) != room(name) and RANK[room(other)] >= RANK[room(name)]
    ]
    assert not backwards


def test_no_import_circle():
    """Whatever order modules are imported in, none meets itself again; a package's own names may be asked for."""
    left = {
        name: {other for other in imported_modules(name) if not name.startswith(f"{other}.")}
        for name in MODULES
        if name != "ejmp"
    }
    while left:
        free = [name for name, needs in left.items() if not needs & left.keys()]
        assert free, f"these import each other: {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


def test_kernels_know_nothing_of_ejmp():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not {module.split(".")[0] for module in imports(path)} & (HEAVY | {"ejmp"}), path


def test_tests_stand_alone():
    """No test imports another test file, and nothing bends the search path: what is shared is in tests/support."""
    for path in SOURCES:
        assert "sys.path.insert(" not in path.read_text().replace('"sys.path.insert("', ""), path
        assert not [module for module in imports(path) if re.search(r"(^|\.)(test_\w+|conftest)$", module)], path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


def functions():
    for path in OURS:
        if path.relative_to(ROOT).parts[0] != "kernels":
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield path, node


def test_functions_fit_on_a_screen():
    long = [f"{p}:{n.name}" for p, n in functions() if n.end_lineno - n.lineno + 1 > LONGEST_FUNCTION]
    assert not long


def docstrings(path):
    """All docstrings of a file, also those below the fields of a class and below constants."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for child in node.body:
                text = (
                    child.value.value if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant) else None
                )
                if isinstance(text, str):
                    yield child.lineno, text.strip()


def test_docstrings_say_what_they_are_about():
    """A docstring is a sentence about the thing itself, not a remark that hangs on the one before."""
    vague = re.compile(r"(Of |The same\b|Theirs\b|Do nothing\b|Do what\b)")
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in OURS
        for line, text in docstrings(path)
        if vague.match(text)
    ]
    assert not found


def test_no_banner_comments():
    banner = re.compile(r"^\s*# ?(-{3,}|={3,}|#{3,})", re.MULTILINE)
    assert not [path for path in SOURCES if banner.search(path.read_text())]


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
