"""Limits: which hold where, what their errors say, and what is no regular file."""

import os
import threading
import time

import pytest

from ejmp.limits import (
    FLOOR,
    LimitError,
    Limits,
    RefusedFileError,
    check_limit,
    check_unpacked,
    current_limits,
    limiting,
    open_regular,
    parse_limits,
    read_whole,
)


def test_limits_hold_in_their_block():
    assert current_limits() == Limits()
    with limiting(atoms=7) as outer:
        assert (outer.atoms, outer.frames) == (7, Limits().frames)
        with limiting(frames=3):
            assert (current_limits().atoms, current_limits().frames) == (7, 3)
        with pytest.raises(LimitError):
            check_limit("a.xyz", "atoms", 8, "atoms")
    check_limit("a.xyz", "atoms", 8, "atoms")
    assert current_limits() == Limits()


def test_limits_do_not_reach_other_threads():
    seen = []
    with limiting(atoms=7):
        thread = threading.Thread(target=lambda: seen.append(current_limits().atoms))
        thread.start()
        thread.join()
    assert seen == [Limits().atoms]


@pytest.mark.parametrize("wrong", [{"atom": 1}, {"atoms": 0}, {"atoms": -1}, {"atoms": 1.5}, {"atoms": True}])
def test_impossible_limits(wrong):
    with pytest.raises(ValueError, match="atom"), limiting(**wrong):
        pass


def test_limits_as_text():
    assert parse_limits(["atoms=5", "read_bytes=2e9"]) == {"atoms": 5, "read_bytes": 2_000_000_000}
    for wrong in ("atoms", "atoms=", "atoms=many", "atoms=inf", "=x"):
        with pytest.raises(ValueError, match="--limit: expected NAME=VALUE"):
            parse_limits([wrong])


def test_the_error_says_everything():
    with pytest.raises(LimitError) as caught:
        check_limit("folder/a.xyz", "atoms", 300_000_000, "atoms in frame 3")
    text = str(caught.value)
    for part in ("folder/a.xyz: 300,000,000 atoms in frame 3", "limit atoms is 100,000", "--limit atoms=300000000"):
        assert part in text
    assert "ejmp.limits.limiting(atoms=300000000)" in text


def test_what_the_error_proposes_is_enough():
    for unpacked, packed in ((FLOOR + 1, 10), (10**9, 999_999), (FLOOR + 1, 0)):
        with pytest.raises(LimitError) as caught:
            check_unpacked("a.gz", unpacked, packed)
        ratio = int(str(caught.value).partition("--limit unpacked_ratio=")[2].partition(" ")[0])
        if packed:
            with limiting(unpacked_ratio=ratio):
                check_unpacked("a.gz", unpacked, packed)
    check_unpacked("a.gz", FLOOR, 1)
    check_unpacked("a.gz", 100 * (FLOOR + 1), FLOOR + 1)


def test_regular_files_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, kind in {"pipe": "a FIFO", "zero": "a character device", "": "a folder"}.items():
        start = time.monotonic()
        with pytest.raises(RefusedFileError, match=f"expected a regular file, got {kind}"):
            open_regular(tmp_path / name)
        assert time.monotonic() - start < 1
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nothing")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"abc")
    assert read_whole(tmp_path / "link") == b"abc"


def test_a_fifo_that_takes_the_place_of_a_file(tmp_path, monkeypatch):
    """It is there between the look at the file and its opening."""
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    real = os.open

    def open_later(name, *arguments):
        path.unlink()
        os.mkfifo(path)
        return real(name, *arguments)

    monkeypatch.setattr(os, "open", open_later)
    with pytest.raises(RefusedFileError, match="got a FIFO"):
        open_regular(path)


def test_files_that_are_too_large(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(LimitError, match="1,099,511,627,776 bytes: the limit config_bytes is 1,048,576"):
        read_whole(tmp_path / "sparse", "config_bytes")
