"""Download the files that the catalogue lists, continue downloads that broke off, and check hashes."""

import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

from ejmp.catalog import RemoteFile

_CHUNK = 1 << 20
"""Bytes read at a time."""
_TIMEOUT = 60
"""Seconds without an answer after which a server counts as unreachable."""
_PARTIAL_CONTENT = 206
_RANGE_NOT_SATISFIABLE = 416


def fetch(remote: RemoteFile, folder: str | Path, progress: Callable[[int, int | None], None] | None = None) -> Path:
    """Download a file and check its hash. A complete file is kept, and a broken download (`NAME.part`) continued.

    Args:
        remote: the file to download.
        folder: the folder to put it in.
        progress: called with the number of bytes that are there and of all; None if the server does not say how many.

    Returns:
        The path of the file.

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
    """Append what is missing to a partial file, or begin anew if the server sends the whole file."""
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
