"""Models in 8 bits: near the float32 model, and refused where they cannot be had."""

import re
import subprocess

import ase.io
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from safetensors.torch import load_file, save_file
from support.inputs import environment, load_golden, require_native

import ejmp
from ejmp.data import convert, demo
from ejmp.model import precision
from ejmp.model.layers import Dense
from ejmp.train.demo import demo_teacher
from ejmp.train.evaluate import evaluate
from ejmp.train.sources import at_most, demo_mix
from ejmp_kernels import quantized


@pytest.fixture(autouse=True)
def vnni():
    require_native()
    if quantized.why_unavailable():
        pytest.skip(quantized.why_unavailable())


@pytest.fixture
def models(tiny_config, tiny_weights):
    model = ejmp.JMP(tiny_config)
    model.load_state_dict(tiny_weights)
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
    variables = environment(DS_ACCELERATOR="cpu")
    done = subprocess.run(asked, capture_output=True, text=True, timeout=300, env=variables, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout
    assert "12.5 bits per parameter" in said
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
