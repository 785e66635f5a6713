"""Frames of xyz files, read in blocks, against the same files taken apart line by line."""

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ejmp.data.readers import xyz
from ejmp.limits import LimitError, limiting

COMMENTS = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=30)
ROWS = st.lists(
    st.sampled_from(["H 0 0 0", "Cl 1.5 -2e3 0.25 T", "O 0 0 1\r", "\u00c4 0 0 0\u2028"]), min_size=1, max_size=9
)


def frames_of(text, block):
    before, xyz.BLOCK = xyz.BLOCK, block
    try:
        return list(xyz.iter_frames(io.BytesIO(text), Path("a.xyz")))
    finally:
        xyz.BLOCK = before


@given(st.lists(st.tuples(COMMENTS, ROWS), max_size=6), st.integers(1, 80), st.sampled_from(["", "\n", "\n \n\n"]))
def test_frames(frames, block, end):
    """Each frame is its lines, whatever the blocks are that the file is read in and however it ends."""
    texts = [f"{len(rows)}\n{comment}\n" + "\n".join(rows) for comment, rows in frames]
    expected = [text + "\n" for text in texts]
    if texts and not end:
        expected[-1] = texts[-1]
    found = frames_of(("\n".join(texts) + end).encode(), block)
    assert [frame.removesuffix("\n") for frame in found] == [frame.removesuffix("\n") for frame in expected]


@pytest.mark.parametrize("block", [1, 5, 1000])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"1\nc\nH 0 0 0\n2\nc\nH 0 0 0\n", "frame 1: it ends early"),
        (b"1\nc\nH 0 0 0\n2\nc\nH 0 0 0\n \n", "frame 1: it ends early"),
        (b"2", "frame 0: it ends early"),
        (b"1\nc\nH 0 0 0\nc\n", "frame 1: expected 1 to .* got b'c'"),
        (b"1\nc\nH 0 0 0\n\n1\nc\n", "frame 1: expected a number of atoms, got an empty line"),
        (b"1\n\xff\nH 0 0 0\n", "frame 0: it is not text"),
        (b"0\nc\n", "frame 0: expected 1 to"),
    ],
)
def test_faults(block, text, problem):
    with pytest.raises(ValueError, match=rf"a\.xyz: {problem}"):
        frames_of(text, block)


@pytest.mark.parametrize("block", [1, 100, 10_000])
def test_lines_that_are_too_long(block):
    """A line may have 512 bytes here; the lines of atoms 2 each, on average, beside one long line."""
    good = b"1\n" + b"c" * 500 + b"\nH 0 0 0\n"
    with limiting(line_bytes=512):
        assert len(frames_of(good * 3, block)) == 3
        for bad in (b"1\n" + b"c" * 600 + b"\nH 0 0 0\n", b"7" * 600, b"200\nc\n" + b"H 0 0 0\n" * 200):
            with pytest.raises(LimitError, match="bytes or more in a line of frame 1"):
                frames_of(good + bad, block)


def test_parts_begin_where_their_frames_are(tmp_path, monkeypatch):
    monkeypatch.setattr(xyz, "SLICE", 2)
    path = tmp_path / "a.xyz"
    path.write_text("".join(f"{n}\ncomment {n}\n" + "H 0 0 0\n" * n for n in range(1, 8)))
    found = [item for part in xyz.xyz_parts(path) for item in xyz.read_frames(path, part)]
    assert [k for k, _ in found] == list(range(7))
    assert [text.split("\n")[1] for _, text in found] == [f"comment {n}" for n in range(1, 8)]
