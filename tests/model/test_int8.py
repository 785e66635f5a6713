"""Models in 8 bits: near the float32 model, and refused where they cannot be had."""

import re
import subprocess
from types import SimpleNamespace

import ase.io
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from safetensors.torch import load_file, save_file
from support.inputs import environment, load_golden, require_8_bits

import ejmp
from ejmp.data import convert, demo
from ejmp.model import precision
from ejmp.model.layers import Dense
from ejmp.model.quantized_executor import FakeQuantizedExecutor, Float8Executor, QuantizedExecutor
from ejmp.train.commands import _check_forces
from ejmp.train.config import TrainConfig
from ejmp.train.demo import demo_teacher
from ejmp.train.evaluate import evaluate
from ejmp.train.sources import at_most, demo_mix
from ejmp_kernels import quantized


@pytest.fixture(autouse=True)
def vnni():
    require_8_bits()


@pytest.fixture
def models(tiny_config, tiny_weights):
    model = ejmp.JMP(tiny_config)
    model.load_state_dict(tiny_weights)
    model.eval()
    return model, model.on(precision="int8")


@pytest.mark.parametrize("case", ["ethanol", "oxide", "batch"])
@torch.no_grad()
def test_near_float32(models, case):
    """Linear maps have errors of about 1%, and so have energies and forces of the golden structures."""
    graph = load_golden(case).graph(torch.float32)
    exact, found = (model(graph) for model in models)
    for name in ("energy", "forces"):
        x, y = getattr(exact, name), getattr(found, name)
        assert 0 < (x - y).norm() <= 0.05 * x.norm(), name


@torch.no_grad()
def test_weights_that_change(models):
    graph = load_golden("ethanol").graph(torch.float32)
    exact, found = models
    before = found(graph).energy
    for parameter in exact.backbone.out_mlp_E.parameters():
        parameter *= 1.5
    exact, found = exact(graph).energy, found(graph).energy
    assert not torch.allclose(before, found)
    assert (exact - found).norm() <= 0.05 * exact.norm()


def test_errors_of_the_demo_teacher(ranks):
    """At most 3% more error of forces than in float32, without any training."""
    model = ejmp.load(demo_teacher())
    sources = [at_most(source, "val", 12, seed=0) for source in demo_mix()]
    exact, found = (evaluate(model.on(precision=name), sources, ranks) for name in ("fp32", "int8"))
    for dataset, errors in exact.items():
        assert found[dataset]["forces_meV_per_A"] <= 1.03 * errors["forces_meV_per_A"], dataset


@torch.no_grad()
def test_saved_in_8_bits(models, tmp_path):
    """What 8-bit products make of the rounded weights is what they make of the weights themselves, to rounding."""
    graph = load_golden("ethanol").graph(torch.float32)
    model, quantized_model = models
    ejmp.save(model, tmp_path / "whole")
    ejmp.save(model, tmp_path / "small", weights="int8")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "small")]
    loaded = ejmp.load(tmp_path / "small", precision="int8")
    assert loaded.dtype == torch.float32
    assert loaded.tasks == model.tasks
    dense = sum(layer.linear.weight.numel() for layer in model.modules() if isinstance(layer, Dense))
    others = sum(p.numel() for p in model.parameters()) - dense
    assert sizes[1] <= sizes[0] - 3 * dense - 2 * others + 0.3 * sizes[0]  # names, and scales of very short rows
    exact, before, after = (each(graph) for each in (model, quantized_model, loaded))
    for name in ("energy", "forces"):
        x, y, z = (getattr(out, name) for out in (exact, before, after))
        assert (y - z).norm() <= 0.02 * x.norm(), name
        assert 0 < (x - getattr(loaded.on(precision="fp32")(graph), name)).norm() <= 0.05 * x.norm()


def test_verb_with_data(tmp_path):
    """`ejmp quantize` measures the model that it has written."""
    frames = [ase.Atoms(s.numbers, s.positions) for s in demo("ani1x", "val")]
    for frame, structure in zip(frames, demo("ani1x", "val"), strict=True):
        frame.calc = SinglePointCalculator(frame, energy=structure.energy, forces=structure.forces)
    ase.io.write(tmp_path / "frames.xyz", frames[:16])
    for split in ("train", "val"):
        convert(tmp_path / "frames.xyz", tmp_path / "ani1x", format="ase", split=split)
    asked = ["ejmp", "quantize", demo_teacher(), tmp_path / "small", "--data", f"ani1x={tmp_path / 'ani1x'}"]
    asked += ["--keep", "2"]
    variables = environment(DS_ACCELERATOR="cpu")
    done = subprocess.run(asked, capture_output=True, text=True, timeout=300, env=variables, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout
    kept = re.findall(r"^    (backbone\.\S+)  \d\.\d\de-\d\d$", said, re.MULTILINE)
    assert ejmp.load(tmp_path / "small").config.bf16_layers == tuple(kept)
    assert len(kept) == 2
    assert re.search(r"12\.[5-9] bits per parameter", said)
    rows = dict(re.findall(r"\| (fp32|bf16|int8) \|.*\| ([\d.]+) \|$", said, re.MULTILINE))
    assert rows.keys() == {"fp32", "bf16", "int8"}
    assert float(rows["int8"]) == pytest.approx(float(rows["fp32"]), rel=0.03)


def test_damaged_scales_are_refused(models, tmp_path):
    ejmp.save(models[0], tmp_path / "small", weights="int8")
    file = tmp_path / "small" / "model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith(".scales"))
    for damaged in (state[name][:-1].clone(), state[name].double(), state[name][:, None].clone()):
        save_file(state | {name: damaged}, file)
        with pytest.raises(ValueError, match=rf"checkpoint: {name}: expected a float32 per row"):
            ejmp.load(tmp_path / "small")
    save_file(state | {name: state[name] * float("nan")}, file)
    with pytest.raises(ValueError, match="are NaN or infinite"):
        ejmp.load(tmp_path / "small")
    del state[name]
    save_file(state, file)
    with pytest.raises(ValueError, match="expected floats of 16, 32 or 64 bits, got int8"):
        ejmp.load(tmp_path / "small")


def test_no_derivatives(models):
    graph = load_golden("ethanol").graph(torch.float32)
    with pytest.raises(RuntimeError, match=r'precision="int8" has no derivatives: predict .* precision="bf16"'):
        models[1](graph)
    with pytest.raises(RuntimeError, match='precision="int8" has no derivatives'), torch.no_grad():
        ejmp.gradient_forces(models[1], graph)


def rounding(case, model):
    """The model's raw energies and forces at a golden structure, by its steps in real and in pretended 8 bits."""
    graph = load_golden(case).graph(torch.float32)
    with torch.no_grad():
        return graph, model(graph), model.heads(model.run(FakeQuantizedExecutor(graph, "native")), graph)


@pytest.mark.parametrize("case", ["ethanol", "oxide"])
def test_training_rounds_as_predictions_do(models, case):
    """Nearer to the predictions in 8 bits than these are to float32, but for what bfloat16 adds to both."""
    graph, real, pretended = rounding(case, models[1])
    with torch.no_grad():
        exact, low = models[0](graph), models[0].on(precision="bf16")(graph)
    for name in ("energy", "forces"):
        x, y, z, b = (getattr(out, name) for out in (exact, real, pretended, low))
        assert (y - z).norm() <= (x - y).norm() + 2 * (x - b).norm(), name
        assert (x - z).norm() > (x - b).norm() / 2, name


@pytest.mark.parametrize("case", ["ethanol", "oxide"])
@torch.no_grad()
def test_what_is_rounded_in_training_is_what_is_rounded_in_predictions(models, case):
    """All else in float32, the two differ by less than half of what either does from the model itself.

    The difference is of numbers at the edge of a step, which go either way, and of those that follow from them.
    """
    model, graph = models[0], load_golden(case).graph(torch.float32)
    real = model.heads(model.run(QuantizedExecutor(graph, low=None)), graph)
    pretended = model.heads(model.run(FakeQuantizedExecutor(graph, "native", low=None)), graph)
    exact = model(graph)
    for name in ("energy", "forces"):
        x, y, z = (getattr(out, name) for out in (exact, real, pretended))
        assert (y - z).norm() <= 0.5 * (x - y).norm(), name
        assert (y - z).norm() <= 0.5 * (x - z).norm(), name


def test_derivatives_pass_the_rounding(models):
    """In training mode, gradients are those of the model at rounded weights and features: near the model's own."""
    graph = load_golden("ethanol").graph(torch.float32)
    found = {}
    for name, model in zip(("fp32", "int8"), models, strict=True):
        model.train()
        out = model(graph)
        loss = out.energy.square().sum() + out.forces.square().sum()
        found[name] = torch.autograd.grad(loss, list(model.backbone.int_blocks[0].parameters()), allow_unused=True)
        model.eval()
    pairs = [(x, y) for x, y in zip(*found.values(), strict=True) if x is not None]
    assert all(y is not None and y.isfinite().all() for _, y in pairs)
    x, y = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1))
    assert 0 < (x - y).norm() <= 0.1 * x.norm()


@torch.no_grad()
def test_float8_is_emulated_near_float32(models):
    graph = load_golden("ethanol").graph(torch.float32)
    exact = models[0](graph)
    found = models[0].heads(models[0].run(Float8Executor(graph, "native")), graph)
    for name in ("energy", "forces"):
        x, y = getattr(exact, name), getattr(found, name)
        assert 0 < (x - y).norm() <= 0.25 * x.norm(), name
    with pytest.raises(ValueError, match=r'precision="fp8" needs CUDA and compute capability 8.9: the model is on cpu'):
        models[0].on(precision="fp8")(graph)


def test_training_in_8_bits(tmp_path):
    """A run of `ejmp distill --precision int8`; gradient forces are refused before it begins."""
    asked = ["ejmp", "distill", "--blocks", "2", "--steps", "3", "--batch-size", "2", "--val-structures", "2"]
    variables = environment(DS_ACCELERATOR="cpu")
    asked += ["--precision", "int8", "--run", tmp_path / "run"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=300, env=variables, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ejmp.load(tmp_path / "run" / "final").config.blocks == 2
    with pytest.raises(ValueError, match="task a trains gradient forces, and predictions in 8 bits have none"):
        _check_forces([SimpleNamespace(name="a", task=ejmp.Task(name="a", forces="gradient"))], "int8")
    with pytest.raises(ValueError, match="precision: fp8 is for predictions"):
        TrainConfig(precision="fp8")


def test_refused(models, monkeypatch):
    graph = load_golden("ethanol").graph(torch.float32)
    with pytest.raises(ValueError, match="cannot be compiled"):
        models[1].compile()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match='precision="int8" is computed by the native backend, this is reference'):
            models[1].on(backend="reference")(graph)
        with pytest.raises(ValueError, match="needs float32 parameters"):
            models[0].on(precision="int8").double()(graph.to(dtype=torch.float64))
        models[0].float()
        monkeypatch.setattr(quantized, "why_unavailable", lambda: "this processor has no AVX-512 VNNI instructions")
        with pytest.raises(ValueError, match=r"needs a CPU with AVX-512 VNNI: this processor has no"):
            models[1](graph)
    with pytest.raises(ValueError, match="the model is on cuda"):
        precision.check_precision("int8", torch.device("cuda"))
