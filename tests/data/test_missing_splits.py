"""What is said when a split is not there, or a folder is one level too high or too low."""

import re

import ase.build
import ase.io
import pytest

from ejmp import cli
from ejmp.data import open_store
from ejmp.data.store.conversion import convert
from ejmp.model.task import Task
from ejmp.train.sources import TaskData, from_stores


@pytest.fixture
def own(tmp_path):
    """A dataset with a split for training and one for testing."""
    ase.io.write(tmp_path / "own.xyz", [ase.build.molecule("CH4")] * 2)
    for split in ("train", "test"):
        convert(tmp_path / "own.xyz", tmp_path / "own", format="ase", split=split)
    return tmp_path / "own"


def test_a_dataset_where_a_split_is_needed(own, capsys):
    message = f"{own}: no dataset.json: expected the folder of one split, one of {own}/test, {own}/train"
    with pytest.raises(ValueError, match=re.escape(message)):
        open_store(own)
    assert cli.main(["data", "info", str(own)]) == 2
    assert message in capsys.readouterr().err


def test_a_split_where_a_dataset_is_needed(own):
    message = f"data: {own}/train is one split; expected the folder of all of them, {own}"
    with pytest.raises(ValueError, match=re.escape(message)):
        from_stores(f"own={own}/train")


def test_a_split_that_is_not_there(own):
    source = TaskData(splits={name: open_store(own / name) for name in ("train", "test")}, task=Task(name="own"))
    message = "own: there is no split 'val', only train, test; `ejmp data convert --split val` makes it"
    with pytest.raises(ValueError, match=re.escape(message)):
        source.split("val")


def test_unknown_splits_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--split", "tset"])
    error = capsys.readouterr().err
    assert all(name in error for name in ("'tset'", "train", "val", "test"))
