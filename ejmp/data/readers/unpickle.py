"""Pickles of PyG data, read without running anything they contain.

A pickle is a program for a small stack machine. The machine here knows the operations that pickled PyG data, tensors
and numpy arrays consist of, and an exact list of names. A name stands for a function of
`ejmp.data.readers.pickle_names` that checks what it is given and returns numbers, text and arrays: nothing is imported,
called or constructed because a pickle asks for it. Every length is compared with the bytes that are there, and the size
of what the functions return with MAX_GROWTH.
"""

import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ejmp.data.readers.pickle_names import (
    NAMES,
    PYG_CLASSES,
    Array,
    Dtype,
    PickleName,
    PyGObject,
    UnsafePickleError,
    brief,
    weights_only,
)

MAX_GROWTH = 16
"""Most bytes of arrays for each byte of a pickle; a tensor counts twice, as its storage and as itself."""
SMALL = 1 << 20
"""Bytes of arrays that any pickle may make."""


def fields(value: Any) -> Mapping[str, Any]:
    """Return the fields of a PyG `Data` (1.x or 2.x), or of a dict, by name.

    Raises:
        ValueError: if the value is none of these.
    """
    if isinstance(value, PyGObject):
        value = value.state
        if "_store" in value:  # 2.x
            store = value["_store"]
            value = store.state.get("_mapping") if isinstance(store, PyGObject) else None
    if type(value) is not dict:
        raise ValueError(f"expected PyG data, got {type(value).__name__}")
    return value


def load_pt(path: Path) -> Any:
    """Load a file of torch.save that may hold PyG data, with tensors as torch's and PyG's classes as `PyGObject`.

    Raises:
        UnsafePickleError: if the file asks for anything else.
    """
    # torch tells allowed classes from others by type, so each name needs a class of its own.
    stand_ins: list[Any] = [(type(name, (PyGObject,), {}), f"{module}.{name}") for module, name in PYG_CLASSES]
    registered = torch.serialization.get_safe_globals()  # PyG registers its own classes when it is imported
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(stand_ins):
            return weights_only(path)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(registered)


def loads(data: bytes) -> Any:
    """Return the contents of a pickle, with numpy arrays for tensors and arrays, and `PyGObject` for PyG's classes.

    Raises:
        UnsafePickleError: if it asks for a name or an operation that is not on the list.
        ValueError: if it is damaged.
    """
    machine = _Machine(data)
    try:
        return machine.run()
    except UnsafePickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error, MemoryError) as error:
        raise ValueError(f"damaged pickle at byte {machine.at} of {len(data)}: {error}") from error


_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}
_NUMBERS = {b"J": "<i", b"K": "<B", b"M": "<H", b"G": ">d"}
_TEXT = {b"X": "<I", b"\x8c": "<B", b"\x8d": "<Q"}
_BYTES = {b"B": "<I", b"C": "<B", b"\x8e": "<Q"}
_TUPLES = {b")": 0, b"\x85": 1, b"\x86": 2, b"\x87": 3}
_PUT = {b"q": "<B", b"r": "<I"}
_GET = {b"h": "<B", b"j": "<I"}


class _Machine:
    """The stack machine; `_STEPS` says which method carries out which operation."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.left = MAX_GROWTH * len(data) + SMALL

    def run(self) -> Any:
        while (code := self.take(1)) != pickle.STOP:
            _STEPS.get(code, _Machine.refuse)(self, code)
        if self.below or len(self.stack) != 1:
            raise ValueError("it ends with more or less than one value")
        return _finished(self.stack[0])

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"{size} bytes announced, {len(self.data) - self.at} left")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise ValueError("a name without an end")
        return self.take(end + 1 - self.at)[:-1].decode()

    def marked(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def skip(self, code: bytes) -> None:
        self.take(1 if code == pickle.PROTO else 8)

    def constant(self, code: bytes) -> None:
        self.stack.append(_CONSTANTS[code])

    def push_number(self, code: bytes) -> None:
        self.stack.append(self.number(_NUMBERS[code]))

    def long(self, _: bytes) -> None:
        self.stack.append(int.from_bytes(self.take(self.number("<B")), "little", signed=True))

    def text(self, code: bytes) -> None:
        self.stack.append(self.take(self.number(_TEXT[code])).decode("utf-8", "surrogatepass"))

    def push_bytes(self, code: bytes) -> None:
        self.stack.append(self.take(self.number(_BYTES[code])))

    def byte_array(self, _: bytes) -> None:
        self.stack.append(bytearray(self.take(self.number("<Q"))))

    def put(self, code: bytes) -> None:
        self.memo[self.number(_PUT[code]) if code in _PUT else len(self.memo)] = self.stack[-1]

    def get(self, code: bytes) -> None:
        self.stack.append(self.memo[self.number(_GET[code])])

    def mark(self, _: bytes) -> None:
        self.below.append(self.stack)
        self.stack = []

    def new_dict(self, _: bytes) -> None:
        self.stack.append({})

    def new_list(self, _: bytes) -> None:
        self.stack.append([])

    def short_tuple(self, code: bytes) -> None:
        items = [self.stack.pop() for _ in range(_TUPLES[code])]
        self.stack.append(tuple(map(_finished, reversed(items))))

    def long_tuple(self, _: bytes) -> None:
        items = self.marked()
        self.stack.append(tuple(map(_finished, items)))

    def set_items(self, code: bytes) -> None:
        items = self.marked() if code == pickle.SETITEMS else [self.stack.pop(), self.stack.pop()][::-1]
        target = self.stack[-1]
        if type(target) is not dict:
            raise UnsafePickleError(f"refused: setting items of {_label(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise UnsafePickleError(f"refused: a dict key of type {type(key).__name__}")
            target[key] = _finished(value)

    def append(self, code: bytes) -> None:
        items = self.marked() if code == pickle.APPENDS else [self.stack.pop()]
        target = self.stack[-1]
        if type(target) is not list:
            raise UnsafePickleError(f"refused: appending to {_label(target)}")
        target.extend(map(_finished, items))

    def find(self, code: bytes) -> None:
        if code == pickle.STACK_GLOBAL:
            name, module = self.stack.pop(), self.stack.pop()
        else:
            module, name = self.line(), self.line()
        if type(module) is not str or type(name) is not str:
            raise UnsafePickleError("refused: a name that is not text")
        if (module, name) not in NAMES or code == pickle.INST:
            raise UnsafePickleError(f"refused: it asks for {module[:100]}.{name[:100]}")
        self.stack.append(NAMES[module, name])

    def call(self, _: bytes) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, PickleName) or function.make is None:
            raise UnsafePickleError(f"refused: a call of {_label(function)}")
        if type(args) is not tuple:
            raise UnsafePickleError(f"refused: a call of {function.name} without a tuple of arguments")
        try:
            self.stack.append(function.make(*args))
        except TypeError as error:
            raise UnsafePickleError(f"refused: a call of {function.name} with {brief(args)}") from error
        self.spend(self.stack[-1])

    def new_object(self, _: bytes) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        if not isinstance(cls, PickleName) or not cls.instantiable or type(args) is not tuple or args:
            raise UnsafePickleError(f"refused: an object of {_label(cls)}")
        self.stack.append(PyGObject())

    def build(self, _: bytes) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, PyGObject | Dtype | Array):
            raise UnsafePickleError(f"refused: setting the state of {_label(target)}")
        target.__setstate__(state)

    def refuse(self, code: bytes) -> None:
        known = {opcode.code: opcode.name for opcode in pickletools.opcodes}
        raise UnsafePickleError(f"refused: operation {known.get(code.decode('latin1'), code)}")

    def spend(self, value: Any) -> None:
        self.left -= value.nbytes if hasattr(value, "nbytes") else len(value) if type(value) is bytes else 0
        if self.left < 0:
            raise UnsafePickleError(f"refused: it makes more than {MAX_GROWTH} times its own size")


_STEPS: dict[bytes, Callable[[_Machine, bytes], None]] = {
    pickle.PROTO: _Machine.skip,
    pickle.FRAME: _Machine.skip,
    pickle.LONG1: _Machine.long,
    pickle.BYTEARRAY8: _Machine.byte_array,
    pickle.MEMOIZE: _Machine.put,
    pickle.MARK: _Machine.mark,
    pickle.EMPTY_DICT: _Machine.new_dict,
    pickle.EMPTY_LIST: _Machine.new_list,
    pickle.TUPLE: _Machine.long_tuple,
    pickle.SETITEM: _Machine.set_items,
    pickle.SETITEMS: _Machine.set_items,
    pickle.APPEND: _Machine.append,
    pickle.APPENDS: _Machine.append,
    pickle.GLOBAL: _Machine.find,
    pickle.STACK_GLOBAL: _Machine.find,
    pickle.INST: _Machine.find,
    pickle.REDUCE: _Machine.call,
    pickle.NEWOBJ: _Machine.new_object,
    pickle.BUILD: _Machine.build,
    **dict.fromkeys(_CONSTANTS, _Machine.constant),
    **dict.fromkeys(_NUMBERS, _Machine.push_number),
    **dict.fromkeys(_TEXT, _Machine.text),
    **dict.fromkeys(_BYTES, _Machine.push_bytes),
    **dict.fromkeys(_TUPLES, _Machine.short_tuple),
    **dict.fromkeys(_PUT, _Machine.put),
    **dict.fromkeys(_GET, _Machine.get),
}


def _finished(value: Any) -> Any:
    return value.array if isinstance(value, Array) and value.array is not None else value


def _label(value: Any) -> str:
    return value.name if isinstance(value, PickleName) else f"a {type(value).__name__}"
