"""A side of a comparison: the code of a commit or of a folder, laid out and built apart from everything else.

Sides live in a temporary folder of the comparison, which goes when the comparison ends. A comparison that was killed
leaves its folder, and the next one removes it: the name says which process it belonged to, and a lock whether that one
still lives. Built extensions and environments are kept in `ejmp_kernels.cache.cache_root()`.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ejmp.lock import locked
from ejmp_kernels.cache import cache_root

PREFIX = "ejmp-compare-"
"""How names of temporary folders of comparisons begin; the number of the process follows."""
LOCK = "lock"
PINNED_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "MALLOC_MMAP_MAX_": "0",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Settings of the C library with which memory, once used, stays with a process, on huge pages."""
Report = Callable[[str], None]
"""Called with a line about what is happening."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """Code that is ready to be measured."""

    name: str
    """What the user called it."""
    root: Path
    """Folder with its files and, if it could be built, its extension."""
    commit: str
    """Commit of the files, or "none" for a folder that is not under git."""
    dirty: bool
    """Whether files differ from the commit."""
    python: str
    """Interpreter that runs it."""
    why_no_extension: str | None
    """Why its C++ extension is not there; None if it is."""

    def environment(self) -> dict[str, str]:
        """Return the variables of a process that runs this side's code with the pinned allocator."""
        path = os.pathsep.join([str(self.root), str(self.root / "kernels")])
        return os.environ | PINNED_ALLOCATOR | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """Give a temporary folder for a comparison; it is removed at the end, also after SIGTERM and SIGHUP."""
    reap()
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    with (folder / LOCK).open("w") as lock, _signals_end_it():
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _signals_end_it() -> Iterator[None]:
    """Let signals that would end the process at once end it by SystemExit, so that everything is put away."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    except ValueError:  # not in the main thread, which alone may do this
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def reap() -> list[Path]:
    """Remove the folders of comparisons whose process is gone, and return them."""
    gone = [folder for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*") if _is_left_over(folder)]
    for folder in gone:
        shutil.rmtree(folder, ignore_errors=True)
    return gone


def _is_left_over(folder: Path) -> bool:
    number = folder.name.removeprefix(PREFIX).partition("-")[0]
    if not number.isdigit() or _is_alive(int(number)):
        return False
    try:
        with (folder / LOCK).open() as lock:  # a process of another container has a number that is not known here
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def prepare(name: str, folder: Path, repository: Path, report: Report) -> Side:
    """Lay out and build a side.

    Args:
        name: a folder with a checkout, or whatever git takes as a commit.
        folder: where the files go; it must not exist yet.
        repository: the checkout whose commits are meant, and whose requirements this interpreter has.
        report: called with a line about what is happening.

    Raises:
        ValueError: if there is neither such a folder nor such a commit.
        RuntimeError: if an environment that the side needs cannot be made.
    """
    if (Path(name) / "pyproject.toml").is_file():
        commit, dirty = copy_checkout(Path(name), folder)
    else:
        commit, dirty = check_out(name, folder, repository), False
    python = sys.executable
    if requirements(folder) != requirements(repository):
        python = _environment(requirements(folder), name, report)
    why = _build(folder, python, name, report)
    return Side(name=name, root=folder, commit=commit, dirty=dirty, python=python, why_no_extension=why)


def _git(repository: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(repository), *words], capture_output=True, check=False)  # noqa: S603, S607


def check_out(name: str, folder: Path, repository: Path) -> str:
    """Write the files of a commit into a folder, without a trace in the repository, and return its hash."""
    found = _git(repository, "rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}")
    if found.returncode:
        raise ValueError(f"{name}: expected a commit of {repository}, or a folder with pyproject.toml")
    commit = found.stdout.decode().strip()
    folder.mkdir(parents=True)
    archive = _git(repository, "archive", "--format=tar", commit)
    if archive.returncode:
        raise ValueError(f"{name}: git archive failed: {archive.stderr.decode(errors='replace').strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)  # noqa: S603, S607
    return commit


def copy_checkout(source: Path, folder: Path) -> tuple[str, bool]:
    """Copy a checkout's files, but not what git ignores; return its commit and whether files differ from it."""
    listed = _git(source, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed.returncode:
        ignore = shutil.ignore_patterns(".git", ".venv", "build", "*.so", "__pycache__", "results", "runs")
        shutil.copytree(source, folder, ignore=ignore)
        return "none", True
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (source / name).is_file():  # a deleted file is still listed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, folder / name)
    commit = _git(source, "rev-parse", "HEAD").stdout.decode().strip() or "none"
    return commit, bool(_git(source, "status", "--porcelain").stdout.strip())


@functools.cache
def requirements(root: Path) -> tuple[str, ...]:
    """Return what pyproject.toml says a checkout needs to run and to be built."""
    with (root / "pyproject.toml").open("rb") as file:
        project: dict[str, Any] = tomllib.load(file)
    return tuple(sorted({*project["project"]["dependencies"], *project["build-system"]["requires"]}))


def _environment(needed: tuple[str, ...], name: str, report: Report) -> str:
    """Return the interpreter of an environment with these requirements, which is made once and kept."""
    key = hashlib.sha256("\n".join((sys.version, *needed)).encode()).hexdigest()[:16]
    folder = cache_root() / "environments" / key
    python = str(folder / "bin" / "python")
    with locked(folder.with_suffix(".lock"), wait=True):
        if not (folder / "complete").exists():
            report(f"{name} needs other packages than this interpreter has: making {folder} with {', '.join(needed)}")
            shutil.rmtree(folder, ignore_errors=True)
            for command in ([sys.executable, "-m", "venv", str(folder)], [python, "-m", "pip", "install", *needed]):
                done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
                if done.returncode:
                    raise RuntimeError(f"{name}: {' '.join(command[:4])} failed: {done.stderr.strip()[-500:]}")
            (folder / "complete").touch()
    return python


def extension_key(root: Path, torch_version: str) -> str:
    """Return a hash of everything the C++ extension is made of."""
    made = hashlib.sha256(
        f"{torch_version} {platform.machine()} {os.environ.get('CXX')} {os.environ.get('CXXFLAGS')}".encode()
    )
    for path in sorted([*root.glob("csrc/**/*"), root / "setup.py"]):
        if path.is_file():
            made.update(f"\n{path.relative_to(root)}\n".encode() + path.read_bytes())
    return made.hexdigest()[:16]


def _build(root: Path, python: str, name: str, report: Report) -> str | None:
    """Put the C++ extension of a side beside its kernels, from the cache if it was built before; or say why not."""
    asked = [python, "-c", "import importlib.metadata as m; print(m.version('torch'))"]
    version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    kept = cache_root() / "extensions" / extension_key(root, version) / "_C.so"
    place = root / "kernels" / "ejmp_kernels" / kept.name
    with locked(kept.parent.with_suffix(".lock"), wait=True):
        if not kept.exists():
            report(f"{name}: building the C++ extension, minutes; it is kept in {kept.parent}")
            environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            command = [python, "setup.py", "--quiet", "build_ext", "--inplace", "--force"]
            done = subprocess.run(  # noqa: S603
                command, cwd=root, env=environment, capture_output=True, text=True, check=False
            )
            if not place.exists():
                return f"it was not built: {(done.stderr or done.stdout).strip()[-500:]}"
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(".part")
            shutil.copy2(place, part)
            part.replace(kept)
    shutil.copy2(kept, place)
    return None
