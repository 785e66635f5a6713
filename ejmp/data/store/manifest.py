"""The file `dataset.json`, which says what a folder of shards holds.

It is written last: without it there is no dataset in the folder.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ejmp.data.info import SCHEMA_VERSION, DatasetInfo
from ejmp.data.store.durable import hash_text, written
from ejmp.data.store.shard import Shard
from ejmp.limits import RefusedFileError, read_whole

FILE_NAME = "dataset.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `dataset.json`."""

    info: DatasetInfo
    """What is known of the split as a whole."""
    shards: tuple[Shard, ...]
    """The shards, in the order of their structures."""
    index: Mapping[str, str]
    """Hash of each index file, by the file's name."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `dataset.json`, which makes the dataset visible."""
    contents = {"info": asdict(manifest.info), "shards": [asdict(shard) for shard in manifest.shards]}
    contents["index"] = dict(manifest.index)
    contents = json.loads(json.dumps(contents))
    contents["hash"] = hash_text(_canonical(contents))
    with written(folder / FILE_NAME) as temporary:
        temporary.write_text(json.dumps(contents, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read `dataset.json` of a folder.

    Raises:
        ValueError: if it is missing, damaged, or of another schema.
    """
    path = folder / FILE_NAME
    if not path.exists():
        splits = ", ".join(str(path.parent) for path in sorted(folder.glob(f"*/{FILE_NAME}")))
        if splits:
            raise ValueError(f"{folder}: no {FILE_NAME}: expected the folder of one split, one of {splits}")
        raise ValueError(f"{folder}: no {FILE_NAME}: not a dataset, or its conversion has not come to its end")
    try:
        contents = json.loads(read_whole(path, "manifest_bytes"))
        digest = contents.pop("hash")
        info = contents["info"]
        version = info["schema_version"]
    except RefusedFileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path}: expected schema_version {SCHEMA_VERSION}, got {version!r}")
    if hash_text(_canonical(contents)) != digest:
        raise ValueError(f"{path}: damaged: its hash does not match its contents")
    try:
        shards = tuple(Shard(**shard) for shard in contents["shards"])
        wrong = [shard.name for shard in shards if not _is_plain(shard)]
        if wrong:
            raise ValueError(f"shard {wrong[0]!r}: expected a name without folders, and numbers")  # noqa: TRY301
        return Manifest(info=DatasetInfo.from_json(info), shards=shards, index=contents["index"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged: {type(error).__name__}: {error}") from error


def _is_plain(shard: Shard) -> bool:
    """Return whether a shard is a file beside the manifest, and not one that a path leads to."""
    named = isinstance(shard.name, str) and Path(shard.name).name == shard.name
    return named and all(type(size) is int and size >= 0 for size in (shard.count, shard.bytes))


def _canonical(contents: dict[str, Any]) -> str:
    return json.dumps(contents, sort_keys=True, separators=(",", ":"))
