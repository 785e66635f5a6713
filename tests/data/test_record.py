"""Records: every structure comes back as it was encoded, and other bytes are refused."""

import dataclasses
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.data_store import same

from ejmp.data import DamagedRecord, Structure
from ejmp.data.store.record import HEADER_BYTES, decode, encode

FULL = Structure(
    numbers=np.array([1, 8, 120]),
    positions=np.array([[0.1, -0.0, 1e-300], [1, 2, 3], [np.pi, 5, 6]]),
    cell=np.arange(9.0).reshape(3, 3),
    pbc=np.array([True, False, True]),
    tags=np.array([0, 1, 2]),
    fixed=np.array([True, False, True]),
    energy=-1234.56789,
    forces=np.arange(9, dtype=np.float32).reshape(3, 3),
    targets={"band gap": 1.5, "µ": -0.0},
    id="frame 7 / Å",
)
BARE = Structure(numbers=np.array([6]), positions=np.zeros((1, 3)))


@pytest.mark.parametrize("structure", [FULL, BARE])
def test_round_trip(structure):
    back = decode(encode(structure, 5), 5)
    assert same(structure, back)
    assert back.positions.dtype == np.asarray(structure.positions).dtype
    assert back.numbers.dtype == np.int64
    assert back.positions.flags.writeable
    if structure is FULL:
        assert back.forces.dtype == np.float32
        assert back.targets == {"band gap": 1.5, "µ": -0.0}
        assert np.signbit(back.targets["µ"])
    else:
        assert back.energy is back.forces is back.cell is back.tags is back.fixed is None


@st.composite
def structures(draw):
    n = draw(st.integers(1, 40))
    width = st.sampled_from([np.float32, np.float64])
    maybe = lambda strategy: draw(st.none() | strategy)  # noqa: E731
    vectors = lambda: hnp.arrays(draw(width), (n, 3))  # noqa: E731
    return Structure(
        numbers=draw(hnp.arrays(np.int64, n, elements=st.integers(1, 120))),
        positions=draw(vectors()),
        cell=maybe(hnp.arrays(np.float64, (3, 3))),
        pbc=draw(hnp.arrays(bool, 3)),
        tags=maybe(hnp.arrays(np.int64, n, elements=st.integers(0, 2))),
        fixed=maybe(hnp.arrays(bool, n)),
        energy=maybe(st.floats(allow_nan=False)),
        forces=maybe(vectors()),
        targets=draw(
            st.dictionaries(st.text(st.characters(codec="utf-8", exclude_characters="\0")), st.floats(allow_nan=False))
        ),
        id=draw(st.text(st.characters(codec="utf-8", exclude_characters="\0"))),
    )


@settings(max_examples=80, deadline=None)
@given(structures(), st.integers(0, 2**64 - 1))
def test_any_structure_round_trips(structure, number):
    data = encode(structure, number)
    assert same(structure, decode(data, number))
    assert encode(decode(data), number) == data


def test_layout_is_as_documented():
    """A record can be read with struct alone, as its documentation says."""
    data = encode(FULL, 7)
    magic, version, _, n, targets, text, number = struct.unpack_from("<4sHHIHHQ", data)
    assert (magic, version, n, targets, number) == (b"EJMR", 1, 3, 2, 7)
    assert struct.unpack_from("<d9d2d", data, 32) == (-1234.56789, *range(9), 1.5, -0.0)
    assert np.frombuffer(data, "<f8", 9, 32 + 96).tolist() == FULL.positions.ravel().tolist()
    assert np.frombuffer(data, "<f4", 9, 32 + 96 + 72).tolist() == list(range(9))
    assert list(data[32 + 96 + 72 + 36 : -text]) == [1, 8, 120, 0, 1, 2, 1, 0, 1]
    assert data[-text:].decode() == "frame 7 / Å\0band gap\0µ"


@pytest.mark.parametrize("structure", [FULL, BARE])
def test_every_flipped_bit_and_every_length_is_noticed(structure):
    data = encode(structure, 3)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedRecord):
            decode(bytes(damaged), 3)
    for length in range(len(data)):
        with pytest.raises(DamagedRecord):
            decode(data[:length])
    with pytest.raises(DamagedRecord):
        decode(data + b"\0")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_refused(data, with_magic):
    with pytest.raises(DamagedRecord):
        decode(b"EJMR" + data if with_magic else data)


def test_a_record_knows_its_number():
    with pytest.raises(DamagedRecord, match="expected the record of structure 4, got that of structure 3"):
        decode(encode(BARE, 3), 4)


def test_a_later_version_is_named():
    import hashlib

    data = bytearray(encode(BARE))
    data[4] = 2
    data[24:32] = hashlib.blake2b(data[:24] + data[HEADER_BYTES:], digest_size=8).digest()
    with pytest.raises(DamagedRecord, match="version 2"):
        decode(bytes(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numbers": np.array([0])}, "numbers: expected integers"),
        ({"numbers": np.array([121])}, "numbers: expected integers"),
        ({"numbers": np.array([1.0])}, "numbers: expected integers"),
        ({"numbers": np.array([], int), "positions": np.zeros((0, 3))}, "numbers: expected integers"),
        ({"positions": np.zeros((2, 3))}, r"positions: expected floats \(1, 3\)"),
        ({"positions": np.array([["a", "b", "c"]])}, "positions: expected floats"),
        ({"forces": np.zeros(3)}, "forces: expected floats"),
        ({"cell": np.zeros(3)}, "cell: expected floats"),
        ({"tags": np.array([-1])}, "tags: expected integers"),
        ({"tags": np.array([1, 2])}, "tags: expected integers"),
        ({"fixed": np.array([2])}, "fixed: expected integers"),
        ({"id": "a\0b"}, "names without NUL"),
        ({"id": "a" * 70000}, "65,535 bytes"),
        ({"targets": {"\0": 1.0}}, "names without NUL"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        encode(dataclasses.replace(BARE, **change))
