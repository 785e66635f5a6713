"""The front of accuracy against speed: what is made, measured and kept, and what is on it."""

import dataclasses
import json

import pytest
import torch
from support.few import few

import ejmp
from ejmp.compress.config import DistillConfig
from ejmp.study import front
from ejmp.study.settings import claim
from ejmp.train.demo import demo_teacher
from ejmp.train.evaluate import evaluate
from ejmp.train.search import ratio
from ejmp.train.sources import demo_mix, with_tasks_of


def settings(**changes):
    asked = {
        "model": str(demo_teacher()),
        "data": None,
        "blocks": (6, 2),
        "channels": (64, 24),
        "steps": (0, 2),
        "precisions": ("fp32", "bf16"),
        "terms": DistillConfig(),
        "structures": 4,
        "seconds": 0.1,
        "seed": 0,
    }
    return front.FrontSettings(**asked | changes)


@pytest.fixture(scope="module")
def made(ranks, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("front")
    sources = few(with_tasks_of(demo_teacher(), demo_mix(), ejmp.load(demo_teacher())), 8)
    lines = []
    return folder, sources, front.measure(folder, settings(), sources, ranks, lines.append), lines


def test_every_candidate_in_every_precision(made):
    _, _, result, lines = made
    names = ["b6-w64", "b6-w24", "b6-w24-kd2", "b2-w64", "b2-w64-kd2", "b2-w24", "b2-w24-kd2"]
    assert [(row["name"], row["precision"]) for row in result["rows"]] == [
        (name, precision) for name in names for precision in ("fp32", "bf16")
    ]
    assert [line.split(":")[0] for line in lines[:-1]] == names[1:]
    whole = result["rows"][0]
    assert (whole["speed"], whole["error"]) == (1, 1)
    speeds = {(row["name"], row["precision"]): row["structures_per_s"] for row in result["rows"]}
    assert speeds["b2-w64", "fp32"] > 1.5 * speeds["b6-w64", "fp32"]
    assert speeds["b2-w64", "fp32"] == speeds["b2-w64-kd2", "fp32"]  # training makes no difference


def test_errors_are_those_of_the_saved_models(made, ranks):
    folder, sources, result, _ = made
    chosen = [front.at_most(source, "val", 4, seed=0) for source in sources]
    whole = evaluate(ejmp.load(demo_teacher()), chosen, ranks)
    for row in result["rows"]:
        text = front.folder_of(row, folder, settings())
        path, _, precision = text.rpartition(" in ")
        model = ejmp.load(path).on(precision=precision)
        assert (model.config.blocks, model.config.emb_size_edge) == (row["blocks"], row["channels"])
        assert row["error"] == pytest.approx(ratio(evaluate(model, chosen, ranks), whole), rel=1e-6)
        assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_what_is_there_is_not_made_again(made, ranks, monkeypatch):
    folder, sources, result, _ = made
    monkeypatch.setattr(front, "train", None)
    monkeypatch.setattr(front, "prune", None)
    again = front.measure(folder, settings(), sources, ranks)
    assert [row["error"] for row in again["rows"]] == [row["error"] for row in result["rows"]]
    assert json.loads((folder / front.FRONT).read_text()) == again
    claim(folder, settings())
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        claim(folder, settings(seed=1))


def row(name, speed, error):
    return {"name": name, "speed": speed, "error": error}


def test_the_front_and_the_fastest_within_a_limit(made):
    rows = [row("whole", 1.0, 1.0), row("a", 1.5, 1.04), row("b", 1.4, 1.05), row("c", 2.0, 1.2), row("d", 2.0, 1.1)]
    front.mark(rows)
    assert [each["name"] for each in rows if each["on_front"]] == ["whole", "a", "d"]
    assert front.fastest({"rows": rows}, 5)["name"] == "a"
    assert front.fastest({"rows": rows}, 0)["name"] == "whole"
    assert front.fastest({"rows": rows}, 20)["name"] == "d"
    with pytest.raises(ValueError, match="expected 0 or more percent, got -1"):
        front.fastest({"rows": rows}, -1)
    measured = made[2]["rows"]
    for each in measured:
        better = [x for x in measured if x["speed"] > each["speed"] and x["error"] < each["error"]]
        assert not (each["on_front"] and better)
        assert each["on_front"] or any(front._dominates(x, each) for x in measured)


def test_table_and_picture(made, tmp_path):
    pytest.importorskip("matplotlib")
    result = made[2]
    lines = front.table(result).splitlines()
    assert len(lines) == 2 + len(result["rows"])
    assert sum("yes" in line for line in lines) == sum(each["on_front"] for each in result["rows"])
    front.picture(result, tmp_path / "front.svg")
    text = (tmp_path / "front.svg").read_text()
    assert "<svg" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": ()}, "--blocks"),
        ({"channels": (0,)}, "--channels"),
        ({"steps": (-1,)}, "--steps"),
        ({"precisions": ("fp4",)}, "--precisions"),
        ({"structures": 0}, "--structures"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_more_than_there_is(tmp_path, ranks):
    sources = demo_mix()
    for changes in ({"blocks": (7,)}, {"channels": (65,)}):
        with pytest.raises(ValueError, match="the model has"):
            front.measure(tmp_path, dataclasses.replace(settings(), **changes), sources, ranks)
