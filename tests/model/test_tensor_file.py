"""Files of tensors: values as safetensors and torch read them, shapes before values, and what is refused by name."""

import dataclasses
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ejmp
from ejmp.limits import LimitError, RefusedFileError, limiting
from ejmp.model.tensor_file import check_stored, open_tensors

TENSORS = {
    "matrix": torch.randn(3, 5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "number": torch.tensor(2.5),
    "half": torch.randn(7).half(),
    "brain": torch.randn(2, 2).bfloat16(),
    "whole": torch.arange(-3, 4),
    "bytes": torch.arange(9, dtype=torch.uint8),
    "truth": torch.tensor([True, False, True]),
}


def read_all(path):
    with open_tensors(path) as file:
        assert all(value.is_meta for value in file.contents.values())
        return {name: file.read(value) for name, value in file.contents.items()}


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value), name
        assert found[name].data_ptr() % 64 == 0, f"{name}: products with unaligned weights round differently"


def test_safetensors_as_its_own_reader_reads_it(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", {"format": "pt"})
    equal(read_all(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors"))


def test_torch_files_as_torch_reads_them(tmp_path):
    torch.save(TENSORS, tmp_path / "a.pt")
    equal(read_all(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt", weights_only=True))


def test_views_of_one_storage(tmp_path):
    whole = torch.arange(60.0)
    views = {"rows": whole[12:24].view(3, 4), "columns": whole.view(6, 10).T, "every": whole[1::2], "last": whole[-1:]}
    torch.save(views, tmp_path / "a.pt")
    equal(read_all(tmp_path / "a.pt"), views)


def test_files_of_torch_before_1_6(tmp_path, tiny_weights):
    torch.save({"state_dict": dict(tiny_weights)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    found = ejmp.load(tmp_path / "a.pt").state_dict()
    assert all(torch.equal(found[name], value) for name, value in tiny_weights.items())


def test_what_is_not_needed_is_not_read(tmp_path, tiny_weights, monkeypatch):
    """An optimiser's state of 200 MB costs nothing."""
    more = {"optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(50 << 20)}}}]}
    torch.save({"state_dict": dict(tiny_weights)} | more, tmp_path / "a.ckpt")
    made = []
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **how: made.append(sizes) or real(*sizes, **how))
    ejmp.load(tmp_path / "a.ckpt")
    assert max(size for sizes in made for size in sizes if isinstance(size, int)) < 10 << 20


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("change", ["cut", "replaced", "touched"])
def test_files_that_change(tmp_path, suffix, change):
    path = tmp_path / f"a.{suffix}"
    values = {"a": torch.randn(1000, 100), "b": torch.randn(1000, 100)}
    (torch.save if suffix == "pt" else save_file)(values, path)

    def read():
        with open_tensors(path) as file:
            file.read(file.contents["a"])
            if change == "cut":
                with path.open("r+b") as other:
                    other.truncate(5000)
            elif change == "replaced":
                path.rename(tmp_path / "old")
                path.write_bytes((tmp_path / "old").read_bytes())
            else:
                path.write_bytes(path.read_bytes())
            file.read(file.contents["b"])

    with pytest.raises(RefusedFileError, match=rf"a\.{suffix}: changed while it was read"):
        read()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 400), st.integers(0, 255))
def test_a_changed_byte_of_a_header(tmp_path_factory, at, value):
    """It is read as safetensors itself would read it, or refused."""
    path = tmp_path_factory.mktemp("x") / "a.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4)}, path)
    content = bytearray(path.read_bytes())
    content[at % len(content)] = value
    path.write_bytes(content)
    try:
        found = read_all(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    equal(found, load_file(path))


BAD = {
    "NaN": (lambda w: w * float("nan"), "dense_ca.linear.weight: .* numbers are NaN or infinite"),
    "one infinity": (lambda w: w.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.inf)), "1 of 2,304"),
    "sparse": (lambda w: w.to_sparse(), "sparse"),
    "float8": (lambda w: w.to(torch.float8_e5m2), "expected floats of 16, 32 or 64 bits, got float8_e5m2"),
    "integers": (lambda w: w.int(), "got int32"),
    "stride 0": (lambda w: w[:, :1].expand(w.shape), "repeated by strides"),
}


@pytest.mark.parametrize("name", BAD)
def test_weights_that_are_no_numbers(tmp_path, tiny_weights, name):
    change, message = BAD[name]
    first = "backbone.int_blocks.0.dense_ca.linear.weight"
    torch.save(dict(tiny_weights) | {first: change(tiny_weights[first].float())}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt: .*{message}"):
        ejmp.load(tmp_path / "a.pt")


def test_large_but_finite_weights(tmp_path, tiny_weights):
    """Their sum overflows, they do not."""
    first = "backbone.int_blocks.0.dense_ca.linear.weight"
    torch.save(dict(tiny_weights) | {first: torch.full_like(tiny_weights[first], 3e38)}, tmp_path / "a.pt")
    assert ejmp.load(tmp_path / "a.pt").state_dict()[first].max() == torch.tensor(3e38)


def test_shapes_are_compared_before_anything_is_read(tmp_path):
    """6 GiB that are not there, in a tensor that fits no model."""
    header = {"embedding.atom_embedding.weight": {"dtype": "F32", "shape": [1 << 15, 3 << 14]}}
    header["embedding.atom_embedding.weight"]["data_offsets"] = [0, 6 << 30]
    raw = json.dumps(header).encode()
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + (6 << 30))
    with pytest.raises(ValueError, match=r"a\.safetensors: checkpoint: not a JMP state dict: backbone"):
        ejmp.load(tmp_path / "a.safetensors")


def test_dense_tensors_pass():
    for tensor in (torch.zeros(3, 4), torch.zeros(3, 4).T, torch.zeros(0), torch.zeros(()), torch.zeros(4)[::2]):
        check_stored(tensor)


SMALL = {name: 8 for name in ejmp.JMPConfig.__dataclass_fields__ if name.startswith("emb_size")}
LAYERS = ("num_before_skip", "num_after_skip", "num_concat", "num_atom", "num_output_after_atom", "num_atom_emb_layers")
MORE = {
    "num_radial": st.integers(1, 9),
    "num_spherical": st.integers(1, 4),
    "num_global_out_layers": st.integers(0, 3),
    "blocks": st.integers(1, 3),
    "num_tasks": st.integers(1, 3),
    "num_elements": st.integers(1, 90),
    "direct_forces": st.booleans(),
    "head": st.sampled_from(["mlp", "mlp-no-bias", "linear"]),
}


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.fixed_dictionaries({name: st.integers(1, 20) for name in SMALL}),
    counts=st.fixed_dictionaries({name: st.integers(0, 3) for name in LAYERS}),
    more=st.fixed_dictionaries(MORE),
)
def test_parameters_are_counted_without_a_model(sizes, counts, more):
    config = ejmp.JMPConfig(**sizes, **counts, **more)
    with torch.device("meta"):
        parameters = list(ejmp.JMP(config, "reference").parameters())
    assert config.count_parameters() == (sum(p.numel() for p in parameters), len(parameters))


@pytest.mark.parametrize(("blocks", "published"), [(6, 160.9), (4, 108.2), (2, 55.5)])
def test_published_counts(blocks, published):
    config = ejmp.jmp_l(blocks=blocks, scalar=True)
    assert round(config.count_parameters()[0] / 1e6, 1) == published


def test_limits_of_models():
    with pytest.raises(
        ValueError, match=r"JMPConfig\.blocks: expected a positive integer up to 65,536, got 1000000000"
    ):
        ejmp.jmp_l(blocks=10**9)
    with pytest.raises(LimitError, match="parameters: the limit parameters is 10,000,000,000"):
        ejmp.jmp_l(blocks=1000)
    with limiting(parameters=10**12):
        assert ejmp.jmp_l(blocks=1000).blocks == 1000
    tiny = dict.fromkeys(SMALL, 1)
    with pytest.raises(LimitError, match="weights: the limit tensors is 100,000"):
        dataclasses.replace(ejmp.jmp_l(), **tiny, blocks=60_000)
