"""Hostile checkpoints and saved models, small on disk, for `support.attack_sources`."""

import functools
import json
import struct
import zipfile

import torch

import ejmp
from support.hostile_files import sparse


@functools.cache
def weights():
    """The state dict of a small model, with its config as JSON."""
    small = {name: 8 for name in ejmp.JMPConfig.__dataclass_fields__ if name.startswith("emb_size")}
    config = ejmp.JMPConfig(blocks=1, num_tasks=1, num_radial=8, num_spherical=3, **small)
    return ejmp.JMP(config, "reference").state_dict(), config


FIRST = "backbone.int_blocks.0.dense_ca.linear.weight"


def checkpoint(change):
    """Return what makes a checkpoint whose tensors a function has changed."""

    def make(folder):
        state = dict(weights()[0])
        change(state)
        torch.save({"state_dict": state}, folder / "a.pt")
        return folder / "a.pt"

    return make


def set_to(make, name=FIRST):
    return lambda state: state.update({name: make(state[name])})


def with_one(value):
    def make(tensor):
        changed = tensor.clone()
        changed[0, 0] = value
        return changed

    return make


def stride_zero(state):
    """A consistent model of 2.7e11 parameters: every size 10,000 times as large, of one number each."""
    for name, value in state.items():
        shape = [size * 10_000 if size == 8 else size for size in value.shape]
        state[name] = torch.zeros(1).expand(shape) if value.ndim == 2 else value


def compressed_checkpoint(folder):
    state = dict(weights()[0]) | {FIRST: torch.zeros(1 << 13, 1 << 12)}
    torch.save(state, folder / "plain.pt")
    with zipfile.ZipFile(folder / "plain.pt") as source:
        target = zipfile.ZipFile(folder / "a.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        with target:
            for name in source.namelist():
                target.writestr(name, source.read(name))
    (folder / "plain.pt").unlink()
    return folder / "a.pt"


def storage_beyond_its_record(folder):
    """A storage that announces more numbers than its record in the file has."""
    value = torch.arange(1000.0)
    torch.save({"state_dict": dict(weights()[0]) | {FIRST: value}}, folder / "good.pt")
    with zipfile.ZipFile(folder / "good.pt") as source, zipfile.ZipFile(folder / "a.pt", "w") as target:
        for name in source.namelist():
            contents = source.read(name)
            if name.endswith("data.pkl"):
                number, larger = b"M" + struct.pack("<H", 1000), b"J" + struct.pack("<i", 100_000_000)
                assert contents.count(number) >= 2
                contents = contents.replace(number, larger)
            target.writestr(name, contents)
    (folder / "good.pt").unlink()
    return folder / "a.pt"


def safetensors(header, size=0, length=None):
    """Return what makes a safetensors file of a header and zeros that take no space."""

    def make(folder):
        raw = json.dumps(header).encode()
        raw = struct.pack("<Q", len(raw) if length is None else length) + raw
        return sparse("a.safetensors", raw, len(raw) + size)(folder)

    return make


def model(**changes):
    """Return what makes a saved model whose config.json is changed; 1e400 and the like may be text."""

    def make(folder):
        state, config = weights()
        path = folder / "model"
        built = ejmp.JMP(config, "reference")
        built.load_state_dict(state)
        ejmp.save(built, path)
        values = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(values))
        return path

    return make


def config_text(contents):
    def make(folder):
        path = model()(folder)
        (path / "config.json").write_text(contents)
        return path

    return make
