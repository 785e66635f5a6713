"""Files: upstream's Lightning checkpoint, ejmp's own directory, and everything that must be refused."""

import json
from pathlib import Path

import pytest
import torch
from ase.build import molecule
from safetensors.torch import save_file
from support.inputs import load_golden

import ejmp
from ejmp.model.checkpoint import infer_config


def same_weights(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def lightning(tmp_path, tiny_weights):
    """Write upstream's file layout, with changes; an EMA is given as a function of the parameters."""

    def write(state=None, ema=None, **more):
        state = dict(tiny_weights) if state is None else state
        checkpoint = {"state_dict": state, "optimizer_states": [{"state": {}, "param_groups": []}], "epoch": 1} | more
        if ema is not None:
            dropped = ("rbf.offset", "rbf.temps", "scale_factor")
            names = [name for name in state if not name.endswith(dropped) and ".seq_energy_pre." not in name]
            names = [name for name in names if not name.startswith("task_steps")]
            checkpoint["optimizer_states"][0]["ema"] = tuple(ema(state[name]) for name in names)
        path = tmp_path / "jmp.pt"
        torch.save(checkpoint, path)
        return path

    return write


def test_sizes_are_read_off_the_weights(tiny_config, tiny_weights):
    assert infer_config(tiny_weights) == tiny_config
    with torch.device("meta"):
        for config in (ejmp.jmp_l(), ejmp.jmp_l(scalar=True, blocks=3), ejmp.jmp_s()):
            assert infer_config(ejmp.JMP(config).state_dict()) == config


def test_a_model_without_layers_after_the_atoms_features_is_refused(tiny_weights):
    """The public code leaves the atoms' features out of its output blocks then, and ours adds them."""
    without = {name: value for name, value in tiny_weights.items() if "seq_energy2" not in name}
    with pytest.raises(ValueError, match=r"out_blocks\.0\.seq_energy2: expected 1 or more"):
        infer_config(without)


def test_upstream_checkpoint(lightning, tiny_weights):
    model = ejmp.load(lightning())
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in tiny_weights.items()
    }
    golden = load_golden("ethanol")
    energy = model.double()(golden.graph()).energy
    assert torch.allclose(energy, torch.as_tensor(golden.values["energy"]), rtol=1e-9, atol=0)


def test_upstream_ema_weights_win(lightning, tiny_weights):
    model = ejmp.load(lightning(state=dict(tiny_weights) | {"task_steps.0": torch.zeros(())}, ema=lambda w: w * 0.5))
    state = model.state_dict()
    for name, value in tiny_weights.items():
        buffer = name.endswith(("rbf.offset", "rbf.temps", "scale_factor"))
        assert torch.equal(state[name], value if buffer else value * 0.5), name


def test_unfitted_scale_factors_act_as_one(lightning, tiny_weights):
    name = "backbone.out_blocks.0.scale_sum.scale_factor"
    model = ejmp.load(lightning(state=dict(tiny_weights) | {name: torch.zeros(())}))
    assert model.state_dict()[name] == 1


def renamed(state):
    state["backbone.surprise"] = state.pop("output.out_energy.3.8.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("output.out_energy.0.0.bias"), "missing: output.out_energy.0.0.bias"),
        (renamed, "missing: output.out_energy.3.8.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "unknown: extra"),
        (
            lambda s: s.update({"output.out_energy.0.0.bias": torch.zeros(3)}),
            r"wrong shape: output.out_energy.0.0.bias \[3\] instead of \[32\]",
        ),
        (
            lambda s: s.update({"backbone.out_blocks.0.seq_energy_pre.0.linear.weight": torch.zeros(32, 48)}),
            "must be one tensor",
        ),
        (lambda s: s.clear(), "not a JMP state dict"),
    ],
)
def test_weights_that_do_not_fit(lightning, tiny_weights, change, message):
    state = dict(tiny_weights)
    change(state)
    with pytest.raises(ValueError, match=message):
        ejmp.load(lightning(state=state))


def test_ema_that_does_not_fit(lightning):
    message = r"EMA weight of backbone\.bases\.edge_emb\.dense\.linear\.weight: expected \[48, 80\], got \[3840\]"
    with pytest.raises(ValueError, match=message):
        ejmp.load(lightning(ema=lambda w: w.flatten()))
    path = lightning(optimizer_states=[{"ema": (torch.zeros(1),)}])
    with pytest.raises(ValueError, match="1 EMA weights for"):
        ejmp.load(path)


class Intruder:
    def __reduce__(self):
        return (print, ("a pickle ran",))


def test_no_code_is_run(tmp_path, capsys):
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": {"x": torch.zeros(1)}, "hyper": Intruder()}, path)
    with pytest.raises(ValueError, match="not a checkpoint of plain tensors"):
        ejmp.load(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="not a checkpoint of plain tensors"):
        ejmp.load(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="state_dict"):
        ejmp.load(path)
    assert "ran" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):
        ejmp.load(tmp_path / "nowhere.pt")


def test_save_and_load(tmp_path, tiny):
    small = ejmp.prune(tiny, keep=(0, 2))
    ejmp.save(small, tmp_path / "small")
    for path in (tmp_path / "small", tmp_path / "small" / "model.safetensors"):
        loaded = ejmp.load(path)
        assert loaded.config == small.config
        assert loaded.config.kept_blocks == (0, 2)
        assert same_weights(loaded, small)
        assert all(p.requires_grad for p in loaded.parameters())
    graph = ejmp.build_graph(molecule("H2O"), 8.0, dtype=torch.float64)
    assert torch.equal(loaded(graph).energy, small(graph).energy)
    with pytest.raises(FileExistsError):
        ejmp.save(tiny, tmp_path / "small")
    ejmp.save(tiny, tmp_path / "small", overwrite=True)
    assert same_weights(ejmp.load(tmp_path / "small"), tiny)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_replacing_loses_nothing(tmp_path, tiny, monkeypatch):
    path = tmp_path / "model"
    ejmp.save(tiny, path)
    real, renames = Path.rename, []

    def failing(self, target):
        renames.append(self)
        if len(renames) == 2:
            raise OSError("disk full")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk full"):
        ejmp.save(ejmp.prune(tiny, blocks=1), path, overwrite=True)
    monkeypatch.undo()
    assert same_weights(ejmp.load(path), tiny)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not a saved model"):
        ejmp.save(tiny, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "a.tex").exists()


def test_half_precision_weights_become_float32(lightning, tiny_weights):
    model = ejmp.load(lightning(state={name: value.bfloat16() for name, value in tiny_weights.items()}))
    assert model.dtype == torch.float32
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_damaged_directory(tmp_path, tiny):
    ejmp.save(tiny, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"format": "ejmp-0"}))
    with pytest.raises(ValueError, match="format"):
        ejmp.load(tmp_path / "model")
    config.write_text(json.dumps({name: values[name] for name in values if name != "blocks"}))
    with pytest.raises(ValueError, match=r"missing.*blocks"):
        ejmp.load(tmp_path / "model")
    config.write_text(json.dumps(values | {"blocks": 2}))
    with pytest.raises(ValueError, match="checkpoint: "):
        ejmp.load(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        ejmp.load(tmp_path / "model")


def test_safetensors_without_a_config(tmp_path, tiny_weights, tiny_config):
    save_file(tiny_weights, tmp_path / "tiny.safetensors")
    assert ejmp.load(tmp_path / "tiny.safetensors").config == tiny_config
