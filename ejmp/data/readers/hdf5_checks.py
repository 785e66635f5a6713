"""What an HDF5 file may not do: take its numbers from other files, or announce more of them than it stores."""

import math
import zlib
from pathlib import Path
from typing import Any

from ejmp.data.readers.files import import_optional
from ejmp.limits import check_unpacked

_COMPRESSIONS = {1: "gzip", 4: "szip", 32000: "lzf"}
"""Filters that make a chunk smaller, by their numbers in HDF5."""
_INFLATES = 1032
"""Most bytes that gzip makes of one."""
_HARMLESS = 256 << 20
"""Bytes that one chunk may be unpacked to without a look at it first."""


def check_links(file: Any) -> None:
    """Refuse a file of which any link leads to another file.

    Raises:
        ValueError: naming the link, and where it leads.
    """
    h5l = import_optional("h5py").h5l

    def visit(name: bytes, link: Any) -> tuple[bytes, Any] | None:
        return None if link.type in (h5l.TYPE_HARD, h5l.TYPE_SOFT) else (name, link)

    found = file.id.links.visit(visit, info=True)
    if found is not None:
        name, link = found
        is_external = link.type == h5l.TYPE_EXTERNAL
        where = file.id.links.get_val(name)[0] if is_external else b"a kind of link that is not known"
        raise ValueError(f"{_text(name)} is a link into another file, {_text(where)}: copy what it leads to")


def inside(group: Any, name: str) -> Any:
    """Return an item of a group, whose numbers must be in the same file, without reading them.

    Raises:
        ValueError: if there is no such item, or its numbers are elsewhere.
    """
    h5l = import_optional("h5py").h5l
    links, key = group.id.links, name.encode()
    if not links.exists(key):
        raise ValueError(f"no {name}; it has {', '.join(sorted(group))[:200]}")
    if links.get_info(key).type not in (h5l.TYPE_HARD, h5l.TYPE_SOFT):
        raise ValueError(f"{name} is a link into another file")
    item = group[name]
    if getattr(item, "is_virtual", False):
        raise ValueError(f"{name} is a virtual dataset, whose numbers are in other files: copy them into one")
    if getattr(item, "external", None):
        raise ValueError(f"the numbers of {name} are in another file, {item.external[0][0]}: copy them into one")
    return item


def check_stored(source: Path, array: Any) -> int:
    """Return how many bytes the numbers of an array are, after checking that its chunks do not unpack to more.

    Raises:
        LimitError: if a chunk unpacks to more than `unpacked_ratio` allows.
        ValueError: if a chunk holds more than it announces.
    """
    size = math.prod(array.shape) * array.dtype.itemsize
    if array.chunks is None:
        return size
    settings = array.id.get_create_plist()
    filters = [settings.get_filter(k)[0] for k in range(settings.get_nfilters())]
    used = [_COMPRESSIONS[number] for number in filters if number in _COMPRESSIONS]
    if len(used) > 1:
        raise ValueError(f"{array.name}: compressed several times, by {', '.join(used)}")
    announced = math.prod(array.chunks) * array.dtype.itemsize
    chunks: list[Any] = []
    array.id.chunk_iter(chunks.append)
    for chunk in chunks:
        check_unpacked(source, announced, chunk.size, f"a chunk of {array.name}")
        if chunk.size > announced + announced // 64 + 4096:
            raise ValueError(f"{array.name}: a chunk of {announced} bytes is stored in {chunk.size}")
        if used == ["gzip"] and chunk.size * _INFLATES > _HARMLESS and not chunk.filter_mask:
            packed = array.id.read_direct_chunk(chunk.chunk_offset)[1]
            if len(zlib.decompressobj().decompress(packed, announced + 1)) > announced:
                raise ValueError(f"{array.name}: a chunk of {announced} bytes unpacks to more")
    return size


def _text(name: bytes | str) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name
