"""Models by name: nothing here needs a network, and one test makes sure that there is none."""

import hashlib
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ejmp
from ejmp import cli
from ejmp.model import published
from ejmp.train.demo import demo_config


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ejmp" / "models"


@pytest.fixture
def saved(tmp_path):
    """A tiny model as ejmp.save writes it."""
    torch.manual_seed(0)
    ejmp.save(ejmp.JMP(demo_config(blocks=1)), tmp_path / "saved")
    return tmp_path / "saved"


def test_a_path_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("jmp-l").mkdir()
    assert published.resolve("jmp-l") == Path("jmp-l")
    assert published.resolve(tmp_path) == tmp_path


def test_names_have_files_of_their_own():
    paths = {model.path for model in published.PUBLISHED.values()}
    assert len(paths) == len(published.PUBLISHED) == 11
    assert all(re.fullmatch(r"[\w+.-]+\.pt", path.name) for path in paths)
    assert len({model.url for model in published.PUBLISHED.values()}) == 11


def test_fetched_once_with_its_licence(cache, monkeypatch, capsys):
    asked = []

    def fetch(remote, folder):
        folder.mkdir(parents=True)
        (folder / remote.name).write_bytes(b"weights")
        asked.append(remote.url)

    monkeypatch.setattr(published, "fetch", fetch)
    assert published.resolve("GemNet-OC-S2EFS-OC20->OC22") == cache / "gemnet-oc-s2efs-oc20-to-oc22.pt"
    assert "gnoc_finetune_all_s2ef.pt (licence CC-BY-4.0) to " in capsys.readouterr().err
    path = published.resolve("gemnet-oc-s2efs-oc20->oc22")
    assert len(asked) == 1
    assert capsys.readouterr().err == ""
    kept = path.with_name(f"{path.name}.sha256").read_text()
    assert kept == f"{hashlib.sha256(b'weights').hexdigest()}  {path.name}\n"
    path.write_bytes(b"weightz")
    with pytest.raises(ValueError, match=rf"{path.name}: expected SHA-256 {kept.split()[0]}, as at first, got"):
        published.resolve("gemnet-oc-s2efs-oc20->oc22")


def test_without_a_network(cache, monkeypatch, capsys):
    """The error says what to fetch and where to put it; a file put there is taken."""
    pytest.importorskip("pooch")

    def no_network(*_args, **_kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    url, path = "https://jmp-iclr-datasets.s3.amazonaws.com/jmp-l.pt", cache / "jmp-l.pt"
    with pytest.raises(OSError, match=rf"fetch {re.escape(url)} by hand and put it at {path}"):
        ejmp.load("jmp-l")
    assert f"fetching {url} (licence CC-BY-NC)" in capsys.readouterr().err
    path.write_bytes(b"by hand")
    assert published.resolve("jmp-l") == path


def test_unknown_names():
    with pytest.raises(FileNotFoundError, match=r"jmp-m: .* no published model of that name; is it jmp-"):
        ejmp.load("jmp-m")
    with pytest.raises(FileNotFoundError, match=r"runs/none: there is no such file"):
        ejmp.load("runs/none")
    with pytest.raises(ValueError, match="hf://one: expected hf://OWNER/REPO"):
        ejmp.load("hf://one")


@pytest.fixture
def hub(saved, monkeypatch):
    """A stand-in for huggingface_hub that has one repository, with the model at its root and in a folder."""
    (saved / "deep").mkdir()
    for name in ("model.safetensors", "config.json"):
        (saved / "deep" / name).write_bytes((saved / name).read_bytes())
    calls = []

    def snapshot_download(*, repo_id, revision, allow_patterns):
        if repo_id != "me/mine":
            raise OSError(f"no network\nfor {repo_id}.")
        calls.append((revision, allow_patterns))
        return str(saved)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    return calls


@pytest.mark.parametrize(
    ("address", "revision", "folder"),
    [
        ("hf://me/mine", None, ""),
        (Path("hf://me/mine@v1"), "v1", ""),
        ("hf://me/mine/deep/model.safetensors@v/2", "v/2", "deep/"),
    ],
)
def test_hub(hub, saved, address, revision, folder):
    model = ejmp.load(address)
    assert hub == [(revision, [f"{folder}{name}" for name in ("model.safetensors", "config.json", "tasks.json")])]
    expected = ejmp.load(saved).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.usefixtures("hub")
def test_errors_of_the_hub(monkeypatch):
    with pytest.raises(
        OSError, match=r"hf://me/other: no network for me/other\. Or fetch .* from https://hugging.*/main "
    ):
        ejmp.load("hf://me/other")
    with pytest.raises(FileNotFoundError, match=r"hf://me/mine: there is no none\.pt at revision main"):
        ejmp.load("hf://me/mine/none.pt")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install ejmp\[hf\]"):
        ejmp.load("hf://me/mine")


def test_missing_package_on_the_command_line(monkeypatch, capsys, tmp_path):
    """A message that names the extra gets no other one added."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli.main(["prune", "hf://me/mine", str(tmp_path / "out"), "--keep", "0"]) == 2
    error = capsys.readouterr().err
    assert "hf://me/mine: " in error
    assert re.findall(r"ejmp\[\w+\]", error) == ["ejmp[hf]"]
