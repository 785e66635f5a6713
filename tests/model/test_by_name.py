"""Models by the names of their sizes, and structures given to a model directly."""

import dataclasses

import pytest
import torch
from ase.build import bulk, molecule

import ejmp
from ejmp.train.demo import demo_config


@pytest.mark.parametrize(("name", "config"), [("jmp-l", ejmp.jmp_l()), ("jmp-s", ejmp.jmp_s())])
def test_sizes_by_name(name, config):
    with torch.device("meta"):
        assert ejmp.JMP(name).config == config


def test_unknown_size():
    with pytest.raises(ValueError, match=r"config: expected a JMPConfig or one of jmp-l, jmp-s, got 'jmp-m'"):
        ejmp.JMP("jmp-m")


SETTINGS = ejmp.GraphSettings(cutoff=5.0, max_neighbors=7)
ATOMS = [molecule("CH3OH"), bulk("Cu")]


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(demo_config(blocks=1), num_tasks=1)
    return ejmp.JMP(config, tasks=[ejmp.Task(name="mine", graph=SETTINGS)]).double().eval()


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_structures_become_the_tasks_graph(model, compiled):
    graph = ejmp.build_graph(ATOMS, settings=SETTINGS, dtype=torch.float64)
    expected = model(graph)
    assert not torch.equal(expected.energy, model(ejmp.build_graph(ATOMS, dtype=torch.float64)).energy)
    asked = model.on()
    if compiled:
        asked.compile(compiler=None)
    assert torch.allclose(asked(ATOMS).energy, expected.energy, rtol=1e-12)
    assert torch.allclose(asked(ATOMS[0]).forces, expected.forces[:6], rtol=1e-12, atol=1e-12)
    structure = ejmp.Structure(numbers=ATOMS[0].numbers, positions=ATOMS[0].positions)
    assert torch.allclose(asked([structure]).energy, expected.energy[:1], rtol=1e-12)


@pytest.mark.parametrize("names", [(), ("one", "two")])
def test_refusals(names):
    tasks = [ejmp.Task(name=name, head=head) for head, name in enumerate(names)]
    model = ejmp.JMP(demo_config(blocks=1), tasks=tasks)
    listed = ", ".join(names) or "none"
    with pytest.raises(ValueError, match=rf"graph: .* got Atoms, .*\({listed}\).*build_graph.*Predictor"):
        model(ATOMS[0])


def test_what_is_no_structure(model):
    with pytest.raises(ValueError, match=r"structures: expected ase\.Atoms"):
        model(3)
