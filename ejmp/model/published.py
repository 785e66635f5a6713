"""Models by name: checkpoints that others publish, and repositories of the Hugging Face hub."""

import difflib
import hashlib
import importlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ejmp.catalog import RemoteFile
from ejmp.fetch import fetch
from ejmp_kernels.cache import cache_root

_JMP = "https://jmp-iclr-datasets.s3.amazonaws.com"
_OC = "https://dl.fbaipublicfiles.com/opencatalystproject/models"
_JMP_LICENCE, _OC_LICENCE = "CC-BY-NC", "CC-BY-4.0"
_HUB = re.compile(r"hf://?(?P<repo>[^/@]+/[^/@]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>.+))?")
"""An address on the hub; with one slash, it has been a `pathlib.Path` in between."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A checkpoint that its authors publish."""

    name: str
    """Name under which they publish it."""
    url: str
    """Address of the file."""
    licence: str
    """Licence of the weights, or where none is stated for them, that of the data they were trained on."""

    @property
    def path(self) -> Path:
        """The file in ejmp's cache."""
        return cache_root() / "models" / f"{self.name.lower().replace('->', '-to-')}.pt"


_ROWS = (
    ("jmp-l", f"{_JMP}/jmp-l.pt", _JMP_LICENCE),
    ("jmp-s", f"{_JMP}/jmp-s.pt", _JMP_LICENCE),
    ("GemNet-OC-S2EF-OC20-2M", f"{_OC}/2022_07/s2ef/gemnet_oc_base_s2ef_2M.pt", _OC_LICENCE),
    ("GemNet-OC-S2EF-OC20-All", f"{_OC}/2022_07/s2ef/gemnet_oc_base_s2ef_all.pt", _OC_LICENCE),
    ("GemNet-OC-S2EF-OC20-All+MD", f"{_OC}/2023_03/s2ef/gemnet_oc_base_s2ef_all_md.pt", _OC_LICENCE),
    ("GemNet-OC-Large-S2EF-OC20-All+MD", f"{_OC}/2022_07/s2ef/gemnet_oc_large_s2ef_all_md.pt", _OC_LICENCE),
    ("GemNet-OC-S2EFS-OC22", f"{_OC}/2022_09/oc22/s2ef/gnoc_oc22_all_s2ef.pt", _OC_LICENCE),
    ("GemNet-OC-S2EFS-OC20+OC22", f"{_OC}/2022_09/oc22/s2ef/gnoc_oc22_oc20_all_s2ef.pt", _OC_LICENCE),
    ("GemNet-OC-S2EFS-nsn-OC20+OC22", f"{_OC}/2023_05/oc22/s2ef/gnoc_oc22_oc20_all_s2ef.pt", _OC_LICENCE),
    ("GemNet-OC-S2EFS-OC20->OC22", f"{_OC}/2022_09/oc22/s2ef/gnoc_finetune_all_s2ef.pt", _OC_LICENCE),
    (
        "GemNet-OC-S2EF-ODAC",
        "https://dl.fbaipublicfiles.com/dac/checkpoints_20231018/Gemnet-OC.pt",
        _OC_LICENCE,
    ),
)
PUBLISHED = {name.lower(): Published(name=name, url=url, licence=licence) for name, url, licence in _ROWS}
"""JMP's checkpoints and those of fairchem 1.x (names as in its list of models), by name in lower case."""


def resolve(path_or_name: str | os.PathLike[str]) -> Path:
    """Return the path of a model, downloaded if it is the name of one.

    A path that exists is returned as it is, whatever its name. Downloads say licence and address on stderr and stay in
    ejmp's cache, with the hash of the first one beside the file, which is checked every time.

    Args:
        path_or_name: a path; a name in `PUBLISHED`, such as "jmp-l", in upper or lower case; or
            "hf://OWNER/REPO[/FILE][@REVISION]" on the Hugging Face hub: FILE with the config.json and tasks.json beside
            it, or the model that `ejmp.save` wrote.

    Raises:
        FileNotFoundError: for something that is neither a path nor a name.
        OSError: if a download fails, with the URL to fetch by hand and where to put it.
        ModuleNotFoundError: if pooch (or huggingface_hub) is needed and not installed.
        ValueError: if the file's hash is not that of the first download.
    """
    text = os.fspath(path_or_name)
    path = Path(text)
    if path.exists():
        return path
    if match := _HUB.fullmatch(text):
        return _from_hub(match["repo"], match["file"], match["revision"])
    if text.lower() in PUBLISHED:
        return _published(PUBLISHED[text.lower()])
    if text.startswith("hf:"):
        raise ValueError(f"{text}: expected hf://OWNER/REPO, hf://OWNER/REPO/FILE or either with @REVISION")
    near = difflib.get_close_matches(text.lower(), PUBLISHED, 1, cutoff=0.7)
    guess = f"; is it {PUBLISHED[near[0]].name}?" if near else ""
    raise FileNotFoundError(f"{text}: there is no such file, and no published model of that name{guess}")


def _published(model: Published) -> Path:
    path = model.path
    if not path.exists():
        sys.stderr.write(f"ejmp: fetching {model.url} (licence {model.licence}) to {path}\n")
        fetch(RemoteFile(url=model.url, name=path.name), path.parent)
    _check_hash(path)
    return path


def _check_hash(path: Path) -> None:
    """Keep a file's hash beside it, or compare with the one that is there."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    kept = path.with_name(f"{path.name}.sha256")
    if not kept.exists():
        kept.write_text(f"{found}  {path.name}\n")
        return
    expected = kept.read_text().split()[0]
    if found != expected:
        raise ValueError(f"{path}: expected SHA-256 {expected}, as at first, got {found}; remove it to fetch it again")


def _from_hub(repo: str, file: str | None, revision: str | None) -> Path:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        text = f"hf://{repo}: {error}; pip install ejmp[hf] brings it"
        raise ModuleNotFoundError(text, name=error.name) from error
    folder = "" if file is None else file.rpartition("/")[0] + "/" * ("/" in file)
    wanted = [file or "model.safetensors", f"{folder}config.json", f"{folder}tasks.json"]
    try:
        found = Path(hub.snapshot_download(repo_id=repo, revision=revision, allow_patterns=wanted))
    except OSError as error:  # no network, no such repository, not allowed: the hub's errors are all of this kind
        url = f"https://huggingface.co/{repo}/tree/{revision or 'main'}"
        raise OSError(
            f"hf://{repo}: {' '.join(str(error).split())} Or fetch {', '.join(wanted)} from {url} and name the path"
        ) from error
    if not (found / wanted[0]).exists():
        raise FileNotFoundError(f"hf://{repo}: there is no {wanted[0]} at revision {revision or 'main'}")
    return found / file if file else found
