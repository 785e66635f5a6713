"""The tensors of a JMP checkpoint, however it was saved, under the names that ejmp has for them.

A model that was fine-tuned with that code has its embedding and heads under other names than a pre-trained one: those
of rMD17, MD22 and SPICE are `out_energy`, without biases, and those of QM9, QMOF and MatBench `graph_outputs`.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
ANCHOR = "backbone.int_blocks.0."
"""Part of a name that every JMP model has, by which a prefix is found."""
STATES = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which checkpoints keep their state dict."""
AVERAGES = ("ema_state_dict", "ema_dict", "ema", "model_ema", "state_dict_ema")
"""Keys under which checkpoints keep moving averages with names, which are taken instead."""
_NOT_OF_THE_MODEL = re.compile(r"(train|val|test)_metrics\.|task_steps|n_averaged$|.*_class_weights$")
_FORCE_BRANCH = re.compile(r"backbone\.(out_mlp_F\.|out_blocks\.\d+\.(seq_forces|dense_rbf_F|scale_rbf_F)\.)")
_HEAD = re.compile(
    r"(?P<kind>graph|node)_outputs\.(_module_dict\.)?(ft_mlp_|_typed_moduledict_)?(?P<target>[^.]+)\.out_mlp\.(?P<rest>.+)"
)
_ENERGY_FORCES = re.compile(r"out_(energy|forces)\.(\d+\.(weight|bias))")


def find_state(checkpoint: Mapping[str, Any]) -> State:
    """Return the state dict of a checkpoint of any layout: bare, under one of STATES, or averages under AVERAGES.

    Raises:
        ValueError: if there is none, naming what there is.
    """
    for key in (*AVERAGES, *STATES):
        found = checkpoint.get(key)
        if isinstance(found, Mapping) and _is_state(found):
            return dict(found)
        if isinstance(found, Mapping) and any(_is_state(found.get(inner)) for inner in STATES):
            return find_state(found)
    if _is_state(checkpoint):
        return dict(checkpoint)
    raise ValueError(f"no tensors by name in it; its keys are {', '.join(map(str, checkpoint))[:300] or 'none'}")


def _is_state(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(name, str) for name in value) and all(isinstance(item, Tensor) for item in value.values())


def without_prefix(state: State) -> State:
    """Return a state dict without what DistributedDataParallel, torch.compile or a wrapper put before its names.

    Raises:
        ValueError: if only some of the names have the prefix, naming one that has not.
    """
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not _NOT_OF_THE_MODEL.match(name)}
    prefix = next((name[: name.index(ANCHOR)] for name in state if ANCHOR in name), "")
    others = [name for name in state if not name.startswith(prefix)]
    if others:
        raise ValueError(f"checkpoint: the model's names start with {prefix!r}, but not {', '.join(others[:3])}")
    return {name.removeprefix(prefix): value for name, value in state.items()}


def our_names(state: State) -> State:
    """Return a state dict of upstream's fine-tuned models under the names of a pre-trained one; others as they are.

    Biases that a head lacks are zero, and a force branch that no head reads is left out.

    Raises:
        ValueError: for a head that ejmp does not have, naming it.
    """
    if "embedding.weight" not in state:
        return state
    named: State = {}
    targets: dict[str, list[str]] = {"energy": [], "forces": []}
    for name, value in state.items():
        if name == "embedding.weight":
            named["embedding.atom_embedding.weight"] = value
        elif match := _ENERGY_FORCES.fullmatch(name):
            named[f"output.out_{match[1]}.0.{match[2]}"] = value
        elif match := _HEAD.fullmatch(name):
            branch = "energy" if match["kind"] == "graph" else "forces"
            if match["target"] not in targets[branch]:
                targets[branch].append(match["target"])
            named[f"output.out_{branch}.{targets[branch].index(match['target'])}.{match['rest']}"] = value
        elif name.startswith(("backbone.", "embedding.")):
            named[name] = value
        else:
            raise ValueError(
                f"checkpoint: a fine-tuned JMP model with {name}, a head that ejmp does not have (it has those of one "
                "number per structure, as a sum over atoms, and of forces)"
            )
    if not any(name.startswith("output.out_energy.") for name in named):
        raise ValueError("checkpoint: a fine-tuned JMP model without a head for energies or another number")
    if not any(name.startswith("output.out_forces.") for name in named):
        named = {name: value for name, value in named.items() if not _FORCE_BRANCH.match(name)}
    return named | _zero_biases(named)


def _zero_biases(named: State) -> State:
    """Return the biases that the hidden layers of a fine-tuned head lack."""
    biases: State = {}
    for name in [name for name in named if name.startswith("output.") and name.endswith(".weight")]:
        bias, weight = name.removesuffix("weight") + "bias", named[name]
        if bias not in named and weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
            biases[bias] = torch.zeros(len(weight), dtype=weight.dtype)
    return biases


def check_settings(settings: Any) -> str:
    """Return how a fine-tuned model adds up its atoms, "sum" or "mean", as its hyper-parameters say.

    Args:
        settings: a checkpoint's `hyper_parameters`; anything but a mapping says nothing, and "sum" is JMP's default.

    Raises:
        ValueError: for an activation or a reduction that ejmp does not have.
    """
    if not isinstance(settings, Mapping):
        return "sum"
    activation = settings.get("activation", "scaled_silu")
    if activation in ("silu", "swish"):
        raise ValueError(f"checkpoint: activation: expected scaled_silu, got {activation}")
    reductions = settings.get("graph_scalar_reduction")
    kinds = set(reductions.values()) if isinstance(reductions, Mapping) else set()
    targets = settings.get("graph_scalar_targets")
    if isinstance(reductions, Mapping) and isinstance(targets, list | tuple):
        kinds = {reductions.get(target, "sum") for target in targets}
    if not kinds:
        return "sum"
    if len(kinds) > 1 or not kinds <= {"sum", "mean"}:
        raise ValueError(
            f"checkpoint: graph_scalar_reduction: expected sum or mean for all, got {sorted(map(str, kinds))}"
        )
    return kinds.pop()
