"""Files of tensors, read in two steps: first names, types and shapes, then those values that are asked for.

What a file describes is there as tensors on the meta device, which take no memory. So shapes are compared with those of
a model before anything is allocated, and what is not needed, such as an optimiser's state, is never read. Values are
read as bytes of the file: it is not mapped into memory, because a mapped file that is cut short ends the process.
"""

import json
import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ejmp.limits import RefusedFileError, check_limit, open_regular

SUSPICIOUS = ("builtins", "__builtin__", "os", "posix", "nt", "subprocess", "sys", "runpy", "shutil", "socket")
"""Modules of which no checkpoint needs anything: a file that names one is refused as a whole."""
MOST_HEADER = 100_000_000
"""Most bytes of a safetensors file's header, as its format says."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class TensorFile:
    """A file that `open_tensors` has opened."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self._file = path, file
        self._size = os.fstat(file.fileno()).st_size
        self.contents: Any = (
            _safetensors(path, file, self._size) if path.suffix == ".safetensors" else _pickled(path, file)
        )
        """What the file holds; its tensors are on the meta device, those of torch before 1.6 on the CPU."""

    def read(self, value: Any) -> Any:
        """Return a tensor of the file with its values, on the CPU; anything else as it is.

        Raises:
            ValueError: if the tensor is not one that is stored number by number in the file.
        """
        if not isinstance(value, Tensor):
            return value
        check_stored(value)
        if not value.is_meta:
            return value.detach()
        storage: Any = value.untyped_storage()
        span = _span(value) * value.element_size()
        start = storage._checkpoint_offset + int(value.storage_offset()) * value.element_size()  # noqa: SLF001 - torch's documented name
        if start + span > self._size:
            raise RefusedFileError(self.path, f"a tensor of {span:,} bytes from byte {start:,} of {self._size:,}")
        found = torch.empty(span, dtype=torch.uint8)
        self._file.seek(start)
        if self._file.readinto(found.numpy()) != span:  # pyright: ignore[reportAttributeAccessIssue]
            raise RefusedFileError(self.path, "changed while it was read: it is shorter than at first")
        flat = torch.empty(0, dtype=value.dtype)
        return flat.set_(found.untyped_storage(), 0, value.shape, value.stride())


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file, or one that `torch.save` wrote, of which only tensors and plain values are unpickled.

    Objects of other kinds, such as hyper-parameters of a Lightning file, are left out of it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file, or not a regular one, or it changes until the `with` block ends.
    """
    with open_regular(path) as file:
        before = os.fstat(file.fileno())
        try:
            yield TensorFile(path, file)
        except ValueError as error:
            if str(error).startswith(f"{path}: "):
                raise
            raise RefusedFileError(path, str(error)) from error
        for after in (os.fstat(file.fileno()), path.stat()):
            if (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino):
                raise RefusedFileError(path, "changed while it was read; load it again when it is complete")


def check_stored(tensor: Any, name: str = "a tensor") -> None:
    """Refuse a tensor that is not stored number by number: sparse, quantised, or repeated by strides of zero.

    Raises:
        ValueError: naming what it is instead.
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise ValueError(f"checkpoint: {name}: expected a dense tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantised" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise ValueError(f"checkpoint: {name}: expected a dense tensor, got a {kind} one; save it dense")
    if tensor.numel() > _span(tensor):
        raise ValueError(
            f"checkpoint: {name}: {tensor.numel():,} numbers {list(tensor.shape)} are {_span(tensor):,} repeated by "
            f"strides {list(tensor.stride())}; save it .contiguous()"
        )


def _span(tensor: Tensor) -> int:
    """Return how many numbers there are from a tensor's first to its last in its storage."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _on_meta(dtype: torch.dtype, shape: list[int], offset: int) -> Tensor:
    storage: Any = torch.UntypedStorage(math.prod(shape) * dtype.itemsize, device="meta")
    storage._checkpoint_offset = offset  # noqa: SLF001 - as torch.load does
    flat: Any = torch.empty(0, dtype=dtype, device="meta")
    return flat.set_(storage, 0, shape)


def _safetensors(path: Path, file: IO[bytes], size: int) -> dict[str, Tensor]:
    """Return the tensors that a safetensors file describes, after checking that they fill it exactly."""
    try:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MOST_HEADER):
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")  # noqa: TRY301
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        check_limit(path, "tensors", len(header), "tensors")
        rows = sorted((row["data_offsets"], name, row["dtype"], row["shape"]) for name, row in header.items())
        found, end = {}, 0
        for (start, stop), name, kind, shape in rows:
            if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
                raise ValueError(f"{name}: expected whole numbers")  # noqa: TRY301
            if kind not in _DTYPES:
                raise ValueError(f"{name}: type {kind}")  # noqa: TRY301
            if start != end or stop - start != math.prod(shape) * _DTYPES[kind].itemsize:
                raise ValueError(f"{name}: {kind} {shape} from byte {start} to {stop}, after {end}")  # noqa: TRY301
            end = stop
            found[name] = _on_meta(_DTYPES[kind], shape, 8 + length + start)
        if 8 + length + end != size:
            raise ValueError(f"{8 + length + end:,} bytes announced, {size:,} are there")  # noqa: TRY301
    except RefusedFileError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, RuntimeError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    return found


def _pickled(path: Path, file: IO[bytes]) -> Any:
    """Return the contents of a file that `torch.save` wrote, tensors and plain values only."""
    _check_records(path, file)
    try:
        return _load_plain(file)
    except Exception as error:
        contents = _load_without_objects(file)
        if contents is None:
            asked = re.search(r"GLOBAL (\S+)", str(error))
            why = (
                f"it asks for {asked[1]}" if asked else f"{type(error).__name__}: {str(error).partition('. ')[0][:200]}"
            )
            raise ValueError(
                f"{path}: not a checkpoint of plain tensors ({why}); where it was made, save only the state_dict"
            ) from error
        return contents


def _check_records(path: Path, file: IO[bytes]) -> None:
    """Refuse a zip file whose records are compressed, as `torch.save` writes none, or that a big-endian machine wrote.

    A file of another kind is one of torch before 1.6, which is read as a whole.
    """
    if not _is_zip(file):
        check_limit(path, "read_bytes", os.fstat(file.fileno()).st_size, "bytes of a format before torch 1.6")
        return
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                    raise RefusedFileError(path, f"record {record.filename}: compressed, which torch.save never does")
                if record.filename.endswith("/byteorder") and archive.read(record) != b"little":
                    raise RefusedFileError(path, "its numbers are in the order of a big-endian machine")
                if record.filename.endswith("/data.pkl"):
                    check_limit(path, "record_bytes", record.file_size, "bytes of data.pkl")
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a checkpoint of plain tensors (a damaged zip file: {error})") from error


def _is_zip(file: IO[bytes]) -> bool:
    file.seek(0)
    return file.read(4) == b"PK\x03\x04"


def _load_plain(file: IO[bytes], more: Iterable[Any] = ()) -> Any:
    place = "meta" if _is_zip(file) else "cpu"
    file.seek(0)
    with torch.serialization.safe_globals([*_harmless(), *more]):
        return torch.load(file, map_location=place, weights_only=True)


class _NotRead:
    """What stands for an object of an unknown kind: it takes whatever the file gives it, and keeps nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _load_without_objects(file: IO[bytes]) -> Any:
    """Load a file with an empty object for each of an unknown kind; None if that is not possible.

    Nothing that the file names is imported or called.
    """
    made: dict[str, type] = {}
    try:
        file.seek(0)
        with torch.serialization.safe_globals(_harmless()):
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        if any(name.partition(".")[0] in SUSPICIOUS for name in unknown):
            return None
        for _ in range(len(unknown) + 1):
            # torch tells allowed classes from others by type, so each name needs a class of its own
            stand_ins = [(_stand_in(name, made.get(name)), name) for name in unknown]
            try:
                return _load_plain(file, stand_ins)
            except pickle.UnpicklingError as error:
                # torch puts items into dicts and lists only: a class that is filled like one has to make one
                filled = re.search(r"Can only (SETITEM|append|extend).* got <class '([^']+)'>", str(error))
                if filled is None:
                    return None
                kind = OrderedDict if filled[1] == "SETITEM" else list
                made |= {name: kind for name in unknown if filled[2].endswith(f".{name}") or filled[2] == name}
    except Exception:  # noqa: BLE001 - whatever it is, the first error is the one to show
        return None
    return None


def _stand_in(name: str, made: type | None) -> type:
    """Return a class in place of an unknown one, whose objects keep nothing; or which makes a dict or a list."""
    return type(name, (_NotRead,), {} if made is None else {"__new__": lambda _, *__, **___: made()})


def _harmless() -> list[Any]:
    """Return what makes NumPy's numbers and arrays, paths and dicts with defaults: optimisers and logs have some."""
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    made: list[Any] = [
        (function, f"{home}.multiarray.{name}")
        for function, name in ((scalar, "scalar"), (array, "_reconstruct"))
        for home in ("numpy.core", "numpy._core")
    ]
    kinds = {type(np.dtype(kind)) for kind in "?bhilqBHILQefd"}
    return [*made, np.dtype, np.ndarray, *kinds, defaultdict, dict, (PurePosixPath, "pathlib.PosixPath")]
