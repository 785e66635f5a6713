"""Distillation terms: against numpy, at the teacher itself, and what they refuse."""

import dataclasses

import numpy as np
import pytest
import torch
from support.inputs import load_golden

import ejmp
from ejmp.compress.config import DistillConfig
from ejmp.compress.distill import combine, distill_loss
from ejmp.compress.losses import Losses

TERMS = ("energy", "forces", "node", "edge", "edge_to_node", "vector_to_vector")
ALL = DistillConfig(**dict(zip(TERMS, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), strict=True)))


@pytest.fixture(scope="module")
def graph():
    return load_golden("ethanol").graph()


def predict(model, graph):
    features = model.features(graph)
    return features, model.heads(features, graph)


@pytest.fixture
def pair(tiny, graph):
    student = predict(ejmp.prune(tiny, blocks=1), graph)
    with torch.inference_mode():
        return student, predict(tiny, graph)


def terms_by_hand(student, teacher, graph):
    """All six in numpy, edge by edge."""
    (f, o), (g, p) = student, teacher
    mean = lambda a, b: np.abs(a - b).mean()  # noqa: E731
    array = lambda x: x.detach().numpy()  # noqa: E731
    target, vector, n = array(graph.main.target), array(graph.main.vector), graph.num_atoms

    def onto_atoms(x, directions):
        out = np.zeros((n, directions.shape[1], x.shape[1]))
        for e, t in enumerate(target):
            out[t] += directions[e][:, None] * x[e][None]
        return out / np.bincount(target, minlength=n)[:, None, None]

    edges = [(array(a), array(b)) for a, b in zip(f.mlp_F, g.mlp_F, strict=True)]
    ones = np.ones((len(target), 1))
    return {
        "kd_energy": mean(array(o.energy), array(p.energy)),
        "kd_forces": mean(array(o.forces), array(p.forces)),
        "kd_node": sum(mean(array(a), array(b)) for a, b in zip(f.mlp_E, g.mlp_E, strict=True)),
        "kd_edge": sum(mean(a, b) for a, b in edges),
        "kd_edge_to_node": sum(mean(onto_atoms(a, ones), onto_atoms(b, ones)) for a, b in edges),
        "kd_vector_to_vector": sum(mean(onto_atoms(a, vector), onto_atoms(b, vector)) for a, b in edges),
    }


def test_all_terms(pair, graph):
    losses = distill_loss(*pair, graph, ALL)
    expected = terms_by_hand(*pair, graph)
    assert {name: value.item() for name, value in losses.parts.items()} == pytest.approx(expected, rel=1e-12)
    total = sum(getattr(ALL, name.removeprefix("kd_")) * value for name, value in expected.items())
    assert losses.total.item() == pytest.approx(total, rel=1e-12)
    assert losses.total.dtype == torch.float64
    losses.total.backward()  # with a teacher of torch.inference_mode


def test_defaults_are_the_papers(pair, graph):
    losses = distill_loss(*pair, graph, DistillConfig())
    assert set(losses.parts) == {"kd_forces", "kd_node", "kd_edge"}
    assert losses.total.item() == pytest.approx(sum(x.item() for x in losses.parts.values()))


@pytest.mark.parametrize("name", TERMS)
def test_student_learns_and_teacher_does_not(tiny, graph, name):
    config = DistillConfig(**{**dict.fromkeys(TERMS, 0.0), name: 1.0})
    small = ejmp.prune(tiny, blocks=1)
    losses = distill_loss(predict(small, graph), predict(tiny, graph), graph, config)
    learns = {"energy": "embedding.atom_embedding", "node": "embedding.atom_embedding"}
    first = learns.get(name, "backbone.int_blocks.0.residual_m.0.dense_mlp.0.linear")
    tiny.zero_grad()
    losses.total.backward()
    assert small.get_submodule(first).weight.grad.norm() > 0
    assert all(p.grad is None for p in tiny.parameters())


def test_a_copy_of_the_teacher_has_nothing_to_learn(tiny, graph):
    same = predict(ejmp.prune(tiny, blocks=3), graph)
    losses = distill_loss(same, predict(tiny, graph), graph, ALL)
    assert losses.total == 0
    losses.total.backward()


def test_student_without_force_branch(tiny_config, tiny, graph):
    """The scalar student learns energies and atom features; the rest is refused by name."""
    config = dataclasses.replace(tiny_config, direct_forces=False, blocks=1, kept_blocks=(0,))
    student, teacher = predict(ejmp.JMP(config).double(), graph), predict(tiny, graph)
    only = {"forces": 0.0, "edge": 0.0}
    losses = distill_loss(student, teacher, graph, DistillConfig(energy=1.0, **only))
    assert set(losses.parts) == {"kd_energy", "kd_node"}
    with pytest.raises(
        ValueError,
        match=r"forces: the student has no force branch, so no direct forces; set DistillConfig.forces",
    ):
        distill_loss(student, teacher, graph, DistillConfig())
    for name in ("edge", "edge_to_node", "vector_to_vector"):
        with pytest.raises(ValueError, match=f"^{name}: the student has no force branch"):
            distill_loss(student, teacher, graph, DistillConfig(**{**only, name: 1.0}))
    with pytest.raises(ValueError, match="forces: the teacher has no force branch"):
        distill_loss(teacher, student, graph, DistillConfig())


def test_teacher_in_bfloat16(pair, graph):
    """A teacher in its fastest precision is compared in the student's."""
    student, (features, out) = pair
    halves = tuple(x.bfloat16() for x in features.mlp_E)
    teacher = (dataclasses.replace(features, mlp_E=halves), out)
    losses = distill_loss(student, teacher, graph, DistillConfig(forces=0.0, edge=0.0))
    exact = distill_loss(*pair, graph, DistillConfig(forces=0.0, edge=0.0))
    assert losses.total.dtype == torch.float64
    assert losses.total.item() == pytest.approx(exact.total.item(), rel=1e-3)


def test_graph_without_edges(tiny):
    lonely = ejmp.build_graph(ejmp.Structure(numbers=[6], positions=[[0.0, 0, 0]]), dtype=torch.float64)
    losses = distill_loss(predict(ejmp.prune(tiny, blocks=1), lonely), predict(tiny, lonely), lonely, ALL)
    assert losses.parts["kd_edge"] == 0
    assert losses.total.isfinite()
    losses.total.backward()


def test_other_widths_are_refused(tiny_config, tiny, graph):
    wide = dataclasses.replace(tiny_config, emb_size_atom=64)
    student, teacher = predict(ejmp.JMP(wide).double(), graph), predict(tiny, graph)
    with pytest.raises(ValueError, match=r"node: the student's are \[9, 64\], the teacher's \[9, 32\]"):
        distill_loss(student, teacher, graph, DistillConfig())
    deep = dataclasses.replace(tiny_config, num_global_out_layers=3)
    with pytest.raises(ValueError, match="node: the student's final MLP has 4 layers, the teacher's 3"):
        distill_loss(predict(ejmp.JMP(deep).double(), graph), teacher, graph, DistillConfig())
    heads = dataclasses.replace(tiny_config, num_tasks=1)
    with pytest.raises(ValueError, match=r"forces: the student's are \[9, 1, 3\], the teacher's \[9, 4, 3\]"):
        distill_loss(predict(ejmp.JMP(heads).double(), graph), teacher, graph, DistillConfig())


def test_combine():
    scalar = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
    labels = Losses(total=scalar(3.0), parts={"energy": scalar(3.0)})
    teacher = Losses(total=scalar(5.0), parts={"kd_node": scalar(5.0)})
    both = combine(labels, teacher, DistillConfig(labels=0.5, teacher=2.0))
    assert both.total == 11.5
    assert both.parts == {**labels.parts, **teacher.parts}
    nan = Losses(total=scalar(float("nan")), parts={})
    assert combine(nan, teacher, DistillConfig()).total == 5
    assert combine(None, teacher, DistillConfig()).total == 5
    with pytest.raises(ValueError, match="labels: expected a loss"):
        combine(None, teacher, DistillConfig(labels=1.0))


def test_config_is_checked():
    with pytest.raises(ValueError, match=r"DistillConfig.node: expected 0 or more, got -1"):
        DistillConfig(node=-1)
    with pytest.raises(ValueError, match="at least one term"):
        DistillConfig(forces=0.0, node=0.0, edge=0.0)
