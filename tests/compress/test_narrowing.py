"""Narrower blocks: what has no effect is removed without a trace, the rest is least squares, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from ase.build import molecule
from support.inputs import load_golden, require_native
from support.tolerances import assert_close, relative_error

import ejmp
from ejmp.compress import narrowing
from ejmp.compress.config import DistillConfig, parse_residuals
from ejmp.data import InOrder
from ejmp.model.interactions import QuadrupletInteraction, TripletInteraction
from ejmp.model.layers import Residual
from ejmp.train.demo import demo_teacher
from ejmp.train.objective import Distillation, freeze_blocks
from ejmp.train.sources import demo_mix, graphs_of, loader_of, tasks_of
from ejmp.train.start import new_model

WIDE = 60


@pytest.fixture(scope="module")
def graphs(tiny):
    return [ejmp.build_graph([molecule(name)], 8.0, dtype=tiny.dtype) for name in ("CH3CH2OH", "CH3CHO", "C2H6")]


@pytest.fixture(scope="module")
def wide(tiny):
    """The golden model with twelve channels more, all of them zero, at random places, and hidden channels shuffled."""
    generator = torch.Generator().manual_seed(0)
    model = ejmp.JMP(dataclasses.replace(tiny.config, emb_size_edge=WIDE)).double()
    places = torch.randperm(WIDE, generator=generator)[: tiny.config.emb_size_edge].sort().values
    state = model.state_dict()
    model.load_state_dict({name: spread(value, state[name].shape, places) for name, value in tiny.state_dict().items()})
    for writers, readers in hidden_layers(model):
        order = torch.randperm(WIDE, generator=generator)
        for layer in writers:
            layer.weight.data = layer.weight.data[order]
            if layer.bias is not None:
                layer.bias.data = layer.bias.data[order]
        for layer in readers:
            layer.weight.data = layer.weight.data[:, order]
    return model


def spread(value, shape, places):
    """Put values at these places of each dimension that is longer than theirs, and zeros elsewhere."""
    for dim, want in enumerate(shape):
        have = value.shape[dim]
        if have != want:
            parts = (want - have) // (WIDE - len(places))  # the final MLP's first layer reads one set for each block
            lead = have - parts * len(places)
            index = torch.cat([torch.arange(lead), *(lead + i * WIDE + places for i in range(parts))])
            larger = value.new_zeros(*value.shape[:dim], want, *value.shape[dim + 1 :])
            value = larger.index_copy(dim, index, value)
    return value


def hidden_layers(model):
    """Yield which maps write, and which read, each set of channels of edges whose order means nothing outside."""
    for layer in model.modules():
        if isinstance(layer, Residual) and layer.dense_mlp[0].linear.in_features == WIDE:
            yield [layer.dense_mlp[0].linear], [layer.dense_mlp[1].linear]
        if isinstance(layer, QuadrupletInteraction):
            yield [layer.dense_db.linear, layer.mlp_rbf.linear], [layer.down_projection.linear]
        if isinstance(layer, TripletInteraction) and layer.dense_ba.linear.in_features == WIDE:
            yield [layer.dense_ba.linear, layer.mlp_rbf.linear], [layer.down_projection.linear]
    for head in model.output.out_forces:
        for i in (0, 2, 4, 6):
            yield [head[i]], [head[i + 2]]
    mlp = model.backbone.out_mlp_F.out_mlp
    writers = [mlp[0].linear, *(layer.dense_mlp[1].linear for layer in mlp[1:])]
    yield writers, [head[0] for head in model.output.out_forces] + [layer.dense_mlp[0].linear for layer in mlp[1:]]


@pytest.mark.parametrize("name", ["batch", "oxide", "slab"])
def test_zero_channels_are_removed_without_a_trace(wide, name):
    golden = load_golden(name)
    graph = golden.graph()
    small = ejmp.prune(wide, edge_channels=48, data=[graph])
    out = small(graph)
    assert small.config.emb_size_edge == 48
    assert_close(out.energy, golden.values["energy"])
    assert_close(out.forces, golden.values["forces"])
    assert_close(ejmp.gradient_forces(small, graph), golden.values["gradient_forces"], order=1)


def test_nothing_removed_nothing_changed(tiny, graphs):
    same = ejmp.prune(tiny, edge_channels=48, residuals={"concat": 2}, data=graphs)
    for name, value in tiny.state_dict().items():
        assert torch.equal(same.state_dict()[name], value), name
    assert same.tasks == tiny.tasks


def test_it_is_ridge_regression(tiny_config, graphs):
    """A head's weights are numpy's for the outputs of the channels that are lost, from those that are kept."""
    torch.manual_seed(0)
    model = ejmp.JMP(dataclasses.replace(tiny_config, head="linear")).double()
    small = ejmp.prune(model, edge_channels=20, data=iter(graphs))
    kept = list(small.config.kept_force_channels)
    lost = [channel for channel in range(48) if channel not in kept]
    x = torch.cat([model.features(graph).mlp_F[-1] for graph in graphs]).detach().numpy()
    weight = model.output.out_forces[0][0].weight.detach().numpy()
    penalty = np.diag(np.sqrt(narrowing.RIDGE) * np.linalg.norm(x[:, kept], axis=0))
    inputs = np.concatenate([x[:, kept], penalty])
    values = np.concatenate([x[:, lost] @ weight[:, lost].T, np.zeros((len(kept), 1))])
    correction = np.linalg.lstsq(inputs, values)[0]
    found = small.output.out_forces[0][0].weight.detach().numpy()
    np.testing.assert_allclose(found, weight[:, kept] + correction.T, rtol=1e-6, atol=1e-9)


def test_least_squares_and_scores_help(graphs, monkeypatch):
    """On the demo teacher: against channels cut without a correction, and against other channels than the best."""
    teacher = ejmp.load(demo_teacher()).double()
    graphs = list(graphs_of(teacher, demo_mix(), 32))
    fitted, seen = graphs[:1], graphs[1:]

    def error(model):
        with torch.no_grad():
            return sum((model(graph).forces - teacher(graph).forces).abs().mean().item() for graph in seen)

    best = error(ejmp.prune(teacher, edge_channels=48, data=fitted))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "topk", lambda x, k: torch.topk(-x, k))
        assert best < 0.7 * error(ejmp.prune(teacher, edge_channels=48, data=fitted))
    monkeypatch.setattr(narrowing, "solve", lambda _gram, moment, _ridge: torch.zeros_like(moment))
    assert best < 0.7 * error(ejmp.prune(teacher, edge_channels=48, data=fitted))


def test_residual_layers_that_change_least_are_left_out(tiny, graphs):
    """The smaller model is the whole one with nothing in their places."""
    small = ejmp.prune(tiny, residuals={"before_skip": 1, "concat": 0}, data=graphs)
    assert (small.config.num_before_skip, small.config.num_after_skip, small.config.num_concat) == (1, 2, 0)
    whole = ejmp.prune(tiny, blocks=3).on(backend="reference")
    changes = {}

    def see(name):
        def hook(_, args, y):
            moved, size = changes.get(name, (0, 0))
            changes[name] = (moved + (y - args[0]).norm() ** 2, size + y.norm() ** 2)

        return hook

    layers = [(i, j, block.layers_before_skip[j]) for i, block in enumerate(whole.backbone.int_blocks) for j in (0, 1)]
    handles = [layer.register_forward_hook(see((i, j))) for i, j, layer in layers]
    for graph in graphs:
        whole(graph)
    for handle in handles:
        handle.remove()
    for i, block in enumerate(whole.backbone.int_blocks):
        shares = [changes[i, j][0] / changes[i, j][1] for j in (0, 1)]
        block.layers_before_skip[shares.index(min(shares))] = torch.nn.Identity()
        block.residual_m = torch.nn.Identity()
    for graph in graphs:
        assert relative_error(small(graph).energy, whole(graph).energy) < 1e-12
        assert relative_error(small(graph).forces, whole(graph).forces) < 1e-12


def test_blocks_residuals_and_channels_at_once(tiny, graphs, tmp_path):
    asked = {"keep": (0, 2), "residuals": {"concat": 1}, "edge_channels": 24, "data": graphs}
    small = ejmp.prune(tiny, **asked)
    assert (small.config.kept_blocks, small.config.num_concat, small.config.emb_size_edge) == ((0, 2), 1, 24)
    ejmp.save(small, tmp_path / "small")
    loaded = ejmp.load(tmp_path / "small")
    assert loaded.config == small.config
    assert torch.equal(loaded(graphs[0]).energy, small(graphs[0]).energy)


def test_channels_removed_twice_remember_the_first_model(tiny, graphs):
    once = ejmp.prune(tiny, edge_channels=30, data=graphs)
    twice = ejmp.prune(once, edge_channels=20, data=graphs)
    assert set(twice.config.kept_force_channels) < set(once.config.kept_force_channels) < set(range(48))
    places = narrowing.shared_channels(twice.config, once.config)
    assert tuple(once.config.kept_force_channels[i] for i in places) == twice.config.kept_force_channels
    assert narrowing.shared_channels(once.config, once.config) is None
    with pytest.raises(ValueError, match="kept_force_channels"):
        narrowing.shared_channels(once.config, twice.config)


def test_a_model_without_force_branch(tiny_config, graphs):
    config = dataclasses.replace(tiny_config, direct_forces=False, num_tasks=1)
    small = ejmp.prune(ejmp.JMP(config).double(), edge_channels=24, data=graphs)
    assert small.config.kept_force_channels is None
    assert ejmp.gradient_forces(small, graphs[0]).isfinite().all()


@pytest.mark.parametrize("channels", [20, 25, 40])
def test_native_kernels_serve_all_widths(tiny, graphs, channels):
    require_native()
    small = ejmp.prune(tiny, edge_channels=channels, data=graphs)
    found, expected = (small.on(backend=backend)(graphs[0]) for backend in ("native", "reference"))
    assert relative_error(found.energy, expected.energy) < 1e-11
    assert relative_error(found.forces, expected.forces) < 1e-11


def test_distillation_compares_the_same_channels():
    """A student that is narrower than its teacher learns from those of the teacher's channels that it has."""
    torch.manual_seed(0)
    sources = demo_mix()
    teacher = ejmp.load(demo_teacher())
    (graph,) = list(graphs_of(teacher, sources, 16))[:1]
    student = ejmp.prune(teacher, blocks=5, edge_channels=40, data=[graph])
    sizes = [len(source.split("train")) for source in sources]
    batch = next(iter(loader_of(sources, "train", InOrder(sizes=sizes, batch_size=4)).batches()))
    objective = Distillation(student, teacher, tasks_of(sources), DistillConfig(edge=1.0, node=0.0, forces=0.0))
    mine, theirs = student.features(batch.graph).mlp_F, teacher.features(batch.graph).mlp_F
    kept = list(student.config.kept_force_channels)
    expected = sum((a - b[:, kept]).abs().mean() for a, b in zip(mine, theirs, strict=True))
    assert objective(batch).parts["kd_edge"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert student.tasks == teacher.tasks


def test_a_student_with_fewer_residual_layers_runs_its_own_blocks(tiny_config, graphs):
    sources = demo_mix()
    config = dataclasses.replace(tiny_config, num_tasks=len(sources))
    teacher = new_model(config, sources, seed=0)
    student = ejmp.prune(teacher, residuals={"concat": 1}, data=[g.to(dtype=torch.float32) for g in graphs])
    freeze_blocks(student)
    assert Distillation(student, teacher, tasks_of(sources), DistillConfig()).shared is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"edge_channels": 49}, "edge channels: expected 1 to 48, got 49"),
        ({"edge_channels": 0}, "edge channels: expected 1 to 48, got 0"),
        ({"residuals": {"concat": 3}}, "residuals: concat: expected 0 to 2, got 3"),
        ({"residuals": {"atom": 1}}, "residuals: expected some of before_skip, after_skip, concat, got 'atom'"),
        ({"edge_channels": 24, "data": None}, "data= is what"),
        ({"edge_channels": 24, "data": []}, "expected graphs to measure activations on, got none"),
    ],
)
def test_refused(tiny, graphs, asked, message):
    with pytest.raises(ValueError, match=message):
        ejmp.prune(tiny, **{"data": graphs, **asked})


def test_features_that_are_not_finite_are_refused(tiny, graphs):
    broken = ejmp.prune(tiny, blocks=3)
    with torch.no_grad():
        broken.get_parameter("backbone.int_blocks.1.dense_ca.linear.weight")[0, 0] = float("nan")
    with pytest.raises(ValueError, match="a feature is not finite"):
        ejmp.prune(broken, edge_channels=24, data=graphs)


def test_the_flag_of_residual_layers():
    assert parse_residuals("before_skip=1,concat=2") == {"before_skip": 1, "concat": 2}
    for text in ("concat", "concat=-1", "atom=1", ""):
        with pytest.raises(ValueError, match="--residuals: expected PLACE=NUMBER"):
            parse_residuals(text)
