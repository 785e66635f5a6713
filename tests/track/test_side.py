"""Sides of a comparison: laid out apart, built once, and nothing left behind, however a comparison ends."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support.inputs import ROOT, environment

from ejmp.track import side

HOLD = """
import sys, time
from ejmp.track.side import workspace
with workspace() as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def repository(tmp_path):
    """A repository with two commits of a checkout in small."""
    root = tmp_path / "repository"
    root.mkdir()
    requires = '[build-system]\nrequires = ["setuptools"]\n'
    (root / "pyproject.toml").write_text(f'{requires}[project]\nname = "x"\ndependencies = ["torch"]\n')
    (root / ".gitignore").write_text("*.so\n")
    (root / "a.py").write_text("1\n")
    git = ["git", "-C", root, "-c", "user.name=x", "-c", "user.email=x@y"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    (root / "a.py").write_text("2\n")
    subprocess.run([*git, "commit", "-qam", "two"], check=True)
    return root


def test_a_commit_leaves_no_trace_in_its_repository(repository, tmp_path):
    commit = side.check_out("HEAD~1", tmp_path / "base", repository)
    assert len(commit) == 40
    assert (tmp_path / "base" / "a.py").read_text() == "1\n"
    listed = subprocess.run(["git", "-C", repository, "worktree", "list"], capture_output=True, text=True, check=True)  # noqa: S607
    assert len(listed.stdout.splitlines()) == 1
    with pytest.raises(ValueError, match="nowhere: expected a commit of"):
        side.check_out("nowhere", tmp_path / "no", repository)
    with pytest.raises(ValueError, match="--help: expected a commit of"):
        side.check_out("--help", tmp_path / "no", repository)


def test_a_folder_is_copied_as_it_is(repository, tmp_path):
    (repository / "a.py").write_text("3\n")
    (repository / "new.py").write_text("4\n")
    (repository / "ignored.so").write_text("5\n")
    commit, dirty = side.copy_checkout(repository, tmp_path / "head")
    assert dirty
    assert len(commit) == 40
    assert (tmp_path / "head" / "a.py").read_text() == "3\n"
    assert (tmp_path / "head" / "new.py").exists()
    assert not (tmp_path / "head" / "ignored.so").exists()


def test_the_extension_is_built_once(repository, tmp_path, monkeypatch):
    """A stand-in for setup.py counts how often it runs; another source is another extension."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = repository / "kernels" / "ejmp_kernels"
    place.mkdir(parents=True)
    (place / "__init__.py").touch()
    (repository / "csrc").mkdir()
    (repository / "csrc" / "x.h").write_text("1\n")
    build = (
        f"open({str(tmp_path / 'count')!r}, 'a').write('x'); open('kernels/ejmp_kernels/_C.so', 'w').write('made')\n"
    )
    (repository / "setup.py").write_text(build)
    made = []
    for text in ("1\n", "1\n", "2\n"):
        (repository / "csrc" / "x.h").write_text(text)
        found = side.prepare(str(repository), tmp_path / f"side{len(made)}", repository, lambda _line: None)
        made.append(found)
        assert found.why_no_extension is None
        assert (found.root / "kernels" / "ejmp_kernels" / "_C.so").read_text() == "made"
    assert (tmp_path / "count").read_text() == "xx"
    assert {one.python for one in made} == {sys.executable}
    (repository / "setup.py").write_text("raise SystemExit('no compiler')\n")
    found = side.prepare(str(repository), tmp_path / "last", repository, lambda _line: None)
    assert "no compiler" in found.why_no_extension


def test_requirements_of_this_checkout():
    assert any(word.startswith("torch") for word in side.requirements(ROOT))
    assert any(word.startswith("setuptools") for word in side.requirements(ROOT))


def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], env=environment(TMPDIR=str(tmp_path)), stdout=subprocess.PIPE, text=True
    )
    return process, tmp_path / process.stdout.readline().strip().rpartition("/")[2]


def test_a_comparison_that_is_ended_leaves_nothing(tmp_path):
    process, folder = holder(tmp_path)
    assert folder.is_dir()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert not folder.exists()


def test_what_a_killed_comparison_leaves_goes_with_the_next(tmp_path, monkeypatch):
    dead, left = holder(tmp_path)
    alive, kept = holder(tmp_path)
    dead.kill()
    dead.wait()
    assert left.is_dir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert side.reap() == [left]
    assert not left.exists()
    assert kept.is_dir()
    assert side.reap() == []
    alive.terminate()
    alive.wait()


def test_folders_of_others_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("ejmp-compare-notanumber", f"ejmp-compare-{os.getpid()}-x", "else"):
        (tmp_path / name).mkdir()
    assert side.reap() == []
    with side.workspace() as folder:
        assert side.reap() == []
        assert time.time() - folder.stat().st_mtime < 60
    assert not folder.exists()
