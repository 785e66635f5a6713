"""Pickles of PyG data are read, and nothing that a pickle asks for runs."""

import io
import pickle
import struct
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.data_sources import NUMBERS, oc_record, pyg_modules, truth

from ejmp.data.readers import unpickle
from ejmp.data.readers.pickle_names import NAMES, PyGObject, UnsafePickleError
from ejmp.data.readers.unpickle import fields, load_pt, loads

LOAD = b"ctorch.storage\n_load_from_bytes\n"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
DATA = b"ctorch_geometric.data.data\nData\n"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n"
DTYPE = b"cnumpy\ndtype\n"
SIZES = {1: "<B", 4: "<I", 8: "<Q"}


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage_bytes(count=6, dtype=torch.float32):
    _, arguments = torch.arange(count).to(dtype).__reduce_ex__(2)
    return arguments[0].__reduce__()[1][0]


def storage(raw=None):
    raw = storage_bytes() if raw is None else raw
    return LOAD + b"B" + struct.pack("<I", len(raw)) + raw + b"\x85R"


def tensor(size=b"K\x06\x85", stride=b"K\x01\x85", offset=b"K\x00", first=None):
    return TENSOR + b"(" + (storage() if first is None else first) + offset + size + stride + b"\x89}tR."


@pytest.mark.parametrize("layout", ["1.x", "2.x"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_both_layouts_of_pyg(layout, protocol, monkeypatch):
    positions, energy, forces = truth()
    record = oc_record(1, layout, protocol)
    assert b"torch_geometric" in record
    monkeypatch.delitem(sys.modules, "torch_geometric", raising=False)  # other tests may have imported it
    values = fields(loads(record))
    assert "torch_geometric" not in sys.modules
    np.testing.assert_array_equal(values["pos"], positions[1].astype(np.float32))
    np.testing.assert_array_equal(values["force"], forces[1].astype(np.float32))
    np.testing.assert_array_equal(values["atomic_numbers"], NUMBERS)
    assert values["cell"].shape == (1, 3, 3)
    assert (values["y"], values["sid"], values["natoms"]) == (energy[1], 1234, 5)


VALUES = {
    "float64": torch.arange(6, dtype=torch.float64).reshape(2, 3),
    "float16": torch.arange(6).half(),
    "bool": torch.tensor([True, False]),
    "transposed": torch.arange(6).reshape(2, 3).T,
    "piece": torch.arange(20)[7:11],
    "every other": torch.arange(20)[::2],
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "needs grad": torch.ones(2, requires_grad=True),
    "array": np.arange(6.0).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big endian": np.arange(3, dtype=">i4"),
    "no rows": np.zeros((0, 3)),
    "numpy scalar": np.float64(3.25),
    "plain": {"a": [1, -2, 1 << 70, 3.5, None, True, "text", b"bytes", (1, 2, 3, 4)], "b": (1,)},
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", VALUES)
def test_reads_what_such_files_hold(name, protocol):
    value = VALUES[name]
    found = loads(pickle.dumps({"value": value, "again": value}, protocol=protocol))
    if name == "plain":
        assert found == {"value": value, "again": value}
        return
    expected = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    for array in found.values():
        assert array.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(array, expected)


def test_numpy_before_and_after_2():
    dumped = pickle.dumps(np.arange(3.0), protocol=2)
    for old, new in ((b"numpy.core.", b"numpy._core."), (b"numpy._core.", b"numpy.core.")):
        np.testing.assert_array_equal(loads(dumped.replace(old, new)), np.arange(3.0))


def asks(function, *args):
    """Return a pickle that calls a function when it is loaded."""

    class Asks:
        def __reduce__(self):
            return function, args

    return pickle.dumps(Asks(), protocol=4)


def named(module, name, args=b")", call=b"R"):
    return b"c" + f"{module}\n{name}\n".encode() + args + call + b"."


def hostile(marker):
    """Return pickles by what their refusal must say; those that run something would make the marker file."""
    code = f"open({marker!r}, 'w')"
    nested = io.BytesIO()
    torch.save(_Opens(marker), nested, _use_new_zipfile_serialization=False)
    return {
        "io.open": asks(open, marker, "w"),
        "builtins.eval": asks(eval, code),
        "builtins.exec": asks(exec, code),
        "posix.system": asks(__import__("os").system, f"touch {marker}"),
        "os.system": named("os", "system", text(f"touch {marker}") + b"\x85"),
        "subprocess.Popen": named("subprocess", "Popen", text(f"touch {marker}") + b"\x85"),
        "builtins.getattr": asks(getattr, marker, "__class__"),
        "builtins.__import__": asks(__import__, "os"),
        "builtins.compile": asks(compile, code, "x", "exec"),
        "importlib.import_module": asks(__import__("importlib").import_module, "os"),
        "_pickle.loads": asks(pickle.loads, asks(eval, code)),
        "_operator.attrgetter": named("_operator", "attrgetter"),
        "numpy.load": named("numpy", "load", text(marker) + b"\x85"),
        "numpy.core.multiarray.fromfile": named("numpy.core.multiarray", "fromfile", text(marker) + b"\x85"),
        "torch.load": named("torch", "load", text(marker) + b"\x85"),
        "torch.storage._load_from_bytes.__globals__": b"\x80\x04" + text("torch.storage")
        + text("_load_from_bytes.__globals__") + b"\x93.",
        "torch.storage.os.system": b"\x80\x04" + text("torch.storage") + text("os.system") + b"\x93.",
        "torch._utils._rebuild_tensor_v2x": named("torch._utils", "_rebuild_tensor_v2x"),
        "torch.hub.load": named("torch.hub", "load"),
        "torch.jit.load": named("torch.jit", "load"),
        "torch_geometric.data.data.Data.__init__": b"\x80\x04" + text("torch_geometric.data.data")
        + text("Data.__init__") + b"\x93.",
        "torch_geometric.data.data.os": named("torch_geometric.data.data", "os"),
        "torch_geometric.data.batch.Batch": named("torch_geometric.data.batch", "Batch", b")", b"\x81"),
        "copyreg._reconstructor": named("copyreg", "_reconstructor"),
        "site.execsitecustomize": named("site", "execsitecustomize"),
        "posix.popen": b"(" + text("touch") + b"iposix\npopen\n.",
        "bytes nested in a tensor": storage(nested.getvalue()) + b".",
        "EXT1": b"\x82\x01.",
        "EXT4": b"\x84\x01\x00\x00\x00.",
        "BINPERSID": text("x") + b"Q.",
        "PERSID": b"Px\n.",
        "OBJ": b"(" + DATA + b"o.",
        "NEWOBJ_EX": DATA + b")}\x92.",
        "NEXT_BUFFER": b"\x97.",
        "LONG4": b"\x8b\xff\xff\xff\x7f1.",
        "POP": b"N0.",
    }  # fmt: skip


class _Opens:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return eval, (f"open({self.marker!r}, 'w')",)


def test_the_marker_is_made_by_a_plain_unpickle(tmp_path):
    """Python's own unpickler runs these pickles; otherwise the next test would show nothing."""
    marker = tmp_path / "ran"
    for name in ("builtins.eval", "os.system", "builtins.exec", "_pickle.loads", "posix.system"):
        pickle.loads(hostile(str(marker))[name])  # noqa: S301
        assert marker.exists(), name
        marker.unlink()


def test_hostile_pickles_are_refused_by_name(tmp_path):
    marker = tmp_path / "ran"
    pickles = hostile(str(marker))
    assert len(pickles) >= 30
    for name, pickled in pickles.items():
        expected = "eval" if name.startswith("bytes nested") else name
        with pytest.raises(UnsafePickleError) as refused:
            loads(pickled)
        assert str(refused.value).endswith((f"asks for {expected}", f"operation {expected}")), (name, refused.value)
        assert not marker.exists(), name


DTYPE_F8 = DTYPE + text("f8") + b"\x85R"
MISUSED = {
    "a call of a class": DATA + b")R.",
    "a class with arguments": DATA + text("x") + b"\x85\x81.",
    "an object of a function": TENSOR + b")\x81.",
    "an object of text": text("x") + b")\x81.",
    "state of a function": TENSOR + b"}b.",
    "state of a dict": b"}}b.",
    "state that is a list": DATA + b")\x81]b.",
    "state with a key that is no name": DATA + b")\x81}K\x01K\x02sb.",
    "state that sets a class": DATA + b")\x81(}" + text("__class__") + DATA + b"stb.",
    "items of a function": TENSOR + text("a") + text("b") + b"s.",
    "items of an object": DATA + b")\x81" + text("a") + text("b") + b"s.",
    "append to a function": TENSOR + b"N" + b"a.",
    "append to a dict": b"}Na.",
    "a key that is a tuple": b"}K\x01\x85Ns.",
    "a call of text": text("os.system") + text("ls") + b"\x85R.",
    "arguments that are a list": LOAD + b"]R.",
    "contents that are text": LOAD + text("x") + b"\x85R.",
    "two arguments too many": LOAD + b"NNN\x87R.",
    "huge tensor in a small storage": tensor(size=b"\x8a\x05\x00\x00\x00\x00\x01\x85"),
    "huge tensor of stride 0": tensor(size=b"\x8a\x05\x00\x00\x00\x00\x01\x85", stride=b"K\x00\x85"),
    "overflowing tensor": tensor(size=b"\x8a\x09" + b"\xff" * 8 + b"\x7f\x85"),
    "a tensor that starts behind its storage": tensor(offset=b"K\x01"),
    "a tensor of negative size": tensor(size=b"J\xff\xff\xff\xff\x85"),
    "a tensor of negative stride": tensor(stride=b"J\xff\xff\xff\xff\x85"),
    "a tensor of negative offset": tensor(offset=b"J\xff\xff\xff\xff"),
    "a tensor of fractional size": tensor(size=b"G" + b"\x00" * 8 + b"\x85"),
    "a tensor of nine axes": tensor(size=b"(" + b"K\x01" * 9 + b"t", stride=b"(" + b"K\x01" * 9 + b"t"),
    "a tensor of text": tensor(first=text("x")),
    "an ordered dict of something": b"ccollections\nOrderedDict\n" + text("x") + b"\x85R.",
    "bytes of a size": b"c__builtin__\nbytes\nK\x05\x85R.",
    "text encoded": b"c_codecs\nencode\n" + text("x") + text("rot13") + b"\x86R.",
    "object dtype": DTYPE + text("O") + b"\x85R.",
    "object dtype of numpy's own": pickle.dumps(np.array([_Opens("x")], dtype=object), protocol=2),
    "record dtype": pickle.dumps(np.zeros(2, dtype=[("a", "f8")]), protocol=2),
    "dtype by class": DTYPE + DTYPE + b"\x85R.",
    "dtype state with fields": DTYPE_F8 + b"(K\x03" + text("<") + b"N" + text("a") + b"NJ\xff\xff\xff\xfftb.",
    "dtype state that is a list": DTYPE_F8 + b"]b.",
    "array state with a dtype that is text": ARRAY + b")R(K\x01K\x00\x85" + text("f8") + b"\x89C\x00tb.",
    "array of a list": b"cnumpy.core.numeric\n_frombuffer\n(]" + DTYPE_F8 + b"K\x00\x85" + text("C") + b"tR.",
}


@pytest.mark.parametrize("name", MISUSED)
def test_misused_names_are_refused(name):
    with pytest.raises(UnsafePickleError, match="refused: "):
        loads(MISUSED[name])


DAMAGED = {
    "nothing": b"",
    "no end": b"N",
    "nothing at the end": b".",
    "two values at the end": b"NN.",
    "an open mark": b"(N.",
    "text that is not there": b"X\xff\xff\xff\x7f.",
    "bytes that are not there": b"\x8e" + b"\xff" * 8 + b".",
    "a long that is not there": b"\x8a\xff.",
    "a memo that is not there": b"h\x05.",
    "a huge memo that is not there": b"j\xff\xff\xff\xff.",
    "a name without an end": b"cos",
    "a name that is not text": b"c\xff\n\xff\n.",
    "a mark that is not there": b"t.",
    "a tuple of nothing": b"\x86.",
    "a key without a value": b"}(Nu.",
    "a call of nothing": b"R.",
    "array state that is short": ARRAY + b")RK\x01\x85b.",
    "array larger than its bytes": ARRAY + b")R(K\x01\x8a\x05\x00\x00\x00\x00\x01\x85" + DTYPE_F8 + b"\x89C\x00tb.",
    "contents that are no file": storage(b"x" * 40) + b".",
    "contents cut short": storage(storage_bytes()[:-4]) + b".",
    "contents that announce too much": storage(storage_bytes().replace(b"K\x06", b"K\x60")) + b".",
    "contents that are empty": storage(b"") + b".",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pickles_say_where(name):
    with pytest.raises(ValueError, match=r"damaged pickle at byte \d+ of \d+: |refused"):
        loads(DAMAGED[name])


def test_depth_and_size_are_harmless():
    deep = b"]" * 200_000 + b"a" * 199_999 + b"."
    assert type(loads(deep)) is list
    assert type(loads(b"N" + b"\x85" * 200_000 + b".")) is tuple
    assert loads(b"Nr\xff\xff\xff\xff.") is None  # the C unpickler allocates 64 GB for this
    with pytest.raises(UnsafePickleError, match="refused: a dict key"):
        loads(b"}N" + b"\x85" * 200_000 + b"Ns.")
    words = text("a" * 1_000_000) + b"q\x00" + text("latin1") + b"q\x01"
    bomb = b"(" + words + b"c_codecs\nencode\nh\x00h\x01\x86R" * 100 + b"t."
    with pytest.raises(UnsafePickleError, match="16 times its own size"):
        loads(bomb)


def test_only_exact_names_are_known():
    assert all(len(key) == 2 and "*" not in "".join(key) for key in NAMES)
    for module, name in NAMES:
        for near in ((module, name + "_"), (module + ".x", name), (module, name[:-1]), (module.split(".")[0], name)):
            if near not in NAMES:
                with pytest.raises(UnsafePickleError, match="asks for"):
                    loads(named(*near))


def test_every_operation_of_pickle_is_known_or_refused():
    known = set(unpickle._STEPS) | {pickle.STOP}
    for code in range(256):
        if bytes([code]) not in known:
            with pytest.raises(UnsafePickleError, match="refused: operation"):
                loads(bytes([code]) + b"\x00" * 20 + b".")


def test_pt_files_know_pyg_and_nothing_else(tmp_path):
    with pyg_modules("2.x") as data:
        torch.save([data(z=torch.arange(3)), {"z": 1}], tmp_path / "good.pt")
    torch.save([_Opens(str(tmp_path / "ran"))], tmp_path / "bad.pt")
    loaded = load_pt(tmp_path / "good.pt")
    assert isinstance(loaded[0], PyGObject)
    np.testing.assert_array_equal(fields(loaded[0])["z"], [0, 1, 2])
    with pytest.raises(UnsafePickleError, match="asks for eval"):
        load_pt(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:300])
    with pytest.raises(ValueError, match="damaged"):
        load_pt(tmp_path / "cut.pt")


RECORD = oc_record()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, len(RECORD) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes_give_values_or_the_documented_errors(changes):
    record = bytearray(RECORD)
    for at, value in changes:
        record[at] = value
    try:
        fields(loads(bytes(record)))
    except ValueError as error:
        if not str(error).startswith(("damaged pickle", "refused", "expected PyG data")):
            raise
