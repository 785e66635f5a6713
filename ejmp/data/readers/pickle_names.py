"""The names that a pickle of PyG data may ask for, and a function for each that checks what it is given."""

import io
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ejmp.data.readers.kinds import check_zip
from ejmp.limits import RefusedFileError, open_regular

ZIP = b"PK\x03\x04"
MAX_AXES = 8
"""Most axes of an array."""
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool,
)  # fmt: skip


class UnsafePickleError(ValueError):
    """Raised for a pickle that asks for something that is not on the list; the message says for what."""


class PyGObject:
    """A stand-in for any of PyG's classes, which keeps the state it was pickled with and does nothing."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict or not all(type(key) is str for key in state):
            raise UnsafePickleError("refused: the state of a PyG object that is not a dict of names")
        self.state = state


PYG_CLASSES = (
    ("torch_geometric.data.data", "Data"),
    ("torch_geometric.data.data", "DataTensorAttr"),
    ("torch_geometric.data.data", "DataEdgeAttr"),
    ("torch_geometric.data.storage", "GlobalStorage"),
)


@dataclass(frozen=True, kw_only=True)
class PickleName:
    """A name on the list, and what a pickle may do with it."""

    name: str
    """Full name, for messages."""
    make: Callable[..., Any] | None = None
    """Function that is called in its place; None if it cannot be called."""
    instantiable: bool = False
    """Whether it can be instantiated, as a `PyGObject`."""


class Dtype:
    """A numpy dtype of numbers or booleans, whose byte order comes with its state."""

    def __init__(self, *args: Any) -> None:
        if not args or type(args[0]) is not str or not re.fullmatch("[biuf][1248]", args[0]):
            raise UnsafePickleError(f"refused: numpy dtype {brief(args[:1])}, which is not one of numbers")
        self.dtype = np.dtype(args[0])

    def __setstate__(self, state: Any) -> None:
        # version, byte order, subarray, names, fields, size, alignment, flags
        if type(state) is not tuple or len(state) < 5 or state[1] not in ("<", ">", "|") or any(state[2:5]):
            raise UnsafePickleError(f"refused: numpy dtype of state {brief(state)}")
        self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """A numpy array whose contents come with its state."""

    def __init__(self, *_: Any) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.array = _array(raw, dtype, shape, "F" if fortran else "C")


def weights_only(file: Path | io.BytesIO) -> Any:
    """Load a file of torch.save.

    Raises:
        UnsafePickleError: if it asks for a name that torch does not allow.
        ValueError: if it is damaged, or unpacks to more than `ejmp.limits` allows.
    """
    try:
        if isinstance(file, Path):
            with open_regular(file) as contents:
                is_zip = contents.read(4) == ZIP
        else:
            is_zip = file.getbuffer()[:4] == ZIP
        if is_zip:
            check_zip(file, file if isinstance(file, Path) else Path("tensors in a pickle"))
        return torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, RefusedFileError):
        raise
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise UnsafePickleError(f"refused: it asks for {asked[1]}") from error
        raise ValueError(f"damaged tensors: {str(error)[-200:]}") from error
    except Exception as error:  # torch documents no errors for damaged input
        raise ValueError(f"damaged tensors: {type(error).__name__}: {str(error)[:200]}") from error


def _storage(raw: Any) -> np.ndarray:
    """Return the numbers of a pickled tensor as a flat array, from the nested file that holds them."""
    if type(raw) is not bytes:
        raise UnsafePickleError(f"refused: tensor contents of type {type(raw).__name__}")
    storage = weights_only(io.BytesIO(raw))
    if not isinstance(storage, torch.storage.TypedStorage) or storage.dtype not in DTYPES:
        raise UnsafePickleError(f"refused: tensor contents that are a {type(storage).__name__}")
    flat = torch.empty(0, dtype=storage.dtype).set_(storage)  # pyright: ignore[reportArgumentType]
    if flat.nbytes > len(raw):
        raise ValueError(f"{flat.nbytes} bytes of numbers from {len(raw)}")
    return flat.numpy()


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """Return the array that a tensor's storage, offset and strides (in elements) describe."""
    if not isinstance(storage, np.ndarray) or storage.ndim != 1:
        raise UnsafePickleError(f"refused: a tensor of a {type(storage).__name__}")
    if not (_is_shape(size) and _is_shape(stride) and _is_shape((offset,)) and len(size) == len(stride)):
        raise UnsafePickleError(f"refused: a tensor of size {brief(size)}, stride {brief(stride)}")
    count = math.prod(size)
    last = offset + sum((s - 1) * step for s, step in zip(size, stride, strict=True))
    if count > len(storage) or (count and last >= len(storage)):
        raise UnsafePickleError(f"refused: a tensor of size {brief(size)} in {len(storage)} numbers")
    if not count:
        return np.empty(size, storage.dtype)
    steps = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps).copy()


def _array(raw: Any, dtype: Any, shape: Any, order: Any = "C", axes: Any = None) -> np.ndarray:
    if not isinstance(dtype, Dtype) or type(raw) not in (bytes, bytearray) or not _is_shape(shape) or axes is not None:
        raise UnsafePickleError(f"refused: a numpy array of {brief((type(raw).__name__, dtype, shape, axes))}")
    if math.prod(shape) * dtype.dtype.itemsize != len(raw):
        raise ValueError(f"a numpy array of shape {brief(shape)} from {len(raw)} bytes")
    return np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: Any, raw: Any) -> Any:
    return _array(raw, dtype, ())[()]


def _no_bytes(*args: Any) -> bytes:
    """Return empty bytes, which protocol 2 spells as a call."""
    if args:
        raise UnsafePickleError("refused: bytes of something")
    return b""


def _ordered_dict(*args: Any) -> dict[Any, Any]:
    if args:
        raise UnsafePickleError("refused: collections.OrderedDict with contents")
    return {}


def _encode(text: Any, encoding: Any) -> bytes:
    """Return the bytes that protocol 2 spells as text in latin1."""
    if type(text) is not str or encoding != "latin1":
        raise UnsafePickleError("refused: _codecs.encode of anything but bytes")
    return text.encode("latin1")


def _is_shape(value: Any) -> bool:
    return type(value) is tuple and len(value) <= MAX_AXES and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


def brief(value: Any) -> str:
    """Describe a value of any size and depth in a few words."""
    if type(value) is tuple:
        return f"({', '.join(str(v)[:20] if type(v) in (int, str) else type(v).__name__ for v in value[:8])})"
    return type(value).__name__


def _names() -> dict[tuple[str, str], PickleName]:
    made: dict[tuple[str, str], Callable[..., Any] | None] = {
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch.storage", "_load_from_bytes"): _storage,
        ("collections", "OrderedDict"): _ordered_dict,
        ("_codecs", "encode"): _encode,
        ("__builtin__", "bytes"): _no_bytes,
        ("numpy", "dtype"): Dtype,
        ("numpy", "ndarray"): None,
    }
    for core in ("numpy.core", "numpy._core"):
        made[f"{core}.multiarray", "_reconstruct"] = Array
        made[f"{core}.multiarray", "scalar"] = _scalar
        made[f"{core}.numeric", "_frombuffer"] = _array
    names = {key: PickleName(name=".".join(key), make=make) for key, make in made.items()}
    return names | {key: PickleName(name=".".join(key), instantiable=True) for key in PYG_CLASSES}


NAMES = _names()
