"""The final MLP refitted after a cut, against numpy's least squares, and what it wins on the demo data."""

import numpy as np
import pytest
import torch
from ase.build import molecule

import ejmp
from ejmp.compress import refit as module

NAMES = ("CH3OH", "H2O", "C2H6", "NH3", "CH3CHO", "C2H4")
LAYER = "backbone.out_mlp_{}.out_mlp.0.linear.weight"


@pytest.fixture(scope="module")
def graphs():
    """Ten structures of three graphs, each moved a little."""
    random, found = np.random.default_rng(0), []
    for names in (NAMES[:3], NAMES[3:], NAMES[:4]):
        atoms = [molecule(name) for name in names]
        for one in atoms:
            one.positions += random.normal(0, 0.05, one.positions.shape)
        found.append(ejmp.build_graph(atoms, 8.0, dtype=torch.float64))
    return found


def rows(model, teacher, graphs, branch):
    """Inputs of the layer, what it lacks of the teacher's value, and the structure of each row, as numpy arrays."""
    inputs, missing, structure, count = [], [], [], 0
    for graph in graphs:
        of = graph.batch if branch == "E" else graph.batch[graph.main.target]
        both = []
        for one in (model, teacher):
            x = torch.cat(getattr(one.features(graph), f"x_{branch}"), 1)
            both.append((x, x @ one.get_parameter(LAYER.format(branch)).T))
        inputs.append(both[0][0])
        missing.append(both[1][1] - both[0][1])
        structure.append(of + count)
        count += graph.num_structures
    return [torch.cat(parts).detach().numpy() for parts in (inputs, missing, structure)]


@pytest.mark.parametrize("keep", [(0,), (0, 1), (1, 2)])
@pytest.mark.parametrize("branch", ["E", "F"])
def test_it_is_ridge_regression(tiny, graphs, keep, branch):
    """The correction is numpy's for the same ridge, and no other ridge has less error on the structures held out."""
    sliced, fitted = ejmp.prune(tiny, keep=keep), ejmp.prune(tiny, keep=keep, final_mlp="refit", data=graphs)
    x, y, structure = rows(sliced, tiny, graphs, branch)
    held = structure % module.HELD_OUT == module.HELD_OUT - 1

    def ridge(x, y, share):
        """Least squares with rows added that pull each weight towards 0."""
        size = np.sqrt(share) * np.linalg.norm(x, axis=0)
        return np.linalg.lstsq(
            np.concatenate([x, np.diag(size)]), np.concatenate([y, np.zeros((len(size), y.shape[1]))])
        )[0]

    errors = {share: np.sum((y[held] - x[held] @ ridge(x[~held], y[~held], share)) ** 2) for share in module.RIDGES}
    best = min(errors, key=errors.get)
    name = LAYER.format(branch)
    found = (fitted.get_parameter(name) - sliced.get_parameter(name)).detach().numpy().T
    if errors[best] < np.sum(y[held] ** 2):
        np.testing.assert_allclose(x @ found, x @ ridge(x, y, best), rtol=0, atol=1e-6 * np.abs(y).max())
    else:
        assert not found.any()


def test_nothing_cut_nothing_changed(tiny, graphs):
    same = ejmp.prune(tiny, blocks=3, final_mlp="refit", data=graphs)
    for name, value in tiny.state_dict().items():
        assert torch.equal(same.state_dict()[name], value), name


def test_only_the_first_layer_changes(tiny, graphs):
    sliced, fitted = ejmp.prune(tiny, blocks=1), ejmp.prune(tiny, blocks=1, final_mlp="refit", data=iter(graphs))
    different = {n for n, value in sliced.state_dict().items() if not torch.equal(value, fitted.state_dict()[n])}
    assert different == {LAYER.format(branch) for branch in "EF"}


def test_refused(tiny, graphs):
    with pytest.raises(ValueError, match=r'data= is what final_mlp="refit", edge_channels= and'):
        ejmp.prune(tiny, blocks=1, final_mlp="refit")
    with pytest.raises(ValueError, match=r'data= is what final_mlp="refit", edge_channels= and'):
        ejmp.prune(tiny, blocks=1, data=graphs)
    with pytest.raises(ValueError, match="expected graphs of 5 structures or more, got 3"):
        ejmp.prune(tiny, blocks=1, final_mlp="refit", data=graphs[:1])
    broken = ejmp.prune(tiny, blocks=3)
    with torch.no_grad():
        broken.get_parameter(LAYER.format("E"))[0, 0] = float("nan")
    with pytest.raises(ValueError, match="graph 0: a feature is not finite"):
        ejmp.prune(broken, blocks=2, final_mlp="refit", data=graphs)
