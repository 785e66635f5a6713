"""Subsets of blocks in one walk against pruned models, the scores of blocks against their definitions, the search."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from support.few import few
from support.inputs import require_native
from support.tolerances import relative_error

import ejmp
from ejmp import cli
from ejmp.compress.relevance import block_relevance
from ejmp.compress.subsets import all_subsets, stream_change, subset_outputs, without_one
from ejmp.train import search as module
from ejmp.train.evaluate import evaluate
from ejmp.train.sources import demo_mix, tasks_of, with_tasks_of
from ejmp.train.start import new_model


@pytest.fixture(scope="module")
def graph(tiny):
    from ase.build import bulk, molecule

    crystal = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    crystal.rattle(0.05, seed=1)
    return ejmp.build_graph([crystal, molecule("CH3CH2OH")], 5.0, 12, dtype=tiny.dtype)


@pytest.fixture(scope="module")
def three(tiny_config):
    torch.manual_seed(0)
    return ejmp.JMP(dataclasses.replace(tiny_config, blocks=3), backend="reference").double().eval()


def test_all_subsets():
    assert len(all_subsets(6)) == 63
    assert all_subsets(2) == [(0, 1), (0,), (1,)]
    assert without_one((0, 2, 5)) == [(2, 5), (0, 5), (0, 2)]
    assert without_one((3,)) == []


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_outputs_are_those_of_pruned_models(three, graph, backend):
    if backend == "native":
        require_native()
    model = three.on(backend=backend)
    with torch.no_grad():
        found = dict(subset_outputs(model, graph, all_subsets(3)))
        assert set(found) == set(all_subsets(3))
        for subset, output in found.items():
            expected = ejmp.prune(model, keep=subset)(graph)
            assert relative_error(output.energy, expected.energy) < 1e-12
            assert relative_error(output.forces, expected.forces) < 1e-12


def test_each_beginning_is_computed_once(three, graph, monkeypatch):
    calls = []
    executor = three.executor(graph)
    block = type(executor).block
    monkeypatch.setattr(type(executor), "block", lambda *args: calls.append(1) or block(*args))
    with torch.no_grad():
        list(subset_outputs(three, graph, all_subsets(3)))
    assert len(calls) == 7


def test_outputs_can_be_differentiated(three, graph):
    positions = graph.positions.detach().requires_grad_()
    for subset, output in subset_outputs(three, graph.with_positions(positions), [(0,), (0, 2)], direct_forces=False):
        assert output.forces is None
        (gradient,) = torch.autograd.grad(output.energy[:, 0].sum(), positions, retain_graph=True)
        expected = ejmp.gradient_forces(ejmp.prune(three, keep=subset), graph)
        assert relative_error(-gradient, expected) < 1e-10


@pytest.mark.parametrize("subset", [(), (1, 0), (0, 0), (3,), (-1,)])
def test_bad_subsets_are_named(three, graph, subset):
    with pytest.raises(ValueError, match=r"subsets: expected blocks of 0\.\.2 in order, got"):
        list(subset_outputs(three, graph, [subset]))


def test_stream_change(three, graph):
    """A block whose parameters are zero gives back what comes in, over sqrt(2) in parts: it does not turn it."""
    change = stream_change(three, [graph, graph])
    once = stream_change(three, [graph])
    assert torch.allclose(change.influence, once.influence)
    assert ((change.influence > 0) & (change.angle > 0) & (change.angle < 1)).all()
    still = ejmp.prune(three, blocks=3)
    with torch.no_grad():
        for parameter in still.backbone.int_blocks[1].parameters():
            parameter.zero_()
    assert stream_change(still, [graph]).influence[1] < 1e-12
    assert stream_change(still, [graph]).influence[0] == change.influence[0]
    with pytest.raises(ValueError, match="expected at least one, got none"):
        stream_change(three, [])


def test_taylor_is_the_change_of_the_loss_to_first_order(three, graph):
    """The final MLP alone reads x_E, so the gradient at it can be taken by hand."""

    def loss(output, _graph):
        return output.energy.abs().sum()

    scores = block_relevance(three, [graph], loss=loss, score="taylor")
    features = three.features(graph)
    x = [f.detach().requires_grad_() for f in features.x_E]
    value = loss(three.heads(three.final_mlp(tuple(x), features.x_F, graph), graph), graph)
    for number, gradient in enumerate(torch.autograd.grad(value, x)):
        expected = (x[number] * gradient).sum(1).abs().sum() / x[number].numel()
        assert math.isclose(scores.energy[number], expected.item(), rel_tol=1e-9)


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    """A saved model of three blocks with the demo mix's tasks, and a few structures of these."""
    sources = few(demo_mix(), 10)
    model = new_model(dataclasses.replace(tiny_config, blocks=3, num_tasks=4), sources, seed=0)
    model.tasks = tasks_of(sources)
    path = tmp_path_factory.mktemp("model") / "model"
    ejmp.save(model, path)
    return model, sources, path


def test_search_finds_what_evaluation_says(trained, ranks):
    model, sources, path = trained
    sources = with_tasks_of(path, sources, model)
    found = module.search(model, sources, structures=4, refit=1, refit_structures=16)
    assert set(found.ratios) == set(all_subsets(3))
    assert math.isclose(found.ratios[0, 1, 2], 1.0, rel_tol=1e-6)
    some = [module.at_most(source, "val", 4) for source in sources]
    whole = evaluate(model, some, ranks)
    for subset in ((0, 1), (1,)):
        errors = evaluate(ejmp.prune(model, keep=subset), some, ranks)
        logs = [math.log(errors[name]["forces_meV_per_A"] / whole[name]["forces_meV_per_A"]) for name in whole]
        assert math.isclose(found.ratios[subset], math.exp(sum(logs) / 4), rel_tol=1e-5)
    assert found.scores["removal"] == [found.ratios[1, 2], found.ratios[0, 2], found.ratios[0, 1]]
    assert {len(values) for values in found.scores.values()} == {3}
    assert len(found.refitted) == 2  # of two blocks and of one
    size = min(itertools.combinations(range(3), 2), key=lambda subset: found.ratios[subset])
    assert found.best(2) == (size, found.ratios[size])
    text = module.text_of(found)
    assert f"| 2 | {module.name_of(size)} | {found.ratios[size]:.3f} | {found.ratios[0, 1]:.3f} |" in text
    assert "| removal |" in text


def test_many_blocks_are_left_out_one_by_one(trained, monkeypatch):
    model, sources, path = trained
    monkeypatch.setattr(module, "EXHAUSTIVE", 2)
    found = module.search(model, with_tasks_of(path, sources, model), structures=2)
    assert {len(subset) for subset in found.ratios} == {1, 2}
    assert len(found.ratios) == 3 + 2
    best, _ = found.best(2)
    assert all(set(subset) < set(best) for subset in found.ratios if len(subset) == 1)


def test_rank_correlation():
    assert module.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert module.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert module.rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert math.isnan(module.rank_correlation([1], [1]))


def test_command(trained, tmp_path, capsys):
    path = trained[2]
    output = tmp_path / "found.json"
    assert cli.main(["search", str(path), "--structures", "1", "--output", str(output)]) == 0
    assert "| blocks | best to keep | error | error of the first ones |" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert set(found["ratios"]) == {"0,1,2", "0,1", "0,2", "1,2", "0", "1", "2"}
    assert set(found["scores"]) == {"removal", "grad-cam", "taylor", "block influence", "angular distance"}
    assert found["provenance"]["torch"] == torch.__version__
    assert cli.main(["search", str(path), "--structures", "0"]) == 2
    assert "--structures: expected 1 or more, got 0" in capsys.readouterr().err
