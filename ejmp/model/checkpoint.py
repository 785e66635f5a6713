"""Read upstream's Lightning checkpoints and ejmp's own directories; write the latter."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ejmp.model.config import JMPConfig, Precision
from ejmp.model.fairchem import is_fairchem, read_fairchem
from ejmp.model.jmp import JMP
from ejmp.model.published import resolve
from ejmp.model.state_names import check_settings, find_state, our_names, without_prefix
from ejmp.model.task import Task, pretrain_tasks, read_tasks, tasks_text

FORMAT = "ejmp-1"
TASKS = "tasks.json"
"""File of a saved model that says what its heads predict, in which units and of which graphs."""
ADDED = {"head", "forces_coupled", "rbf_cutoff_atom_edges", "rbf_cutoff_quad_edges", "rbf_cutoff_atom_pairs"}
"""Fields of the config that models saved by earlier versions lack; they have the defaults, which are JMP's."""
SUSPICIOUS = ("builtins", "__builtin__", "os", "posix", "nt", "subprocess", "sys", "runpy", "shutil", "socket")
"""Modules of which no checkpoint needs anything: a file that names one is refused as a whole."""
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
    if path.suffix == ".safetensors":
        state = _read_safetensors(path)
        if config is None:
            state = our_names(without_prefix(state))
            config = infer_config(state)
    else:
        checkpoint = _read_checkpoint(path)
        if is_fairchem(checkpoint):
            config, state, task = read_fairchem(path, checkpoint)
            tasks = (task,)
        else:
            plain = _plain_state(path, checkpoint)
            state, tasks = our_names(plain), pretrain_tasks()
            config = infer_config(state)
            if state is not plain:  # a fine-tuned model
                reduction = check_settings(checkpoint.get("hyper_parameters"))
                config, tasks = dataclasses.replace(config, energy_reduction=reduction), ()
            tasks = tasks if config.num_tasks == len(tasks) else ()  # one made of JMP's, which does not say what it is
    with torch.device("meta"):
        model = JMP(config, backend, precision, tasks=tasks)
    model.load_state_dict(_match(model, state), assign=True)
    return model.to(device)


def save(
    model: JMP,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> None:
    """Write a directory with model.safetensors, config.json and tasks.json, complete or not at all.

    Tensors that upstream stores under two names are written once. A model that is replaced is moved aside, to
    PATH.old, until the new one is in place.

    Args:
        model: what to save.
        path: the directory; its parent must exist.
        overwrite: replace a model that is there.

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
        write_files(model, new)
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


def write_files(model: JMP, directory: Path) -> None:
    """Write what `load` reads into a directory that is there."""
    from safetensors.torch import save_file  # noqa: PLC0415 - building a model does not need it

    state = model.state_dict()
    kept = {names[0]: state[names[0]].contiguous() for names in _aliases(model)}
    config = {"format": FORMAT, **dataclasses.asdict(model.config)}
    save_file(kept, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if model.tasks:
        (directory / TASKS).write_text(tasks_text(model.tasks))


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
    return JMPConfig(
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


def _read_config(path: Path) -> JMPConfig:
    values = json.loads(path.read_text())
    if values.pop("format", None) != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT!r}")
    known = {field.name for field in dataclasses.fields(JMPConfig)}
    if not known - ADDED <= set(values) <= known:
        missing, unknown = sorted(known - ADDED - set(values)), sorted(set(values) - known)
        raise ValueError(f"{path}: missing {missing}, unknown {unknown}")
    if values["kept_blocks"] is not None:
        values["kept_blocks"] = tuple(values["kept_blocks"])
    return JMPConfig(**values)


def _read_tasks(path: Path) -> tuple[Task, ...]:
    """Return the tasks that a file keeps; none if there is no such file."""
    try:
        return read_tasks(path.read_text()) if path.exists() else ()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415

    try:
        # Copies are aligned in memory as fresh tensors are; products with unaligned weights round differently.
        return {name: value.clone() for name, value in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def _read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Return the contents of a file that `torch.save` wrote, tensors and plain values only.

    Objects of other kinds, such as hyper-parameters of a Lightning file, are left out of it.
    """
    try:
        checkpoint: Any = _load_plain(path)
    except FileNotFoundError:
        raise
    except Exception as error:
        checkpoint = _load_without_objects(path)
        if checkpoint is None:
            asked = re.search(r"GLOBAL (\S+)", str(error))
            why = (
                f"it asks for {asked[1]}" if asked else f"{type(error).__name__}: {str(error).partition('. ')[0][:200]}"
            )
            raise ValueError(
                f"{path}: not a checkpoint of plain tensors ({why}); where it was made, save only the state_dict"
            ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path}: expected a checkpoint, a dict with a state_dict, got {type(checkpoint).__name__}")  # noqa: TRY004
    return checkpoint


def _load_plain(path: Path, more: Iterable[Any] = ()) -> Any:
    with torch.serialization.safe_globals([*_harmless(), *more]):
        return torch.load(path, map_location="cpu", weights_only=True)


class _NotRead:
    """What stands for an object of an unknown kind: it takes whatever the file gives it, and keeps nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _load_without_objects(path: Path) -> Any:
    """Load a file with an empty object for each of an unknown kind; None if that is not possible.

    Nothing that the file names is imported or called.
    """
    made: dict[str, type] = {}
    try:
        with torch.serialization.safe_globals(_harmless()):
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if any(name.partition(".")[0] in SUSPICIOUS for name in unknown):
            return None
        for _ in range(len(unknown) + 1):
            # torch tells allowed classes from others by type, so each name needs a class of its own
            stand_ins = [(_stand_in(name, made.get(name)), name) for name in unknown]
            try:
                return _load_plain(path, stand_ins)
            except pickle.UnpicklingError as error:
                # torch puts items into dicts and lists only: a class that is filled like one has to make one
                filled = re.search(r"Can only (SETITEM|append|extend).* got <class '([^']+)'>", str(error))
                if filled is None:
                    return None
                kind = OrderedDict if filled[1] == "SETITEM" else list
                made |= {name: kind for name in unknown if filled[2].endswith(f".{name}") or filled[2] == name}
    except Exception:  # noqa: BLE001 - whatever it is, the first error is the one to show
        return None
    return None


def _stand_in(name: str, made: type | None) -> type:
    """Return a class in place of an unknown one, whose objects keep nothing; or which makes a dict or a list."""
    return type(name, (_NotRead,), {} if made is None else {"__new__": lambda _, *__, **___: made()})


def _harmless() -> list[Any]:
    """Return what makes NumPy's numbers and arrays, paths and dicts with defaults: optimisers and logs have some."""
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    made: list[Any] = [
        (function, f"{home}.multiarray.{name}")
        for function, name in ((scalar, "scalar"), (array, "_reconstruct"))
        for home in ("numpy.core", "numpy._core")
    ]
    kinds = {type(np.dtype(kind)) for kind in "?bhilqBHILQefd"}
    return [*made, np.dtype, np.ndarray, *kinds, defaultdict, dict, (PurePosixPath, "pathlib.PosixPath")]


def _plain_state(path: Path, checkpoint: Mapping[str, Any]) -> State:
    """Return a checkpoint's tensors by name, without prefixes, with the EMA weights in place when there are any."""
    try:
        state = without_prefix(find_state(checkpoint))
    except ValueError as error:
        raise ValueError(f"{path}: not a JMP state dict: {error}") from error
    optimizers = checkpoint.get("optimizer_states") or [{}]
    ema = optimizers[0].get("ema") if isinstance(optimizers[0], Mapping) else None
    if isinstance(ema, Mapping):
        state |= without_prefix(dict(ema))
    elif ema is not None and "embedding.weight" in state:
        text = f"{path}: the moving averages of this fine-tuned model have no names and are left out"
        warnings.warn(text, stacklevel=3)
    elif ema is not None:
        _use_ema(path, state, ema)
    return state


def _use_ema(path: Path, state: State, ema: tuple[Tensor, ...]) -> None:
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


def _match(model: JMP, state: State) -> State:
    """Give every name of the model its tensor, strictly; one name of a shared tensor is enough.

    Half-precision weights become float32: a model computes in low precision, but does not keep its weights in it.
    A ScaleFactor of zero is upstream's mark for one that was never fitted; it acts as one.
    """
    expected = model.state_dict()
    missing, differing, matched = [], [], {}
    for names in _aliases(model):
        present = [name for name in names if name in state]
        if not present:
            missing.append(names[0])
            continue
        value = state[present[0]]
        if any(not torch.equal(value, state[name]) for name in present[1:]):
            raise ValueError(f"checkpoint: {' and '.join(present)} must be one tensor, but differ")
        if value.shape != expected[names[0]].shape:
            differing.append(f"{names[0]} {list(value.shape)} instead of {list(expected[names[0]].shape)}")
        if not value.is_floating_point():
            raise ValueError(f"checkpoint: {names[0]}: expected floats, got {value.dtype}")
        if value.dtype not in (torch.float32, torch.float64):
            value = value.float()
        if names[0].endswith(".scale_factor"):
            value = torch.where(value == 0, torch.ones_like(value), value)
        matched.update(dict.fromkeys(names, value))
    unknown = [name for name in state if name not in expected]
    for what, names in (("missing", missing), ("unknown", unknown), ("wrong shape", differing)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"checkpoint: {what}: {', '.join(names[:5])}{more}")
    return matched
