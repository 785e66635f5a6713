"""One structure as bytes: a header, raw little-endian arrays, and a hash over both. Reading one executes nothing.

    offset  size  header
         0     4  b"EJMR"
         4     2  version
         6     2  flags: which fields are there, and in which precision
         8     4  number of atoms n
        12     2  number of targets t
        14     2  length of the text
        16     8  number of the structure in its dataset
        24     8  BLAKE2b (64 bits) of everything but these 8 bytes

After it come, each only if there is one: energy f8, cell f8[3, 3], targets f8[t], positions and forces f8[n, 3] and
then those of the two that are f4[n, 3], so that all are aligned, numbers u1[n], tags u1[n], fixed u1[n], and the text:
the id and the targets' names, divided by NUL.
"""

import hashlib
import struct
from typing import Any

import numpy as np

from ejmp.graph.structure import MAX_ATOMIC_NUMBER, Structure

MAGIC = b"EJMR"
VERSION = 1
_HEAD = struct.Struct("<4sHHIHHQ")
_HASH_BYTES = 8
HEADER_BYTES = _HEAD.size + _HASH_BYTES
_ENERGY, _CELL, _FORCES, _TAGS, _FIXED = 1, 2, 4, 8, 16
_POSITIONS_32, _FORCES_32 = 32, 64
_PBC = (256, 512, 1024)
_ALL_FLAGS = 0b111_0111_1111


class DamagedRecord(ValueError):  # noqa: N818
    """A record, or the shard it should be in, is missing, cut off, or not what was written."""


def encode(structure: Structure, number: int = 0) -> bytes:
    """Turn a structure into a record.

    Args:
        structure: what to encode. Positions and forces in float32 stay float32; every other type becomes float64.
        number: the structure's number in its dataset, so that a record read from the wrong place is noticed.

    Raises:
        ValueError: naming the field, if one has the wrong shape or does not fit.
    """
    numbers = np.asarray(structure.numbers)
    n = len(numbers) if numbers.ndim == 1 else 0
    if n == 0 or numbers.dtype.kind not in "iu" or numbers.min() < 1 or numbers.max() > MAX_ATOMIC_NUMBER:
        raise ValueError(f"{structure.id}: numbers: expected integers [n] from 1 to {MAX_ATOMIC_NUMBER}, got {numbers}")
    flags, wide, narrow = _wide_and_narrow(structure, n)
    pbc = np.empty(3, bool)
    pbc[:] = structure.pbc
    flags |= sum(bit for bit, there in zip(_PBC, pbc.tolist(), strict=True) if there)
    small = [numbers.astype(np.uint8)]
    for name, bit, most in (("tags", _TAGS, 255), ("fixed", _FIXED, 1)):
        if getattr(structure, name) is not None:
            values = np.asarray(getattr(structure, name))
            if values.shape != (n,) or values.dtype.kind not in "biu" or values.min() < 0 or values.max() > most:
                raise ValueError(f"{structure.id}: {name}: expected integers [{n}] from 0 to {most}, got {values}")
            small.append(values.astype(np.uint8))
            flags |= bit
    text = _text(structure)
    head = _HEAD.pack(MAGIC, VERSION, flags, n, len(structure.targets), len(text), number)
    body = b"".join(part.tobytes() for part in (*wide, *narrow, *small)) + text
    return head + _hash(head, body) + body


def decode(data: bytes, number: int | None = None) -> Structure:
    """Turn a record back into the structure that was encoded.

    Args:
        data: a whole record.
        number: the number it should carry, if known.

    Returns:
        The structure: numbers and tags int64, fixed bool, pbc bool [3], all arrays writable.

    Raises:
        DamagedRecord: if the bytes are not exactly what `encode` wrote.
    """
    if len(data) < HEADER_BYTES or data[:4] != MAGIC:
        raise DamagedRecord(
            f"not a record: expected {MAGIC!r} and at least {HEADER_BYTES} bytes, got {len(data)} bytes"
        )
    _, version, flags, n, num_targets, text_bytes, carried = _HEAD.unpack_from(data)
    body = memoryview(data)[HEADER_BYTES:]
    if _hash(data[: _HEAD.size], body) != data[_HEAD.size : HEADER_BYTES]:
        raise DamagedRecord("the record's hash does not match its contents")
    if version != VERSION or flags & ~_ALL_FLAGS:
        raise DamagedRecord(f"record version {version}, flags {flags:#x}: this ejmp reads version {VERSION}")
    if number is not None and carried != number:
        raise DamagedRecord(f"expected the record of structure {number}, got that of structure {carried}")
    take = _ArrayTaker(bytearray(body))
    structure = _fields(take, flags, n, num_targets, text_bytes)
    if take.offset != len(body):
        raise DamagedRecord(f"expected {take.offset} bytes after the header, got {len(body)}")
    return structure


class _ArrayTaker:
    """Takes arrays from a buffer, one after the other."""

    def __init__(self, buffer: bytearray) -> None:
        self.buffer, self.offset = buffer, 0

    def __call__(self, kind: str, *shape: int) -> np.ndarray[Any, Any]:
        dtype, count = np.dtype(kind), int(np.prod(shape))
        if self.offset + count * dtype.itemsize > len(self.buffer):
            raise DamagedRecord("the record is shorter than its header says")
        array = np.frombuffer(self.buffer, dtype, count, self.offset).reshape(shape)
        self.offset += array.nbytes
        return array


def _fields(take: _ArrayTaker, flags: int, n: int, num_targets: int, text_bytes: int) -> Structure:
    energy = float(take("<f8", 1)[0]) if flags & _ENERGY else None
    cell = take("<f8", 3, 3) if flags & _CELL else None
    values = take("<f8", num_targets).tolist()
    arrays = {}
    for name in _order(flags):
        arrays[name] = take(_kind(flags, name), n, 3)
    numbers = take("u1", n).astype(np.int64)
    tags = take("u1", n).astype(np.int64) if flags & _TAGS else None
    fixed = take("u1", n).astype(bool) if flags & _FIXED else None
    name, *names = take("u1", text_bytes).tobytes().decode().split("\0")
    return Structure(
        numbers=numbers,
        positions=arrays["positions"],
        cell=cell,
        pbc=np.array([bool(flags & bit) for bit in _PBC]),
        tags=tags,
        fixed=fixed,
        energy=energy,
        forces=arrays.get("forces"),
        targets=dict(zip(names, values, strict=True)),
        id=name,
    )


def _kind(flags: int, name: str) -> str:
    return "<f4" if flags & (_POSITIONS_32 if name == "positions" else _FORCES_32) else "<f8"


def _order(flags: int) -> list[str]:
    """Return the names of positions and forces in the order of the record: float64 before float32."""
    names = ["positions", "forces"] if flags & _FORCES else ["positions"]
    return sorted(names, key=lambda name: _kind(flags, name) == "<f4")


def _wide_and_narrow(structure: Structure, n: int) -> tuple[int, list[np.ndarray], list[np.ndarray]]:
    """Return the flags of the floating-point fields, the single values, and positions and forces."""
    flags, wide = 0, []
    if structure.energy is not None:
        flags |= _ENERGY
        wide.append(np.array(structure.energy, "<f8"))
    if structure.cell is not None:
        flags |= _CELL
        wide.append(_floats(structure, "cell", (3, 3)).astype("<f8"))
    wide.append(np.array(list(structure.targets.values()), "<f8"))
    arrays = {"positions": _floats(structure, "positions", (n, 3))}
    if structure.forces is not None:
        flags |= _FORCES
        arrays["forces"] = _floats(structure, "forces", (n, 3))
    for name, bit in (("positions", _POSITIONS_32), ("forces", _FORCES_32)):
        flags |= bit if name in arrays and arrays[name].dtype.itemsize == 4 else 0
    return flags, wide, [arrays[name].astype(_kind(flags, name)) for name in _order(flags)]


def _floats(structure: Structure, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(getattr(structure, name))
    if values.shape != shape or values.dtype.kind not in "fiu":
        raise ValueError(f"{structure.id}: {name}: expected floats {shape}, got {values.dtype} {values.shape}")
    return values if values.dtype.kind == "f" and values.dtype.itemsize == 4 else values.astype(np.float64)


def _text(structure: Structure) -> bytes:
    words = [structure.id, *structure.targets]
    text = "\0".join(words).encode()
    if len(text) > 0xFFFF or any("\0" in word for word in words):
        raise ValueError(f"id and targets: expected names without NUL, 65,535 bytes in all, got {text[:100]!r}")
    return text


def _hash(head: bytes, body: bytes | memoryview) -> bytes:
    state = hashlib.blake2b(head, digest_size=_HASH_BYTES)
    state.update(body)
    return state.digest()
