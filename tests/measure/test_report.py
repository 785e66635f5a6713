"""Tables and pictures of saved results."""

import copy
import json

import pytest
from support.inputs import ROOT

from ejmp.markdown import markdown_table
from ejmp.measure import report


@pytest.fixture
def blocks():
    """The committed block-count benchmark."""
    return json.loads((ROOT / "benchmarks/results/blocks_mof_cpu.json").read_text())


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_short_table_is_the_long_one_with_fewer_columns(blocks):
    short, long = cells(report.short_table(blocks)), cells(report.table(blocks))
    titles = [
        "precision",
        "blocks",
        "structures/s",
        "x of 6 blocks",
        "published x",
        "x of the plain-torch model",
        "MiB",
    ]
    assert short[0] == titles
    places = [long[0].index(t) for t in (*titles[:5], "x of reference", "peak MiB")]
    assert len(short) == len(long) == 2 + len(blocks["rows"])
    assert short[2:] == [[row[i] for i in places] for row in long[2:]]
    assert short[2] == ["fp32", "6", "0.434", "1.00", "1.00", "2.35", "142"]


def test_what_was_not_measured(blocks):
    alone = copy.deepcopy(blocks)
    for row in alone["rows"]:
        del row["speedup"], row["published_throughput_ratio"]
    with pytest.raises(ValueError, match="--compare"):
        report.short_table(alone)
    head, _, first, *_ = cells(report.table(alone))
    assert first[head.index("published x")] == "-"
    assert "x of reference" not in head


def test_markdown():
    assert markdown_table(["", "b"], [["x", "1"]], numbers=True) == "| | b |\n| --- | ---: |\n| x | 1 |"


def test_relevance(tmp_path):
    scores = {"one": {"energy": [1.0, 3.0], "combined": [0.5, 0.5]}, "two": {"combined": [0.0, 0.0]}}
    rows = cells(report.relevance_table(scores))
    assert rows[0] == ["dataset", "branch", "embedding", "block 0"]
    assert rows[2:] == [
        ["one", "energy", "25.0", "75.0"],
        ["one", "combined", "50.0", "50.0"],
        ["two", "combined", "0.0", "0.0"],
    ]
    report.relevance_picture(scores, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
