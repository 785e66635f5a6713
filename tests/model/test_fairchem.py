"""Checkpoints of fairchem 1.x: files in its layout load to models with its outputs, on every backend."""

import collections
import copy
import dataclasses
import fractions
import json
import shutil
from collections import OrderedDict

import ase.io
import numpy as np
import pytest
import torch
from ase.build import fcc111
from safetensors.torch import load_file
from support.inputs import require_triton, shared_file
from support.tolerances import assert_close, relative_error

import ejmp
from ejmp import GraphSettings, cli
from ejmp.model.fairchem import parameter_order
from ejmp.train.start import for_finetuning

CASES = ("triclinic", "slab", "oxide", "batch", "cutoffs", "crystal_not_strict")


def golden_values(case):
    with np.load(shared_file(f"golden/fairchem/{case}.npz")) as file:
        return dict(file)


def structures_of(values):
    for b, cell in enumerate(values["cell"]):
        here = values["batch"] == b
        fields = {name: values[name][here] for name in ("numbers", "positions", "tags")}
        yield ejmp.Structure(**fields, cell=cell, pbc=False)  # fairchem 1.x searches in all directions anyway


def arguments_of(case):
    name = "cutoffs.json" if case == "cutoffs" else "tiny.json"
    arguments = json.loads(shared_file(f"golden/fairchem/{name}").read_text())
    return arguments | ({"enforce_max_neighbors_strictly": False} if case == "crystal_not_strict" else {})


@pytest.fixture(scope="module")
def weights():
    """The state dict of the golden model, in the order that fairchem's modules have."""
    state = load_file(shared_file("golden/fairchem/tiny.safetensors"))
    with np.load(shared_file("golden/fairchem/slab.npz")) as file:
        first = [str(name) for name in file["param_names"]]
    return {name: state[name] for name in [*first, *(name for name in state if name not in first)]}


@pytest.fixture
def write(tmp_path, weights):
    """Write a checkpoint in fairchem's layout, with changes; return its path."""

    def written(case="slab", state=None, prefix="module.", name="checkpoint.pt", **more):
        state = weights if state is None else state
        checkpoint = {
            "epoch": 3.2,
            "step": 17,
            "state_dict": OrderedDict((prefix + key, value) for key, value in state.items()),
            "optimizer": {
                "state": {0: {"exp_avg": torch.zeros(2)}},
                "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.9)}],
            },
            "scheduler": {"best": np.float64(0.2)},
            "normalizers": {},
            "config": {"trainer": "forces", "model": {"name": "gemnet_oc", **arguments_of(case)}},
            "val_metrics": {"forces_mae": {"metric": np.float32(0.1), "numel": 3}},
            "amp": None,
        } | more
        torch.save(checkpoint, tmp_path / name)
        return tmp_path / name

    return written


def outputs(model, values):
    task = model.task()
    graph = ejmp.build_graph(list(structures_of(values)), settings=task.graph, dtype=torch.float64)
    return graph, model(graph)


def parameter_norms(model, loss, names):
    ours = dict(zip(names, parameter_order(model.config), strict=True))
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [parameters[ours[name]] for name in names], allow_unused=True)
    return torch.stack([torch.zeros(()).double() if g is None else g.norm() for g in gradients])


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_fairchem(case, write, backend):
    """Energies, direct forces, features and the norms of all parameters' gradients."""
    values = golden_values(case)
    model = ejmp.load(write(case)).double().on(backend=backend)
    graph, out = outputs(model, values)
    assert_close(out.energy[:, 0], values["energy"])
    assert_close(out.forces[:, 0], values["forces"])
    features = model.features(graph)
    for i, x_E in enumerate(features.x_E):
        assert_close(x_E, values[f"x_E.{i}"])
    loss = out.energy.square().sum() + out.forces.square().sum()
    norms = parameter_norms(model, loss, [str(name) for name in values["param_names"]])
    assert relative_error(norms, values["grad_norm"]) <= 1e-9
    if case != "crystal_not_strict":  # straight angles, at which fairchem's gradient diverges
        assert_close(ejmp.gradient_forces(model, graph), values["gradient_forces"])


def test_triton(write):
    """One block is enough for every setting, and three take half a minute in Triton's interpreter."""
    require_triton()
    values = golden_values("cutoffs")
    reference = ejmp.prune(ejmp.load(write("cutoffs")).double(), blocks=1).on(backend="reference")
    model = reference.on(backend="triton")
    with torch.no_grad():
        graph, expected = outputs(reference, values)
        features = model.features(graph)
        out = model.heads(features, graph)
    for i in range(2):
        assert_close(features.x_E[i], values[f"x_E.{i}"])
    assert_close(out.energy, expected.energy.numpy())
    assert_close(out.forces, expected.forces.numpy())


def test_second_derivatives(write, backend):
    """Of coupled direct forces and of gradient forces, along a random direction, against central differences."""
    values = golden_values("cutoffs")
    model = ejmp.load(write("cutoffs")).double().on(backend=backend)
    graph = ejmp.build_graph(list(structures_of(values)), settings=model.task().graph, dtype=torch.float64)
    direction = torch.randn(graph.num_atoms, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def forces(step):
        moved = graph.with_positions((graph.positions + step * direction).requires_grad_())
        found = ejmp.gradient_forces(model, moved, create_graph=True)
        return moved.positions, (found**2).sum() + (model(moved).forces ** 2).sum()

    positions, value = forces(0.0)
    (gradient,) = torch.autograd.grad(value, positions)
    numeric = (forces(1e-5)[1] - forces(-1e-5)[1]).item() / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(numeric, rel=1e-6)


def test_sizes_are_the_published_ones():
    from ejmp.model import fairchem

    for name, expected in (("base", 38_864_384), ("large", 216_408_064)):
        manifest = json.loads(shared_file(f"golden/fairchem/{name}_manifest.json").read_text())
        with torch.device("meta"):
            state = {key: torch.empty(shape) for key, shape in manifest["state_dict"].items()}
            checkpoint = {"config": {"model": "gemnet_oc", "model_attributes": manifest["config"]}, "state_dict": state}
            config, ours, _ = fairchem.read_fairchem("meta.pt", checkpoint, lambda value: value)
            model = ejmp.JMP(config)
        assert sum(p.numel() for p in model.parameters()) == expected == manifest["parameters"]
        assert {n: v.shape for n, v in ours.items()}.items() <= {
            n: v.shape for n, v in model.state_dict().items()
        }.items()
        buffers = (".scale_factor", ".rbf.offset")
        names = [key for key in state if not key.endswith(buffers) and ".seq_energy_pre." not in key]
        assert [fairchem._our_name(name) for name in names] == parameter_order(config)


def test_moving_averages_are_used(write, weights):
    """They are in the order of the model's parameters, even if the state dict is in another."""
    names = [str(name) for name in golden_values("slab")["param_names"]]
    shadow = [weights[name] * 0.5 for name in names]
    ema = {"decay": 0.999, "num_updates": 7, "shadow_params": shadow, "collected_params": []}
    averaged = dict(weights) | {name: weights[name] * 0.5 for name in names}
    averaged |= {
        name: averaged[name.replace("seq_energy_pre", "layers")] for name in weights if "seq_energy_pre" in name
    }
    expected = ejmp.load(write(state=averaged, name="expected.pt")).state_dict()
    for state in (weights, dict(sorted(weights.items()))):
        found = ejmp.load(write(state=state, ema=ema)).state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    with pytest.raises(ValueError, match=r"ema: 230 averages for 231 parameters"):
        ejmp.load(write(ema={"shadow_params": shadow[:-1]}))


@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
@pytest.mark.parametrize("old", [True, False])
def test_layouts_of_the_file(prefix, old, write):
    """Old files have the arguments beside the model's name, and other names of normalizers; both mean the same."""
    moments = (
        {"mean": torch.tensor(-0.75), "std": torch.tensor(2.0)},
        {"mean": torch.tensor(0.0), "std": torch.tensor(3.0)},
    )
    normalizers = dict(zip(("target", "grad_target") if old else ("energy", "forces"), moments, strict=True))
    more = {"normalizers": normalizers}
    if old:
        more["config"] = {"model": "gemnet_oc", "model_attributes": arguments_of("slab")}
    else:
        reference = torch.arange(84, dtype=torch.float64) * 0.5
        more["elementrefs"] = {"energy": {"element_references": reference}}
    model = ejmp.load(write(prefix=prefix, **more)).double()
    task = model.task("s2ef")
    assert (task.mean, task.std, task.force_std, task.forces) == (-0.75, 2.0, 3.0, "direct")
    assert task.linear_reference == ({} if old else {z: z * 0.5 for z in range(1, 84)})
    assert task.graph == GraphSettings(
        atom_edges=(12.0, 20), quad_edges=(12.0, 8), atom_pairs=(12.0, 1000), periodic="all"
    )
    values = golden_values("slab")
    assert_close(outputs(model, values)[1].energy[:, 0], values["energy"])


def test_settings_are_read(write):
    model = ejmp.load(write("cutoffs"))
    assert model.config.rbf_cutoffs == {"main": 6.0, "atom_edges": 7.0, "quad_edges": 5.0, "atom_pairs": 9.0}
    assert (model.config.head, model.config.forces_coupled, model.config.energy_reduction) == ("linear", True, "mean")
    assert model.task().graph == GraphSettings(
        cutoff=6.0, max_neighbors=14, atom_edges=(7.0, 10), quad_edges=(5.0, 5), atom_pairs=(9.0, 60),
        quad_tags=(0, 1, 2), periodic="all",
    )  # fmt: skip
    assert ejmp.load(write("crystal_not_strict")).task().graph.ties == "keep"


def test_gradient_forces_and_unknown_references(write, weights):
    """A model that forces are gradients of has no force branch; a reference that the file does not have is unknown."""
    arguments = arguments_of("triclinic") | {"direct_forces": False}
    state = {
        n: v for n, v in weights.items() if not any(f in n for f in ("out_forces", "mlp_F", "seq_forces", "rbf_F"))
    }
    config = {"model": {"name": "gemnet_oc", **arguments}, "dataset": {"train": {"lin_ref": "somewhere.npz"}}}
    model = ejmp.load(write(state=state, config=config)).double()
    assert model.task().forces == "gradient"
    assert model.task().linear_reference is None
    values = golden_values("triclinic")
    graph, out = outputs(model, values)
    assert_close(out.energy[:, 0], values["energy"])
    assert_close(ejmp.gradient_forces(model, graph), values["gradient_forces"])


@pytest.fixture
def marker(tmp_path):
    """A class whose pickle, if it is run, makes a file."""
    made = tmp_path / "made"

    class Runs:
        def __reduce__(self):
            return shutil.copy, (__file__, str(made))

    return Runs, made


def test_unknown_objects_are_left_out_and_not_run(write, marker, tmp_path):
    runs, made = marker
    expected = ejmp.load(write())
    unknown = {"state": [collections.Counter("ab"), fractions.Fraction(1, 3)]}
    assert ejmp.load(write(optimizer=unknown)).tasks == expected.tasks
    for places in ({"amp": runs()}, {"optimizer": {"state": [runs()]}}, {"normalizers": runs()}):
        with pytest.raises(ValueError, match=r"not a checkpoint of plain tensors \(it asks for shutil.copy"):
            ejmp.load(write(**places))
    torch.save({"state_dict": {}, "hyper_parameters": runs()}, tmp_path / "lightning.ckpt")
    with pytest.raises(ValueError, match="not a checkpoint of plain tensors"):
        ejmp.load(tmp_path / "lightning.ckpt")
    assert not made.exists()
    torch.load(tmp_path / "lightning.ckpt", weights_only=False)
    assert made.exists(), "the marker shows nothing"


def test_the_main_edges_are_those_of_fairchem(write):
    """Of every case; fairchem counts cells in the other direction."""
    for case in CASES:
        values = golden_values(case)
        task = ejmp.load(write(case)).task()
        main = ejmp.build_graph(list(structures_of(values)), settings=task.graph, dtype=torch.float64).main
        ours = sorted(zip(main.source.tolist(), main.target.tolist(), (-main.offset).tolist(), strict=True))
        offset = values["main_cell_offset"].astype(int).tolist()
        assert ours == sorted(zip(*values["main_edge_index"].tolist(), offset, strict=True))


def test_compiled_and_finetuned(write, backend):
    """Padding changes neither coupled forces nor means; a new head for fine-tuning is one of JMP's."""
    values = golden_values("cutoffs")
    model = ejmp.load(write("cutoffs")).double().on(backend=backend)
    graph, expected = outputs(model, values)
    gradient = ejmp.gradient_forces(model, graph)
    model.compile(compiler=None)
    with torch.no_grad():
        out = model(graph)
    assert_close(out.energy, expected.energy.detach().numpy())
    assert_close(out.forces, expected.forces.detach().numpy())
    assert_close(ejmp.gradient_forces(model, graph), gradient.numpy())
    tuned = for_finetuning(model, direct_forces=True)
    assert (tuned.config.head, tuned.config.forces_coupled, tuned.config.rbf_cutoffs) == (
        "mlp", True, model.config.rbf_cutoffs,
    )  # fmt: skip
    assert tuned(graph).forces.shape == (graph.num_atoms, 1, 3)


def test_scale_factors_of_the_file_win(write):
    name = "int_blocks.0.trip_interaction.scale_rbf"
    model = ejmp.load(write(scale_dict={f"module.{name}": torch.tensor(2.5)}))
    assert model.state_dict()[f"backbone.{name}.scale_factor"] == 2.5
    with pytest.warns(UserWarning, match="scale factors that the model does not have: TripInteraction_1"):
        ejmp.load(write(scale_dict={"TripInteraction_1": 2.0}))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("scale_basis", True), ("rbf", {"name": "bessel"}), ("rbf_spherical", {"name": "spherical_bessel"}),
        ("cbf", {"name": "gaussian"}), ("sbf", {"name": "spherical_harmonics"}), ("num_atom_emb_layers", 0),
        ("quad_interaction", False), ("activation", "siqu"), ("use_pbc", False), ("name", "gemnet_t"),
        ("envelope", {"name": "exponential"}),
    ],
)  # fmt: skip
def test_what_no_published_file_has_is_refused_by_name(argument, value, write):
    config = {"model": {"name": "gemnet_oc", **arguments_of("slab"), argument: value}}
    with pytest.raises(ValueError, match=rf"checkpoint.pt: {'model' if argument == 'name' else argument}: "):
        ejmp.load(write(config=config))


def test_an_element_the_model_does_not_know(write):
    model = ejmp.load(write())
    graph = ejmp.build_graph(ejmp.Structure(numbers=[90, 8], positions=[[0, 0, 0], [0, 0, 2.0]]))
    with pytest.raises(ValueError, match="atomic number 90 is beyond the 83 elements"):
        model(graph)


def test_models_made_of_it(write, tmp_path):
    """Saved and loaded, pruned, copied: the same task and, where all blocks stay, the same outputs."""
    values, model = golden_values("cutoffs"), ejmp.load(write("cutoffs")).double()
    expected = outputs(model, values)[1]
    ejmp.save(ejmp.prune(model, blocks=3), tmp_path / "saved")
    for made in (ejmp.load(tmp_path / "saved"), copy.deepcopy(model)):
        assert made.tasks == model.tasks
        assert dataclasses.replace(made.config, kept_blocks=None) == model.config
        out = outputs(made, values)[1]
        assert torch.equal(out.energy, expected.energy)
        assert torch.equal(out.forces, expected.forces)
    small = ejmp.prune(model, keep=(0, 2))
    assert small.task() == model.task()
    scores = ejmp.block_relevance(small, [outputs(small, values)[0]])
    assert scores.combined.shape == (3,)


def test_bench_and_profile_take_it(write, tmp_path, capsys):
    """Pruned to fewer blocks, on its own graphs."""
    slab = fcc111("Cu", (1, 1, 2), vacuum=5.0)
    slab.set_tags(2 - slab.get_tags())  # numbers of layers from the top become bulk 0 and surface 1
    ase.io.write(tmp_path / "slab.xyz", slab)
    given = ("--model", str(write("cutoffs")), "--structures", str(tmp_path / "slab.xyz"), "--device", "cpu")
    for verb in (("bench", "--seconds", "0"), ("profile", "--blocks", "2", "--no-fvcore", "--rounds", "1")):
        result = tmp_path / f"{verb[0]}.json"
        assert cli.main([*verb, *given, "--precision", "fp32", "--output", str(result)]) == 0
        assert "given model of" in json.loads(result.read_text())["model"]
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [row["blocks"] for row in found["rows"]] == [3, 2]
    assert found["workload"]["cutoff"] == 6.0
    assert found["workload"]["max_neighbors"] == [14]
    assert cli.main(["bench", *given, "--small"]) == 2
    assert "exclude each other" in capsys.readouterr().err
