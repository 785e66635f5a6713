"""Where the datasets come from, and fetching them: licences known before, broken downloads continued, hashes checked.

Hashes and sizes are those the data's publishers state; where they state none, none is checked.
"""

import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20
_TIMEOUT = 60
_PARTIAL_CONTENT = 206
_RANGE_NOT_SATISFIABLE = 416
_OC = "https://dl.fbaipublicfiles.com/opencatalystproject/data"
_FIGSHARE = "https://figshare.com/ndownloader"
_MD22 = "http://www.quantum-machine.org/gdml/repo/datasets"


@dataclass(frozen=True, kw_only=True)
class Remote:
    """One file to download."""

    url: str
    name: str
    size: str = "not stated"
    hash: str | None = None
    """As pooch takes it, like "md5:..."; None where the publisher states none."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset to download."""

    format: str
    """What `ejmp data convert --format` calls it."""
    licence: str
    page: str
    files: tuple[Remote, ...]


def _oc20(name: str, size: str, md5: str) -> Source:
    file = Remote(url=f"{_OC}/{name}.tar", name=f"{name}.tar", size=size, hash=f"md5:{md5}")
    page = "https://fair-chem.github.io"
    return Source(format="oc20_text", licence="CC-BY-4.0", page=page, files=(file,))


_MD22_MOLECULES = (
    "Ac-Ala3-NHMe",
    "DHA",
    "stachyose",
    "AT-AT",
    "AT-AT-CG-CG",
    "buckyball-catcher",
    "double-walled_nanotube",
)
_CHECK = "not known to ejmp: see the page"
SOURCES: Mapping[str, Source] = {
    "oc20-200k": _oc20("s2ef_train_200K", "344 MB", "f8d0909c2623a393148435dede7d3a46"),
    "oc20-2m": _oc20("s2ef_train_2M", "3.4 GB", "953474cb93f0b08cdc523399f03f7c36"),
    "oc20-20m": _oc20("s2ef_train_20M", "34 GB", "863bc983245ffc0285305a1850e19cf7"),
    "oc20-all": _oc20("s2ef_train_all", "225 GB", "12a7087bfd189a06ccbec9bc7add2bcd"),
    "oc20-val-id": _oc20("s2ef_val_id", "1.7 GB", "f57f7f5c1302637940f2cc858e789410"),
    "oc22": Source(
        format="oc22",
        licence="CC-BY-4.0",
        page="https://fair-chem.github.io",
        files=(
            Remote(
                url=f"{_OC}/oc22/s2ef_total_train_val_test_lmdbs.tar.gz",
                name="s2ef_total_train_val_test_lmdbs.tar.gz",
                size="20 GB",
                hash="md5:ebea523c6f8d61248a37b4dd660b11e6",
            ),
        ),
    ),
    "ani1x": Source(
        format="ani1x",
        licence="CC0",
        page="https://doi.org/10.6084/m9.figshare.10047041.v1",
        files=(
            Remote(
                url=f"{_FIGSHARE}/files/18112775",
                name="ani1x-release.h5",
                size="5.6 GB",
                hash="md5:98090dd6679106da861f52bed825ffb7",
            ),
        ),
    ),
    "transition1x": Source(
        format="transition1x",
        licence=_CHECK,
        page="https://gitlab.com/matschreiner/Transition1x",
        files=(Remote(url=f"{_FIGSHARE}/files/36035789", name="Transition1x.h5", size="6.6 GB"),),
    ),
    "rmd17": Source(
        format="rmd17",
        licence="CC0",
        page="https://figshare.com/articles/dataset/Revised_MD17_dataset_rMD17_/12672038",
        files=(Remote(url=f"{_FIGSHARE}/files/23950376", name="rmd17.tar.bz2"),),
    ),
    "md22": Source(
        format="md22",
        licence=_CHECK,
        page="http://www.quantum-machine.org/gdml",
        files=tuple(Remote(url=f"{_MD22}/md22_{name}.npz", name=f"md22_{name}.npz") for name in _MD22_MOLECULES),
    ),
    "spice": Source(
        format="spice",
        licence=_CHECK,
        page="https://zenodo.org/records/8222043",
        files=(Remote(url="https://zenodo.org/records/8222043/files/SPICE-1.1.4.hdf5", name="SPICE-1.1.4.hdf5"),),
    ),
    "qm9": Source(
        format="qm9",
        licence="CC0",
        page="https://figshare.com/collections/_/978904",
        files=(
            Remote(
                url=f"{_FIGSHARE}/files/3195389",
                name="dsgdb9nsd.xyz.tar.bz2",
                size="86 MB",
                hash="md5:ad1ebd51ee7f5b3a6e32e974e5d54012",
            ),
            Remote(
                url=f"{_FIGSHARE}/files/3195404",
                name="uncharacterized.txt",
                size="0.5 MB",
                hash="md5:a361887bacb427b8a0ce7903d92a53b4",
            ),
        ),
    ),
    "qmof": Source(
        format="qmof",
        licence="CC-BY-4.0",
        page="https://figshare.com/articles/dataset/_/13147324",
        files=(Remote(url=f"{_FIGSHARE}/articles/13147324/versions/14", name="qmof.zip"),),
    ),
}


def fetch(remote: Remote, folder: str | Path, progress: Callable[[int, int | None], None] | None = None) -> Path:
    """Download a file, go on with one that broke off (`NAME.part`), and check its hash; keep one that is right.

    Args:
        remote: what to download.
        folder: where to put it.
        progress: is called with the bytes that are there and all, if the server says how many.

    Returns:
        the file.

    Raises:
        OSError: if the server cannot be reached or the connection breaks, with the URL to fetch by hand.
        ValueError: if the hash is wrong.
    """
    import pooch  # noqa: PLC0415

    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{remote.name}.part"

    def download(url: str, output_file: Any, _: Any) -> None:
        _download(url, partial, progress)
        partial.replace(output_file)

    pooch.get_logger().setLevel("WARNING")
    try:
        pooch.retrieve(
            remote.url,
            remote.hash,
            fname=remote.name,
            path=folder,
            downloader=download,  # pyright: ignore[reportArgumentType], pooch calls it as its documentation says
        )
    except (OSError, HTTPException) as error:
        by_hand = f"run it again to go on, or fetch {remote.url} by hand and put it at {folder / remote.name}"
        raise OSError(f"{remote.name}: {getattr(error, 'reason', error)}; {by_hand}") from error
    return folder / remote.name


def _download(url: str, partial: Path, progress: Callable[[int, int | None], None] | None) -> None:
    """Append to a partial file what is missing of it, or begin anew if the server sends all."""
    done = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})  # noqa: S310
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code == _RANGE_NOT_SATISFIABLE and error.headers.get("Content-Range") == f"bytes */{done}":
            return  # all of it is there
        raise
    with response:
        if response.status not in (200, _PARTIAL_CONTENT):
            raise OSError(f"the server answers with status {response.status}")
        done = done if response.status == _PARTIAL_CONTENT else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else done + int(length)
        with partial.open("ab" if done else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
    if total is not None and done != total:
        raise OSError(f"the connection broke after {done} of {total} bytes")
