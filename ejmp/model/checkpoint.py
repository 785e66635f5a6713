"""Read upstream's Lightning checkpoints and ejmp's own directories; write the latter."""

import dataclasses
import json
import os
import re
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ejmp.limits import RefusedFileError, read_whole
from ejmp.model.config import JMPConfig, Precision
from ejmp.model.fairchem import is_fairchem, read_fairchem
from ejmp.model.jmp import JMP
from ejmp.model.layers import Dense
from ejmp.model.published import resolve
from ejmp.model.state_names import check_settings, find_state, our_names, without_prefix
from ejmp.model.task import Task, pretrain_tasks, read_tasks, tasks_text
from ejmp.model.tensor_file import TensorFile, check_stored, open_tensors
from ejmp.model.upstream import NO_ATOMS
from ejmp_kernels.quantized import quantize_weight

FORMAT = "ejmp-1"
TASKS = "tasks.json"
"""File of a saved model that says what its heads predict, in which units and of which graphs."""
SCALES = ".scales"
"""What the name of a weight in 8 bits is followed by in the name of its rows' scales."""
ADDED = {
    "head", "forces_coupled", "rbf_cutoff_atom_edges", "rbf_cutoff_quad_edges", "rbf_cutoff_atom_pairs", "depths",
    "kept_force_channels", "bf16_layers",
}  # fmt: skip
"""Fields of the config that models saved by earlier versions lack; they have the defaults, which are JMP's."""
State = dict[str, Tensor]


def load(
    path: str | os.PathLike[str],
    *,
    backend: Literal["auto", "reference"] = "auto",
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
) -> JMP:
    """Load a model, with the tasks it was saved with.

    JMP's pre-trained checkpoint gets the tasks of its paper, `ejmp.model.task.pretrain_tasks`. For any other file that
    does not say what its heads predict `model.tasks` is empty: nothing is guessed.

    Args:
        path: the name of a published model, such as "jmp-l", or "hf://OWNER/REPO" (see `ejmp.model.published`); a
            directory written by `save`; a .safetensors file (with config.json beside it, or sizes inferred from
            the tensors); an upstream checkpoint, pre-trained or fine-tuned, as Lightning or `torch.save` wrote it, with
            `module.` or another prefix or without; or one of fairchem 1.x's GemNet-OC. EMA weights are used when there
            are any. Nothing but tensors and plain values is ever unpickled. The weights that JMP's authors
            publish are licensed CC-BY-NC, those of the Open Catalyst Project CC-BY-4.0.
        backend: as for `JMP`.
        precision: as for `JMP`.
        device: where the model goes.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it has to be downloaded and cannot be.
        ValueError: if names or shapes do not match a JMP model, naming them.
    """
    path = resolve(path)
    config, tasks = None, ()
    if path.is_dir() or (path.suffix == ".safetensors" and path.with_name("config.json").exists()):
        directory = path if path.is_dir() else path.parent
        config, tasks = _read_config(directory / "config.json"), _read_tasks(directory / TASKS)
        path = directory / "model.safetensors" if path.is_dir() else path
    with open_tensors(path) as file:
        config, state, tasks = _described(file) if config is None else (config, _checked(file.contents), tasks)
        with torch.device("meta"):
            model = JMP(config, backend, precision, tasks=tasks)
        state, read = _from_eight_bits(state, file.read)
        model.load_state_dict(_match(model, state, read), assign=True)
    return model.to(device)


def _described(file: TensorFile) -> tuple[JMPConfig, State, tuple[Task, ...]]:
    """Return sizes, tensors without their values, and tasks of a file that has no config.json beside it."""
    path, checkpoint = file.path, file.contents
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path}: expected a checkpoint, a dict with a state_dict, got {type(checkpoint).__name__}")  # noqa: TRY004
    if path.suffix == ".safetensors":
        state = our_names(without_prefix(_checked(checkpoint)))
        return infer_config(state), state, ()
    if is_fairchem(checkpoint):
        config, state, task = read_fairchem(path, checkpoint, file.read)
        return config, state, (task,)
    plain = _plain_state(path, checkpoint)
    state, tasks = our_names(plain), pretrain_tasks()
    config = infer_config(state)
    if state is not plain:  # a fine-tuned model
        reduction = check_settings(checkpoint.get("hyper_parameters"))
        config, tasks = dataclasses.replace(config, energy_reduction=reduction), ()
    return config, state, tasks if config.num_tasks == len(tasks) else ()  # else one made of JMP's, with other heads


def _checked(state: Mapping[str, Tensor]) -> State:
    """Return a state dict of tensors that are all stored number by number."""
    for name, tensor in state.items():
        check_stored(tensor, name)
    return dict(state)


def save(
    model: JMP,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    weights: Literal["float", "int8"] = "float",
) -> None:
    """Write a directory with model.safetensors, config.json and tasks.json, complete or not at all.

    Tensors that upstream stores under two names are written once. A model that is replaced is moved aside, to
    PATH.old, until the new one is in place.

    Args:
        model: what to save.
        path: the directory; its parent must exist.
        overwrite: replace a model that is there.
        weights: "float": as they are; "int8": those of dense layers in 8 bits with a scale per row, as
            `precision="int8"` multiplies them, and all others in half precision, about a quarter of the size. `load`
            turns them into float32 again.

    Raises:
        FileExistsError: if the path exists and overwrite is False, or it is not a model of ejmp.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.old")
    if path.exists():
        if not overwrite:
            raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
        _check_replaceable(path)
        if aside.exists():
            raise FileExistsError(f"{aside} is in the way: an earlier save was cut off; look at it and remove it")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        write_files(model, new, weights)
        if not path.exists():
            new.rename(path)
            return
        path.rename(aside)
        try:
            new.rename(path)
        except BaseException:
            aside.rename(path)
            raise
        shutil.rmtree(aside)


def write_files(model: JMP, directory: Path, weights: Literal["float", "int8"] = "float") -> None:
    """Write what `load` reads into a directory that is there; `weights` as for `save`."""
    from safetensors.torch import save_file  # noqa: PLC0415 - building a model does not need it

    state = model.state_dict()
    kept = {names[0]: state[names[0]].contiguous() for names in _aliases(model)}
    if weights == "int8":
        kept = _in_eight_bits(model, kept)
    config = {"format": FORMAT, **dataclasses.asdict(model.config)}
    save_file(kept, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if model.tasks:
        (directory / TASKS).write_text(tasks_text(model.tasks))


def _in_eight_bits(model: JMP, state: State) -> State:
    """Return the state with weights of dense layers in 8 bits, beside their scales, and others in half precision."""
    exact = model.config.bf16_layers
    layers = [layer for name, layer in model.named_modules() if isinstance(layer, Dense) and name not in exact]
    dense = {id(layer.linear.weight) for layer in layers}
    names = {name for name, value in model.named_parameters() if id(value) in dense}
    smaller = {}
    for name, value in state.items():
        if name in names:
            smaller[name], smaller[name + SCALES] = quantize_weight(value)
        else:
            keep = value.numel() == 1 or value.abs().max() > torch.finfo(torch.float16).max
            smaller[name] = value if keep else value.half()
    return smaller


def _from_eight_bits(state: State, read: Callable[[Tensor], Tensor]) -> tuple[State, Callable[[Tensor], Tensor]]:
    """Return the state without scales, and what reads a tensor of it, times its scales if it has any."""
    narrow = [name for name, value in state.items() if value.dtype == torch.int8 and name + SCALES in state]
    scales = {id(state[name]): state[name + SCALES] for name in narrow}
    for name in narrow:
        shape, kind = state[name + SCALES].shape, state[name + SCALES].dtype
        if state[name].ndim != 2 or shape != state[name].shape[:1] or kind != torch.float32:
            raise ValueError(f"checkpoint: {name}{SCALES}: expected a float32 per row, got {list(shape)} {kind}")
    others = {name + SCALES for name in narrow}
    weights = {name: value for name, value in state.items() if name not in others}

    def scaled(value: Tensor) -> Tensor:
        if id(value) not in scales:
            return read(value)
        return read(value).float() * read(scales[id(value)])[:, None]

    return weights, scaled


def _check_replaceable(path: Path) -> None:
    """Refuse to replace anything that is not a saved model."""
    try:
        _read_config(path / "config.json")
    except (OSError, ValueError) as error:
        raise FileExistsError(f"{path} is not a saved model, and is not replaced ({error})") from error


def infer_config(state: State) -> JMPConfig:
    """Read the sizes of a model off its state dict (upstream's names); the radial cutoff is JMP's 12 A.

    Raises:
        ValueError: if a tensor that tells a size is missing or has the wrong number of dimensions.
    """

    def size(name: str, axis: int) -> int:
        if name not in state or state[name].ndim <= axis:
            raise ValueError(f"checkpoint: not a JMP state dict: {name} is missing or has the wrong shape")
        return state[name].shape[axis]

    def count(pattern: str) -> int:
        return len({match[1] for name in state if (match := re.match(pattern, name))})

    block, bases = "backbone.int_blocks.0", "backbone.bases"
    layer = r"\.(\d+)\.dense_mlp\.0\."
    out_block = r"backbone\.out_blocks\.0"
    config = JMPConfig(
        blocks=count(r"backbone\.int_blocks\.(\d+)\."),
        num_tasks=count(r"output\.out_energy\.(\d+)\."),
        direct_forces="output.out_forces.0.0.weight" in state,
        head="mlp" if "output.out_energy.0.2.weight" in state else "linear",
        emb_size_atom=size("embedding.atom_embedding.weight", 1),
        emb_size_edge=size(f"{block}.dense_ca.linear.weight", 0),
        emb_size_trip_in=size(f"{block}.trip_interaction.down_projection.linear.weight", 0),
        emb_size_trip_out=size(f"{block}.trip_interaction.mlp_cbf.bilinear.linear.weight", 0),
        emb_size_quad_in=size(f"{block}.quad_interaction.down_projection.linear.weight", 0),
        emb_size_quad_out=size(f"{block}.quad_interaction.mlp_sbf.bilinear.linear.weight", 0),
        emb_size_pair_in=size(f"{block}.atom_interaction.down_projection.linear.weight", 0),
        emb_size_pair_out=size(f"{block}.atom_interaction.bilinear.linear.weight", 0),
        emb_size_rbf=size(f"{bases}.mlp_rbf_tint.linear.weight", 0),
        emb_size_cbf=size(f"{bases}.mlp_cbf_tint.weight", 2),
        emb_size_sbf=size(f"{bases}.mlp_sbf_qint.weight", 2),
        num_radial=size(f"{bases}.mlp_cbf_tint.weight", 0),
        num_spherical=size(f"{bases}.mlp_cbf_tint.weight", 1),
        num_before_skip=count(r"backbone\.int_blocks\.0\.layers_before_skip" + layer),
        num_after_skip=count(r"backbone\.int_blocks\.0\.layers_after_skip" + layer),
        num_concat=count(r"backbone\.int_blocks\.0\.residual_m" + layer),
        num_atom=count(out_block + r"\.layers" + layer),
        num_output_after_atom=count(out_block + r"\.seq_energy2" + layer),
        num_atom_emb_layers=count(r"backbone\.int_blocks\.0\.atom_emb_layers" + layer),
        num_global_out_layers=count(r"backbone\.out_mlp_E\.out_mlp" + layer),
        num_elements=size("embedding.atom_embedding.weight", 0),
    )
    if config.num_output_after_atom == 0:
        raise ValueError(f"checkpoint: layers backbone.out_blocks.0.seq_energy2: {NO_ATOMS}")
    return config


def _read_config(path: Path) -> JMPConfig:
    try:
        values = json.loads(read_whole(path, "config_bytes"))
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f"expected format {FORMAT!r}")  # noqa: TRY301
        known = {field.name for field in dataclasses.fields(JMPConfig)}
        if not known - ADDED <= set(values) <= known:
            missing, unknown = sorted(known - ADDED - set(values)), sorted(set(values) - known)
            raise ValueError(f"missing {missing}, unknown {unknown}")  # noqa: TRY301
        for name in ("kept_blocks", "kept_force_channels", "depths", "bf16_layers"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        return JMPConfig(**values)
    except RefusedFileError as error:
        raise error if error.path == path else RefusedFileError(path, str(error)) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_tasks(path: Path) -> tuple[Task, ...]:
    """Return the tasks that a file keeps; none if there is no such file."""
    try:
        return read_tasks(read_whole(path, "config_bytes").decode()) if path.exists() else ()
    except RefusedFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _plain_state(path: Path, checkpoint: Mapping[str, Any]) -> State:
    """Return a checkpoint's tensors by name, without prefixes, with the EMA weights in place when there are any."""
    try:
        state = without_prefix(find_state(checkpoint))
    except ValueError as error:
        raise ValueError(f"{path}: not a JMP state dict: {error}") from error
    state = _checked(state)
    optimizers = checkpoint.get("optimizer_states")
    first = optimizers[0] if isinstance(optimizers, list | tuple) and optimizers else None
    ema = first.get("ema") if isinstance(first, Mapping) else None
    if isinstance(ema, Mapping):
        state |= _checked(without_prefix(dict(ema)))
    elif ema is not None and "embedding.weight" in state:
        text = f"{path}: the moving averages of this fine-tuned model have no names and are left out"
        warnings.warn(text, stacklevel=4)
    elif isinstance(ema, list | tuple):
        _use_ema(path, state, ema)
    return state


def _use_ema(path: Path, state: State, ema: Sequence[Tensor]) -> None:
    """Overwrite parameters by their moving averages, which upstream stores without names, in state-dict order."""
    names = [
        name
        for name in state
        if not name.endswith(("rbf.offset", "rbf.temps", "scale_factor"))
        and ".seq_energy_pre." not in name
        and not name.startswith("task_steps")
    ]
    if len(names) != len(ema):
        raise ValueError(f"{path}: {len(ema)} EMA weights for {len(names)} parameters")
    for name, average in zip(names, ema, strict=True):
        check_stored(average, f"EMA weight of {name}")
        if average.shape != state[name].shape:
            raise ValueError(
                f"{path}: EMA weight of {name}: expected {list(state[name].shape)}, got {list(average.shape)}"
            )
        state[name] = average
    for name in [name for name in state if ".seq_energy_pre." in name]:
        del state[name]


def _aliases(model: JMP) -> list[list[str]]:
    """Return the names of the state dict, grouped by tensor: upstream stores some tensors under several names."""
    groups: defaultdict[int, list[str]] = defaultdict(list)
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            groups[id(tensor)].append(name)
    return list(groups.values())


def _match(model: JMP, state: State, read: Callable[[Tensor], Tensor]) -> State:
    """Give every name of the model its tensor, strictly; one name of a shared tensor is enough.

    Names and shapes are compared before any value is read. Half-precision weights become float32: a model computes in
    low precision, but does not keep its weights in it. A ScaleFactor of zero is upstream's mark for one that was never
    fitted; it acts as one.
    """
    expected, groups = model.state_dict(), _aliases(model)
    present = [[name for name in names if name in state] for names in groups]
    missing = [names[0] for names, found in zip(groups, present, strict=True) if not found]
    unknown = [name for name in state if name not in expected]
    differing = [
        f"{name} {list(state[name].shape)} instead of {list(expected[name].shape)}"
        for found in present
        for name in found
        if state[name].shape != expected[name].shape
    ]
    for what, names in (("missing", missing), ("unknown", unknown), ("wrong shape", differing)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"checkpoint: {what}: {', '.join(names[:5])}{more}")
    matched = {}
    for names, found in zip(groups, present, strict=True):
        value = _weight(found[0], read(state[found[0]]))
        if any(not torch.equal(value, _weight(name, read(state[name]))) for name in found[1:]):
            raise ValueError(f"checkpoint: {' and '.join(found)} must be one tensor, but differ")
        matched.update(dict.fromkeys(names, value))
    return matched


def _weight(name: str, value: Tensor) -> Tensor:
    """Return a weight in float32 or float64.

    Raises:
        ValueError: if it is of a type that weights do not have, or NaN or infinite.
    """
    if value.dtype not in (torch.float32, torch.float64):
        if value.dtype not in (torch.float16, torch.bfloat16):
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(f"checkpoint: {name}: expected floats of 16, 32 or 64 bits, got {kind}; convert it first")
        value = value.float()
    if not value.sum().isfinite() and not value.isfinite().all():  # the sum is quick, but could overflow
        wrong = int((~value.isfinite()).sum())
        raise ValueError(f"checkpoint: {name}: {wrong:,} of {value.numel():,} numbers are NaN or infinite")
    return torch.where(value == 0, 1, value) if name.endswith(".scale_factor") else value
