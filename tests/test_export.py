"""Packages against the model they are made of, in physical units, also where ejmp cannot be imported.

Compiling takes minutes, so what is compiled is under `slow`; every day's tests run the function that is compiled.
"""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from ase.build import bulk, molecule
from support.tolerances import relative_error

import ejmp
from ejmp import GraphSettings, Task, cli, export
from ejmp.export import package as module
from ejmp.predict.quantities import quantities

SHORT = GraphSettings(cutoff=5.0, max_neighbors=12, tags="none")
REFERENCE = {1: -13.5, 6: -1030.0, 8: -2041.0, 29: -3.0}
TASKS = (
    Task(name="direct", linear_reference=REFERENCE, mean=0.25, std=2.0, force_std=0.5, graph=SHORT),
    Task(name="gradient", head=1, linear_reference=REFERENCE, mean=-0.5, std=3.0, forces="gradient", graph=SHORT),
)


@pytest.fixture(scope="module")
def model(tiny):
    model = ejmp.prune(tiny, blocks=1).on(backend="reference")
    model.tasks = TASKS
    return model


def graphs(dtype=torch.float64):
    """Other sizes than those that are verified when a package is written; the last has no edge at all."""
    crystal = bulk("Cu", a=3.7, cubic=True)
    crystal.rattle(0.05, seed=1)
    lists = ([molecule("CH3CH2OH"), crystal, molecule("H2O")], [molecule("C2H6")], [molecule("H")])
    return [ejmp.build_graph(structures, settings=SHORT, dtype=dtype) for structures in lists]


def assert_agrees(path, model, task, allowed=1e-9):
    loaded = export.load(path)
    for graph in graphs(model.dtype):
        expected = quantities(model, graph, task, forces=task.forces)
        found = loaded(graph)
        assert relative_error(found["energy"], expected.energy) < allowed
        assert found["forces"].shape == expected.forces.shape
        assert (found["forces"] - expected.forces).abs().max() < allowed * max(1, expected.forces.abs().max())
    return loaded


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    differences = export.write_package(model, path, task="direct", atoms=(4, 9))
    assert set(differences) == {"energy", "forces"}
    assert max(differences.values()) < 1e-9
    assert [file.name for file in path.parent.iterdir()] == ["model.pt2"]
    return path


@pytest.mark.slow
def test_direct(written, model):
    about = assert_agrees(written, model, TASKS[0]).about
    assert (about["task"], about["forces"], about["dtype"], about["device"]) == ("direct", "direct", "float64", "cpu")
    assert about["graph"] == json.loads(json.dumps(dataclasses.asdict(SHORT)))
    assert about["outputs"] == {"energy": "[B] float64, eV", "forces": "[N, 3] float64, eV/A"}
    assert len(about["inputs"]) == len(export.inputs_of(graphs()[0]))


@pytest.mark.slow
def test_without_ejmp(written, model, tmp_path):
    """A process in which ejmp cannot be imported gets the same numbers from torch alone."""
    graph = graphs()[0]
    torch.save(export.inputs_of(graph), tmp_path / "inputs.pt")
    code = """if True:
        import json, sys
        sys.modules["ejmp"] = sys.modules["ejmp_kernels"] = None
        import torch
        package = torch._inductor.aoti_load_package(sys.argv[1])
        about = json.loads(package.get_metadata()["ejmp"])
        inputs = torch.load(sys.argv[2])
        assert len(inputs) == len(about["inputs"])
        torch.save(dict(zip(about["outputs"], package(*inputs))), sys.argv[3])
    """
    words = [sys.executable, "-c", code, written, tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "outputs.pt")
    expected = quantities(model, graph, TASKS[0], forces="direct")
    assert relative_error(found["energy"][: graph.num_structures], expected.energy) < 1e-9
    assert relative_error(found["forces"][: graph.num_atoms], expected.forces) < 1e-9


@pytest.mark.parametrize("task", TASKS, ids=["direct", "gradient"])
def test_function_of_plain_tensors(model, task):
    """What is compiled, as it is: it makes the graph anew from indices, offsets and cells."""
    plain = model.on(backend="reference")
    function = module.Packaged(plain, task, task.forces)
    for graph in graphs():
        energy, forces = (value.detach() for value in function(*export.inputs_of(graph)))
        expected = quantities(model, graph, task, forces=task.forces)
        assert relative_error(energy[: graph.num_structures], expected.energy) < 1e-12
        assert (forces[: graph.num_atoms] - expected.forces).abs().max() < 1e-11


class Wrong:
    """A package of a compiler that makes mistakes of a size."""

    error = 0.0

    def __init__(self, path):
        assert path.read_text() == "compiled"

    def __call__(self, graph):
        found = quantities(self.model, graph, TASKS[0], forces="direct")
        forces = found.forces.clone()
        forces[-1, 2] += self.error * forces.abs().max()
        return {"energy": found.energy, "forces": forces}


@pytest.mark.parametrize("error", [1e-10, 1e-8, float("nan")])
def test_wrong_package_is_not_written(model, tmp_path, monkeypatch, error):
    monkeypatch.setattr(module, "_compile", lambda _f, _i, path, _a: path.write_text("compiled"))
    monkeypatch.setattr(module, "Package", type("Package", (Wrong,), {"error": error, "model": model}))
    path = tmp_path / "model.pt2"
    if error == 1e-10:
        assert export.write_package(model, path, task="direct", atoms=(4,))["forces"] == pytest.approx(1e-10, rel=1e-3)
        assert path.read_text() == "compiled"
        with pytest.raises(FileExistsError):
            export.write_package(model, path, task="direct")
    else:
        with pytest.raises(RuntimeError, match="differs from the model"):
            export.write_package(model, path, task="direct", atoms=(4,))
        assert not list(tmp_path.iterdir())


def test_refusals(model, tmp_path):
    for wrong in (model.on(precision="bf16"), model.on(backend="native")):
        with pytest.raises(ValueError, match="a package holds plain torch"):
            export.write_package(wrong, tmp_path / "model.pt2", task="direct")
    with pytest.raises(ValueError, match="task: expected one of direct, gradient"):
        export.write_package(model, tmp_path / "model.pt2")
    with pytest.raises(ValueError, match=r"ends in \.pt2"):
        export.write_package(model, tmp_path / "model", task="direct")
    with pytest.raises(FileNotFoundError):
        export.load(tmp_path / "missing.pt2")


def test_bundle(model, tmp_path):
    ejmp.save(model, tmp_path / "model")
    assert cli.main(["export", str(tmp_path / "model"), str(tmp_path / "bundle")]) == 0
    loaded = ejmp.load(tmp_path / "bundle")
    assert loaded.tasks == TASKS
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.slow
def test_gradient(model, tmp_path):
    export.write_package(model, tmp_path / "model.pt2", task="gradient")
    assert_agrees(tmp_path / "model.pt2", model, TASKS[1])


@pytest.mark.slow
def test_command_float32(model, tmp_path):
    ejmp.save(ejmp.prune(model, blocks=1).float(), tmp_path / "model")
    words = ["export", tmp_path / "model", tmp_path / "model.pt2", "--task", "direct", "--forces", "none"]
    assert cli.main(list(map(str, words))) == 0
    loaded, graph = export.load(tmp_path / "model.pt2"), graphs(torch.float32)[0]
    expected = quantities(ejmp.load(tmp_path / "model", backend="reference"), graph, TASKS[0])
    assert relative_error(loaded(graph)["energy"], expected.energy) < 1e-5
