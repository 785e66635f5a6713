"""Checkpoints of a run: directories that are there as a whole or not at all, readable with any number of ranks.

RUN/step-00001000/ holds model.safetensors and config.json (so `ejmp.load` reads it), optimizer.safetensors (Adam's
moments by parameter name), ema.safetensors, state.json, and manifest.json with the size and hash of each of them. Rank
0 writes it under another name, reads it back, and only then gives it its own. All ranks must be able to read it.
Which checkpoint is the newest is seen from the directories; nothing points to it.
"""

import json
import logging
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ejmp.data.store.durable import hash_file, sync, written
from ejmp.model.checkpoint import load as load_model
from ejmp.model.checkpoint import write_files
from ejmp.train.distributed import broadcast
from ejmp.train.engine import Engine
from ejmp.train.moments import optimizer_state, optimizer_steps, set_optimizer_state
from ejmp.train.randomness import random_state, seed_all, set_random_state

LOG = logging.getLogger(__name__)
FORMAT = "ejmp-checkpoint-1"
NAME = re.compile(r"step-(\d{8,})")
LEFTOVER = re.compile(r"\.(step-\d+)\.(new|old|replaced)")


@dataclass(frozen=True, kw_only=True)
class Restored:
    """The contents of a checkpoint that `load` does not put into the engine."""

    path: Path
    """The checkpoint's directory."""
    step: int
    """Number of steps taken before it was saved, skipped ones too."""
    state: dict[str, Any]
    """State that was given to `save`."""
    ema: dict[str, Tensor] | None
    """Averaged weights by parameter name; None if the run keeps none."""


def save(
    engine: Engine,
    run: Path,
    step: int,
    state: Mapping[str, Any],
    *,
    ema: Mapping[str, Tensor] | None = None,
    best: bool = False,
) -> Path:
    """Write a checkpoint, and remove all but the newest `keep_checkpoints` and the best. All ranks must call it.

    Args:
        engine: engine whose weights, moments, loss scale and settings are saved, with the random state of every rank.
        run: directory of the run's checkpoints; it is made if need be.
        step: number of steps taken, which names the directory. One of the same name is replaced.
        state: anything else that is ready for JSON: position of the sampler, schedule, early stopping.
        ema: averaged weights by parameter name.
        best: whether to remember this checkpoint as the best so far.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: if the disk is full, or what was read back is not what was written.
    """
    path = run / f"step-{step:08d}"
    moments = optimizer_state(engine)
    randomness: list[Any] = [None] * engine.ranks.world_size
    dist.all_gather_object(randomness, random_state())
    if engine.ranks.rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        _tidy(run)
        new = path.with_name(f".{path.name}.new")
        new.mkdir()
        tensors = {"optimizer": moments} | ({} if ema is None else {"ema": dict(ema)})
        _write(new, engine, tensors, {"step": step, "state": dict(state), "random": randomness})
        _publish(new, path)
        if best:
            with written(run / "best.json") as file:
                file.write_text(json.dumps({"step": step}) + "\n")
        _remove_old(run, step, engine.config.keep_checkpoints)
    dist.barrier()
    return path


def _write(new: Path, engine: Engine, tensors: Mapping[str, Mapping[str, Tensor]], more: Mapping[str, Any]) -> None:
    """Write a checkpoint's files into a directory, the manifest last, and read them back."""
    from safetensors.torch import save_file  # noqa: PLC0415

    model = engine.objective.model
    write_files(model, new)
    _compare(new / "model.safetensors", model.state_dict())
    for name, values in tensors.items():
        path = new / f"{name}.safetensors"
        save_file({key: value.detach().cpu().contiguous() for key, value in values.items()}, path)
        _compare(path, values)
    state = {
        "format": FORMAT,
        **more,
        "engine": engine.state_dict(),
        "optimizer_steps": optimizer_steps(engine),
        "world_size": engine.ranks.world_size,
        "config": engine.config.to_dict(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "deepspeed")},
    }
    (new / "state.json").write_text(json.dumps(state) + "\n")
    files = sorted(new.iterdir())
    for file in files:
        sync(file)
    manifest = {file.name: {"bytes": file.stat().st_size, "blake2b": hash_file(file)} for file in files}
    (new / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": manifest}, indent=1) + "\n")
    sync(new / "manifest.json")
    sync(new)
    check_checkpoint(new)


def _compare(path: Path, expected: Mapping[str, Tensor]) -> None:
    """Raise OSError if a file's tensors differ in a bit from those it was made of."""
    from safetensors.torch import load_file  # noqa: PLC0415

    for name, value in load_file(path).items():
        if not torch.equal(_bits(value), _bits(expected[name].detach().cpu())):
            raise OSError(f"{path}: {name} is not what was written")


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().flatten().view(torch.uint8)


def _publish(new: Path, path: Path) -> None:
    """Give a finished directory its name, in place of one that may be there."""
    replaced = path.with_name(f".{path.name}.replaced")
    if path.exists():
        path.rename(replaced)
    new.rename(path)
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _tidy(run: Path) -> None:
    """Remove what a save that was cut off has left; put back the checkpoint it was about to replace."""
    for path in run.iterdir():
        match = LEFTOVER.fullmatch(path.name)
        if match and match[2] == "replaced" and not (run / match[1]).exists():
            path.rename(run / match[1])
        elif match:
            shutil.rmtree(path)


def _remove_old(run: Path, step: int, keep: int) -> None:
    """Remove the checkpoints up to this step, except for the newest `keep` of them and the best one."""
    chosen = best(run)
    for path in [path for path in steps(run) if step_of(path) <= step][keep:]:
        if path != chosen:
            old = path.with_name(f".{path.name}.old")
            path.rename(old)
            shutil.rmtree(old)


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def steps(run: Path) -> list[Path]:
    """Return the checkpoints of a run, whole or not, the newest first."""
    return sorted((path for path in run.glob("step-*") if NAME.fullmatch(path.name)), key=step_of, reverse=True)


def best(run: Path) -> Path | None:
    """Return the checkpoint that was saved as the best; None if no one was."""
    file = run / "best.json"
    return run / f"step-{json.loads(file.read_text())['step']:08d}" if file.exists() else None


def check_checkpoint(path: Path) -> None:
    """Raise ValueError, naming the file, if one of a checkpoint's files is missing or not as it was written."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        expected = {name: (file["bytes"], file["blake2b"]) for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: manifest.json is missing or damaged ({error})") from error
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size or hash_file(file) != digest:
            raise ValueError(f"{path}: {name} is missing or damaged")


def latest(run: Path) -> Path:
    """Return a run's newest checkpoint that is whole; damaged ones that are newer are named in a warning.

    Nothing may be saving there meanwhile.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if none is whole.
    """
    if run.is_dir():
        _tidy(run)
    found = steps(run)
    if not found:
        raise FileNotFoundError(f"{run}: there is no checkpoint to resume from")
    for path in found:
        try:
            check_checkpoint(path)
        except ValueError as error:
            LOG.warning("%s; trying an older one", error)
        else:
            return path
    raise ValueError(f"{run}: none of {len(found)} checkpoints is whole")


def resume(engine: Engine, run: Path) -> Restored:
    """Load a run's newest checkpoint that is whole, and set newer ones aside. All ranks must call it.

    Those are damaged. As `step-N.damaged` they do not count among the `keep_checkpoints` newest, for which whole ones
    would be removed.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if no checkpoint is whole, or the newest is not of this model.
    """
    path = None
    if engine.ranks.rank == 0:
        path, chosen = latest(run), best(run)
        for damaged in [p for p in steps(run) if step_of(p) > step_of(path) and p != chosen]:
            aside = damaged.with_name(f"{damaged.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            damaged.rename(aside)
    return load(engine, broadcast(path))


def load(engine: Engine, path: Path) -> Restored:
    """Put a checkpoint into an engine with any number of ranks and any ZeRO stage. All ranks must call it.

    With as many ranks as saved it, the random numbers go on too; otherwise they are seeded from the run's seed, the
    step and the rank.

    Raises:
        ValueError: if it is not of this model.
    """
    from safetensors.torch import load_file  # noqa: PLC0415

    state = json.loads((path / "state.json").read_text())
    if state.get("format") != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT!r}, got {state.get('format')!r}")
    model, saved = engine.objective.model, load_model(path, backend="reference")
    if saved.config != model.config:
        raise ValueError(f"{path}: expected a model with {model.config}, got {saved.config}")
    model.load_state_dict(saved.state_dict())  # copies, into the tensors that ZeRO shares
    if engine.zero is not None:
        engine.zero.refresh_fp32_params()
    set_optimizer_state(engine, load_file(path / "optimizer.safetensors"), state["optimizer_steps"])
    engine.load_state_dict(state["engine"])
    if state["world_size"] == engine.ranks.world_size:
        set_random_state(state["random"][engine.ranks.rank])
    else:
        seed_all(engine.config.seed, state["step"], engine.ranks.rank)
    ema = path / "ema.safetensors"
    return Restored(path=path, step=state["step"], state=state["state"], ema=load_file(ema) if ema.exists() else None)
