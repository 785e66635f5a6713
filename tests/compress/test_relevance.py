"""Block relevance beyond the golden outputs (test_golden.py): pooling, losses with labels, and the commands."""

import dataclasses

import pytest
import torch
from support.inputs import load_golden
from support.tolerances import assert_close

import ejmp
from ejmp import cli
from ejmp.data import DEMO_MIX, demo
from ejmp.data.sampling.batch import make_batch
from ejmp.graph.settings import GraphSettings
from ejmp.train.loss import multitask_loss
from ejmp.train.sources import demo_downstream, demo_mix, tasks_of
from ejmp.train.survey import survey
from ejmp.train.task import Task, Tasks


def by_hand(model, graphs, loss):
    """Scores with all graphs' parts put together before the mean."""
    parts = {"E": [], "F": []}
    for graph in graphs:
        features = model.features(graph)
        value = loss(model.heads(features, graph))
        for branch, found in parts.items():
            blocks = getattr(features, f"x_{branch}")
            gradients = torch.autograd.grad(value, blocks, retain_graph=True)
            found.append(torch.stack([(x * g).relu() for x, g in zip(blocks, gradients, strict=True)]))
    return [torch.cat(parts[branch], dim=1).mean((1, 2)).detach() for branch in "EF"]


def test_several_graphs_are_pooled(tiny):
    """Scores of graphs of different sizes, one by one, are those of one batch."""
    structures = load_golden("batch").structures
    graphs = [ejmp.build_graph(s, 8.0, dtype=torch.float64) for s in structures]
    scores = ejmp.block_relevance(tiny, iter(graphs))
    together = ejmp.block_relevance(tiny, [ejmp.build_graph(structures, 8.0, dtype=torch.float64)])
    expected = by_hand(tiny, graphs, lambda out: out.energy.abs().sum() + out.forces.abs().sum())
    for found in (scores, together):
        assert_close(found.energy, expected[0])
        assert_close(found.forces, expected[1])
    shares = [branch / branch.sum() for branch in expected]
    assert_close(scores.combined, (shares[0] + shares[1]) / 2)


@pytest.mark.parametrize("frozen", ["all", "embedding and first output", "none"])
def test_a_frozen_model_scores_as_a_free_one(tiny, frozen):
    graph = ejmp.build_graph(load_golden("ethanol").structures, 8.0, dtype=torch.float64)
    expected = by_hand(tiny, [graph], lambda out: out.energy.abs().sum() + out.forces.abs().sum())
    chosen = {
        name: parameter
        for name, parameter in tiny.named_parameters()
        if frozen == "all" or (frozen != "none" and name.startswith(("embedding", "backbone.out_blocks.0")))
    }
    try:
        for parameter in chosen.values():
            parameter.requires_grad_(False)
        with torch.no_grad():
            scores = ejmp.block_relevance(tiny, [graph])
        assert [name for name, p in tiny.named_parameters() if not p.requires_grad] == list(chosen)
        assert all(p.grad is None for p in tiny.parameters())
    finally:
        tiny.requires_grad_(True)
    assert_close(scores.energy, expected[0])
    assert_close(scores.forces, expected[1])


def test_with_labels(tiny):
    data = demo("ani1x", "val")
    tasks = Tasks([Task.from_info(data.info, head=2, graph=GraphSettings(cutoff=8.0))])
    batch = make_batch([data[0], data[1]], [0, 0], settings=GraphSettings(cutoff=8.0), dtype=torch.float64)
    loss = lambda out, b: multitask_loss(out.energy, out.forces, b, tasks).total  # noqa: E731
    scores = ejmp.block_relevance(tiny, [batch], loss=loss)
    expected = by_hand(tiny, [batch.graph], lambda out: loss(out, batch))
    assert_close(scores.energy, expected[0])
    assert_close(scores.forces, expected[1])
    assert all(p.grad is None for p in tiny.parameters())
    source = dataclasses.replace(demo_mix()[2], task=tasks[0])
    found = survey(tiny, [source], structures=2, batch_size=1, labels=True)["ani1x"]
    assert found["energy"] == pytest.approx(
        ejmp.block_relevance(tiny, [batch], loss=lambda out, b: 2 * loss(out, b)).energy.tolist()
    )


def test_scalar_model(tiny_config):
    """Without a force branch there is one row of scores."""
    model = ejmp.JMP(dataclasses.replace(tiny_config, direct_forces=False, num_tasks=1)).double()
    scores = ejmp.block_relevance(model, [load_golden("ethanol").graph()])
    assert scores.forces is None
    assert_close(scores.combined, scores.energy / scores.energy.sum())
    found = survey(model, [demo_downstream("qm9")], structures=2)
    assert list(found["qm9"]) == ["energy", "combined"]


def test_refused(tiny):
    with pytest.raises(ValueError, match="graphs: expected at least one, got none"):
        ejmp.block_relevance(tiny, [])
    graph = load_golden("ethanol").graph()
    with pytest.raises(ValueError, match="batch 1: the gradient of the loss is not finite"):
        ejmp.block_relevance(
            tiny, [graph, graph], loss=lambda out, g, n=[0]: n.append(0) or out.energy.sum() / (3 - len(n))
        )


@pytest.fixture
def saved(tiny, tmp_path):
    model = ejmp.prune(tiny, blocks=tiny.config.blocks)
    model.tasks = tasks_of(demo_mix())
    ejmp.save(model, tmp_path / "model")
    return tmp_path / "model"


def test_relevance_command(saved, tmp_path, capsys):
    picture = tmp_path / "relevance.png"
    arguments = ["relevance", str(saved), "--structures", "1", "--output", str(picture)]
    assert cli.main(arguments) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[0] == ["dataset", "branch", "embedding", "block 0", "block 1", "block 2"]
    assert [row[:2] for row in rows[2:]] == [[n, b] for n in DEMO_MIX for b in ("energy", "forces", "combined")]
    for row in rows[2:]:
        assert sum(map(float, row[2:])) == pytest.approx(100, abs=0.3)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["relevance", str(saved), "--data", "mptrj"]) == 2
    assert cli.main(["relevance", str(saved), "--structures", "0"]) == 2
    error = capsys.readouterr().err
    assert "expected NAME=FOLDER,..., got 'mptrj'" in error
    assert "--structures: expected 1 or more, got 0" in error


def test_prune_command(saved, tmp_path, tiny, capsys):
    out = tmp_path / "small"
    assert cli.main(["prune", str(saved), str(out), "--keep", "0,2"]) == 0
    small = ejmp.load(out)
    expected = ejmp.prune(tiny, keep=(0, 2))
    assert small.config == expected.config
    assert all(torch.equal(small.state_dict()[name].double(), value) for name, value in expected.state_dict().items())
    count = f"{sum(p.numel() for p in expected.parameters()):,}"
    assert f"blocks 0, 2; {count} of" in capsys.readouterr().out
    assert cli.main(["prune", str(saved), str(out), "--blocks", "1"]) == 2  # there is a model
    assert ejmp.load(out).config == expected.config
    again = ["prune", str(saved), str(out), "--blocks", "1", "--final-mlp", "random", "--overwrite", "--seed"]
    weights = []
    for seed in ("1", "1", "2"):
        assert cli.main([*again, seed]) == 0
        weights.append(ejmp.load(out).backbone.out_mlp_E.out_mlp[0].linear.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    words = ["--final-mlp", "refit", "--structures", "16", "--overwrite"]
    assert cli.main(["prune", str(saved), str(out), "--blocks", "2", *words]) == 0
    refitted, sliced = ejmp.load(out), ejmp.prune(ejmp.load(saved), blocks=2)
    different = {n for n, value in sliced.state_dict().items() if not torch.equal(value, refitted.state_dict()[n])}
    assert different == {f"backbone.out_mlp_{branch}.out_mlp.0.linear.weight" for branch in "EF"}
    assert [task.name for task in refitted.tasks] == list(DEMO_MIX)
    assert cli.main(["prune", str(saved), str(out), "--blocks", "2", "--data", "oc20=x"]) == 2
    assert cli.main(["prune", str(saved), str(out), "--blocks", "2", "--final-mlp", "refit", "--structures", "0"]) == 2
    error = capsys.readouterr().err
    assert "--data: only --final-mlp refit, --edge-channels and --residuals look at structures" in error
    assert "--structures: expected 1 or more, got 0" in error
    assert cli.main(["prune", str(saved), str(out), "--keep", "a"]) == 2
    assert cli.main(["prune", str(saved), str(out), "--blocks", "9", "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert "--keep: expected numbers with commas" in error
    assert "got [0, 1, 2, 3, 4, 5, 6, 7, 8]" in error
    assert cli.main(["prune", str(saved), str(out)]) == 2
    assert "expected one of blocks= and keep=, or edge_channels=" in capsys.readouterr().err
