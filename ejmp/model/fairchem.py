"""Read GemNet-OC checkpoints of fairchem 1.x (OC20, OC22, ODAC23; MIT code, weights CC-BY-4.0).

They are JMP's network under other names, with linear heads, and with cutoffs and numbers of neighbours of their own for
each edge set (GemNet-OC, arXiv 2204.02782). A checkpoint is a dict: `state_dict`; `config`, with the model's arguments;
`ema`, whose averages are used; `normalizers` and `elementrefs`, which make a task; and `scale_dict`, which overrides
the scale factors. Arguments that no published checkpoint has are refused by name.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ejmp.graph.settings import GraphSettings
from ejmp.model.config import JMPConfig
from ejmp.model.jmp import JMP
from ejmp.model.task import Task
from ejmp.model.tensor_file import check_stored
from ejmp.model.upstream import NAMES

State = dict[str, Tensor]
TASK = "s2ef"
"""Name of a checkpoint's task: structure to energy and forces."""
REQUIRED = {
    "activation": ("silu", ("silu", "swish")),
    "quad_interaction": (False, (True,)),
    "atom_edge_interaction": (False, (True,)),
    "edge_atom_interaction": (False, (True,)),
    "atom_interaction": (False, (True,)),
    "use_pbc": (True, (True,)),
    "scale_basis": (False, (False,)),
    "rbf": ({"name": "gaussian"}, ({"name": "gaussian"},)),
    "rbf_spherical": (None, (None, {"name": "gaussian"})),
    "cbf": ({"name": "spherical_harmonics"}, ({"name": "spherical_harmonics"},)),
    "sbf": ({"name": "spherical_harmonics"}, ({"name": "legendre_outer"},)),
    "num_targets": (1, (1,)),
}
"""Arguments of which ejmp knows one meaning: fairchem's default, and the values that can be read."""
OTHER = {
    *("name", "otf_graph", "scale_file", "scale_backprop_forces", "output_init", "num_atoms", "bond_feat_dim"),
    *("cutoff", "cutoff_qint", "cutoff_aeaint", "cutoff_aint", "enforce_max_neighbors_strictly", "qint_tags"),
    *("max_neighbors", "max_neighbors_qint", "max_neighbors_aeaint", "max_neighbors_aint"),
    *("regress_forces", "direct_forces", "forces_coupled", "extensive", "envelope", "num_elements"),
}
"""Arguments that are read below, or do not change what the model computes."""
MOST_NUMBERS = 10_000
"""Most numbers of a deviation, a reference or a scale factor."""
PREFIXES = {
    "atom_emb.embeddings.": "embedding.atom_embedding.",
    "out_mlp_E.": "backbone.out_mlp_E.out_mlp.",
    "out_mlp_F.": "backbone.out_mlp_F.out_mlp.",
    "int_blocks.": "backbone.int_blocks.",
    "out_blocks.": "backbone.out_blocks.",
    "out_energy.linear.": "output.out_energy.0.0.",
    "out_forces.linear.": "output.out_forces.0.0.",
    "": "backbone.bases.",
}
"""What names of tensors begin with in fairchem and here; the first that fits."""
PARTS = (
    *("backbone.bases.mlp_", "embedding.", "backbone.bases.edge_emb.", "backbone.int_blocks.", "backbone.out_blocks."),
    *("backbone.out_mlp_E.", "output.out_energy.", "backbone.out_mlp_F.", "output.out_forces."),
)
"""Parts of the model under our names, in the order they have in fairchem."""


def is_fairchem(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint has the layout of fairchem 1.x."""
    config = checkpoint.get("config")
    return isinstance(config, Mapping) and "model" in config


def read_fairchem(
    path: Path, checkpoint: Mapping[str, Any], read: Callable[[Any], Any]
) -> tuple[JMPConfig, State, Task]:
    """Return sizes, tensors under our names, and the task of a checkpoint.

    Args:
        path: where it comes from, for messages.
        checkpoint: contents of the file.
        read: function that returns a tensor of it with its values, and other values as they are.

    Raises:
        ValueError: if the model is not GemNet-OC, has an argument that no published one has, or does not fit itself.
    """
    try:
        arguments = _arguments(checkpoint["config"])
        state = {_our_name(_stripped(name)): value for name, value in checkpoint["state_dict"].items()}
        for name, value in state.items():
            check_stored(value, name)
        graph = _graph_settings(arguments)
        config = _config(arguments, state, graph)
        _use_ema(state, checkpoint.get("ema"), config)
        few = partial(_few, read)
        _use_scales(state, checkpoint.get("scale_dict"), few)
        task = _task(checkpoint, arguments, graph, few)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a checkpoint of fairchem 1.x: {type(error).__name__} {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    widths = torch.full((config.num_radial,), 0.5 * (config.num_radial - 1) ** 2)
    state["backbone.bases.radial_basis.rbf.temps"] = widths  # JMP stores what fairchem computes
    return config, state, task


def _stripped(name: str) -> str:
    """Remove what DataParallel and DistributedDataParallel put before a name."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _our_name(name: str) -> str:
    start = next(start for start in PREFIXES if name.startswith(start))
    return PREFIXES[start] + name.removeprefix(start)


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the model, after checking those that have one meaning here."""
    model = config["model"]
    arguments = dict(model) if isinstance(model, Mapping) else {"name": model, **config.get("model_attributes", {})}
    name = arguments.get("name")
    if name not in ("gemnet_oc", "gemnet_oc_backbone"):
        raise ValueError(f"model: expected gemnet_oc of fairchem 1.x, got {name!r}")
    for argument, (default, allowed) in REQUIRED.items():
        value = arguments.get(argument, default)
        if value not in allowed:
            raise ValueError(f"{argument}: no published checkpoint has {value!r}, only {allowed[0]!r} can be read")
    if not arguments.get("num_atom_emb_layers", 0):
        raise ValueError("num_atom_emb_layers: no published checkpoint has 0")
    envelope = arguments.get("envelope", {"name": "polynomial", "exponent": 5})
    if envelope.get("name") != "polynomial":
        raise ValueError(f"envelope: no published checkpoint has {envelope!r}, only a polynomial can be read")
    unknown = sorted(set(arguments) - set(REQUIRED) - OTHER - set(NAMES))
    if unknown:
        warnings.warn(
            f"ejmp: unknown arguments of the model, which fairchem ignores: {', '.join(unknown)}", stacklevel=5
        )
    return arguments


def _graph_settings(arguments: Mapping[str, Any]) -> GraphSettings:
    """Return how the model's graphs are made, with fairchem's defaults."""
    cutoff, most = float(arguments.get("cutoff", 6.0)), int(arguments.get("max_neighbors", 50))
    pairs = []
    for edges in ("aeaint", "qint"):
        own = arguments.get(f"cutoff_{edges}"), arguments.get(f"max_neighbors_{edges}")
        pairs.append((cutoff if own[0] is None else float(own[0]), most if own[1] is None else int(own[1])))
    farthest, largest = arguments.get("cutoff_aint"), arguments.get("max_neighbors_aint")
    everything = [(cutoff, most), *pairs]
    longest = float(max(c for c, _ in everything) if farthest is None else farthest)
    largest = int(max(k for _, k in everything) if largest is None else largest)
    if not (arguments.get("otf_graph", False) or longest > 6 or largest > 50):
        raise ValueError("otf_graph: no published checkpoint takes edges from its data")
    tags = arguments.get("qint_tags")
    return GraphSettings(
        cutoff=cutoff,
        max_neighbors=most,
        atom_edges=pairs[0],
        quad_edges=pairs[1],
        atom_pairs=(longest, largest),
        quad_tags=(0, 1, 2) if tags is None else tuple(tags),
        tags="oc20",
        periodic="all",
        ties="cut" if arguments.get("enforce_max_neighbors_strictly", True) else "keep",
    )


def _config(arguments: Mapping[str, Any], state: State, graph: GraphSettings) -> JMPConfig:
    sizes = {ours: arguments[theirs] for theirs, ours in NAMES.items() if theirs in arguments}
    sizes["num_global_out_layers"] = arguments.get("num_global_out_layers", 2)
    pairs, _, atom, quad = graph.reach(1)
    return JMPConfig(
        **{**sizes, "num_elements": state["embedding.atom_embedding.weight"].shape[0]},
        num_tasks=1,
        head="linear",
        direct_forces=bool(arguments.get("direct_forces", False)),
        forces_coupled=bool(arguments.get("forces_coupled", False)),
        energy_reduction="sum" if arguments.get("extensive", True) else "mean",
        rbf_cutoff=graph.cutoff,
        rbf_cutoff_atom_edges=atom[0],
        rbf_cutoff_quad_edges=quad[0],
        rbf_cutoff_atom_pairs=pairs[0],
        envelope_exponent=arguments.get("envelope", {}).get("exponent", 5),
    )


def parameter_order(config: JMPConfig) -> list[str]:
    """Return our names of a model's parameters in fairchem's order, in which the moving averages are stored."""
    with torch.device("meta"):
        names = [name for name, _ in JMP(config, "reference").named_parameters()]
    return [name for part in PARTS for name in names if name.startswith(part)]


def _use_ema(state: State, ema: Mapping[str, Any] | None, config: JMPConfig) -> None:
    """Overwrite parameters by their moving averages, which are stored without names."""
    averages: Sequence[Tensor] | None = ema.get("shadow_params") if ema else None
    if averages is None:
        return
    names = parameter_order(config)
    if len(names) != len(averages):
        raise ValueError(f"ema: {len(averages)} averages for {len(names)} parameters")
    for name, average in zip(names, averages, strict=True):
        check_stored(average, f"ema of {name}")
        expected = state[name].shape if name in state else None
        if average.shape != expected:
            raise ValueError(f"ema: {name}: expected {expected}, got {average.shape}")
        state[name] = average
    for name in [name for name in state if ".seq_energy_pre." in name]:
        del state[name]  # another name of a tensor that was replaced


def _few(read: Callable[[Any], Any], value: Any) -> Tensor:
    """Return numbers of a checkpoint that are not weights: deviations, references, scale factors."""
    if isinstance(value, Tensor) and value.numel() > MOST_NUMBERS:
        raise ValueError(f"expected at most {MOST_NUMBERS} numbers, got a tensor {list(value.shape)}")
    return torch.as_tensor(read(value))


def _use_scales(state: State, scales: Mapping[str, Any] | None, few: Callable[[Any], Tensor]) -> None:
    """Overwrite the scale factors that a checkpoint names."""
    unknown = []
    for name, value in (scales or {}).items():
        place = _our_name(f"{_stripped(name).removesuffix('.scale_factor')}.scale_factor")
        if place in state:
            state[place] = few(value).to(state[place].dtype).reshape(state[place].shape)
        else:
            unknown.append(name)
    if unknown:
        warnings.warn(f"ejmp: scale factors that the model does not have: {', '.join(unknown)}", stacklevel=5)


def _task(
    checkpoint: Mapping[str, Any], arguments: Mapping[str, Any], graph: GraphSettings, few: Callable[[Any], Tensor]
) -> Task:
    """Return what the model predicts: energies in eV, referenced as its dataset is, and forces in eV/A."""
    normalizers = checkpoint.get("normalizers") or {}
    energy = normalizers.get("energy", normalizers.get("target"))
    forces = normalizers.get("forces", normalizers.get("grad_target"))
    mean, std = _moments(energy, few)
    force_mean, force_std = _moments(forces, few)
    if force_mean:
        raise ValueError(f"normalizers: expected forces of mean 0, got {force_mean}")
    direct, regressed = arguments.get("direct_forces", False), arguments.get("regress_forces", True)
    if regressed and not direct and force_std != std:
        raise ValueError(f"normalizers: forces are gradients of the energy, but divided by {force_std} and not {std}")
    return Task(
        name=TASK,
        linear_reference=_reference(checkpoint, few),
        mean=mean,
        std=std,
        force_std=force_std,
        force_weight=100.0 if regressed else 0.0,
        forces=("direct" if direct else "gradient") if regressed else None,
        graph=graph,
    )


def _moments(normalizer: Mapping[str, Any] | None, few: Callable[[Any], Tensor]) -> tuple[float, float]:
    """Return mean and standard deviation of a normalizer's state dict; 0 and 1 if there is none."""
    if not normalizer:
        return 0.0, 1.0
    return float(few(normalizer["mean"])), float(few(normalizer["std"]))


def _reference(checkpoint: Mapping[str, Any], few: Callable[[Any], Tensor]) -> dict[int, float] | None:
    """Return the energy of each element, which was subtracted; None if it was but the checkpoint does not say it."""
    references = checkpoint.get("elementrefs") or {}
    energy = references.get("energy", references.get("target"))
    if energy is not None:
        if isinstance(energy, Mapping) and "element_references" not in energy:
            return {int(number): float(few(value)) for number, value in energy.items()}
        values = energy["element_references"] if isinstance(energy, Mapping) else energy
        return {number: value for number, value in enumerate(few(values).double().tolist()) if number > 0}
    datasets = checkpoint["config"].get("dataset") or {}
    splits = datasets.values() if isinstance(datasets, Mapping) else datasets
    subtracted = any(isinstance(split, Mapping) and split.get("lin_ref") for split in (datasets, *splits))
    return None if subtracted else {}
