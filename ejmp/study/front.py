"""The front of accuracy against speed: fewer blocks, narrower blocks, distilled or not, in several precisions."""

import dataclasses
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from ejmp.compress.config import REFIT_STRUCTURES, DistillConfig, FinalMLPStart
from ejmp.compress.pruning import prune
from ejmp.data import MixSampler
from ejmp.data.store.durable import write_json
from ejmp.graph.graph import AtomGraph
from ejmp.markdown import markdown_table
from ejmp.measure.report import axes_of
from ejmp.measure.timing import Rounds, by_turns, median_ratio
from ejmp.model.checkpoint import load, save
from ejmp.model.config import Precision
from ejmp.model.jmp import JMP
from ejmp.provenance import provenance
from ejmp.train import presets
from ejmp.train.config import TrainConfig
from ejmp.train.distributed import Ranks
from ejmp.train.evaluate import evaluate
from ejmp.train.loop import FINAL, Run, train
from ejmp.train.objective import Distillation, predict
from ejmp.train.search import ratio
from ejmp.train.sources import TaskData, at_most, graphs_of, loader_of, tasks_of

FRONT = "front.json"
"""The file of a front's folder that holds all that was measured."""
TIMED = 16
"""Structures in the batch that is timed, if there are so many."""


@dataclass(frozen=True, kw_only=True)
class FrontSettings:
    """Which models to compare, and how long to train and time them.

    Raises:
        ValueError: for an empty list, or a number out of range.
    """

    model: str
    """What `ejmp.load` reads: the model that all others are made of."""
    data: str | None
    """Record stores; None: the demo mix."""
    blocks: tuple[int, ...]
    """Numbers of blocks, the first ones of the model."""
    channels: tuple[int, ...]
    """Channels of edges."""
    steps: tuple[int, ...]
    """Steps of distillation; 0: none."""
    precisions: tuple[Precision, ...]
    """Precisions of the linear maps."""
    terms: DistillConfig
    """Terms of the distillation."""
    structures: int
    """Most validation structures of each dataset."""
    seconds: float
    """Time for timing all models by turns, s."""
    seed: int
    """Seed of the distillation, and of the choice of structures."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, least in (("blocks", 1), ("channels", 1), ("steps", 0)):
            values = getattr(self, name)
            if not values or min(values) < least:
                raise ValueError(f"--{name}: expected numbers from {least} on, got {values}")
        if not self.precisions or set(self.precisions) - {*get_args(Precision)}:
            raise ValueError(f"--precisions: expected some of {get_args(Precision)}, got {self.precisions}")
        if self.structures < 1 or not self.seconds > 0:
            raise ValueError("--structures, --seconds: expected positive numbers")

    def to_json(self) -> dict[str, Any]:
        """Return the settings, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to make the model smaller."""

    blocks: int
    channels: int
    steps: int

    @property
    def name(self) -> str:
        """The name of its folder, such as "b4-w48-kd400"."""
        return f"b{self.blocks}-w{self.channels}" + (f"-kd{self.steps}" if self.steps else "")


def candidates(settings: FrontSettings, model: JMP) -> list[Candidate]:
    """Return all candidates, the model as it is first; it is not distilled.

    Raises:
        ValueError: for more blocks or channels than the model has.
    """
    have = Candidate(blocks=model.config.blocks, channels=model.config.emb_size_edge, steps=0)
    for name, most in (("blocks", have.blocks), ("channels", have.channels)):
        if max(getattr(settings, name)) > most:
            raise ValueError(f"--{name}: the model has {most}, got {max(getattr(settings, name))}")
    found = [have]
    for blocks, channels, steps in itertools.product(settings.blocks, settings.channels, settings.steps):
        if (blocks, channels) != (have.blocks, have.channels):
            found.append(Candidate(blocks=blocks, channels=channels, steps=steps))
    return list(dict.fromkeys(found))


def measure(
    folder: Path,
    settings: FrontSettings,
    sources: Sequence[TaskData],
    ranks: Ranks,
    report: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Make, distil, evaluate and time all candidates; write and return what was found.

    Each model is kept in `folder`, under its name, and what is there already is not made again. Models are pruned with
    a refitted final MLP and, where they are narrower, with least squares (`ejmp.prune`). Errors are those on validation
    structures over the whole model's in float32 (`ejmp.train.search.ratio`); times are of the prediction of one batch
    of validation structures, all models by turns.

    Args:
        folder: for the models and the result.
        settings: what to compare.
        sources: datasets with splits "train" and "val", and the model's tasks.
        ranks: this process; there must be no other.
        report: called with a line about what is happening.

    Returns:
        Settings, provenance and a row per candidate and precision; `table` and `picture` show it.

    Raises:
        ValueError: for sizes that the model does not have.
    """
    whole = load(settings.model).to(ranks.device)
    chosen = [at_most(source, "val", settings.structures, seed=settings.seed) for source in sources]
    every = candidates(settings, whole)
    start = _Start(whole, sources, settings.seed)
    models: dict[Candidate, JMP] = {every[0]: whole}
    for number, candidate in enumerate(every[1:], start=2):
        report(f"{candidate.name}: model {number} of {len(every)}")
        models[candidate] = _made(candidate, folder, settings, sources, ranks, start)
    errors = {}
    for (candidate, model), precision in itertools.product(models.items(), settings.precisions):
        errors[candidate, precision] = evaluate(model.on(precision=precision).to(ranks.device), chosen, ranks)
    first = next(iter(errors.values()))
    report(f"{len(errors)} errors measured; timing")
    seconds = _times(models, settings, chosen, ranks)
    reference = seconds[every[0].blocks, every[0].channels, settings.precisions[0]]
    rows = []
    for (candidate, precision), found in errors.items():
        times = seconds[candidate.blocks, candidate.channels, precision]
        row = dataclasses.asdict(candidate) | {"name": candidate.name, "precision": precision, "errors": found}
        row |= {"error": ratio(found, first), "speed": median_ratio(reference, times)}
        row |= {"structures_per_s": 1 / statistics.median(times), "rounds": len(times)}
        row["parameters"] = sum(parameter.numel() for parameter in models[candidate].parameters())
        rows.append(row)
    mark(rows)
    result = {"settings": settings.to_json(), "provenance": provenance(ranks.device), "rows": rows}
    write_json(folder / FRONT, result)
    return result


@dataclass(frozen=True)
class _Start:
    """The whole model, and graphs to fit smaller ones on."""

    model: JMP
    sources: Sequence[TaskData]
    seed: int

    @functools.cached_property
    def graphs(self) -> list[AtomGraph]:
        """The graphs, made when they are first needed."""
        return list(graphs_of(self.model, self.sources, REFIT_STRUCTURES, seed=self.seed))


def _made(
    candidate: Candidate,
    folder: Path,
    settings: FrontSettings,
    sources: Sequence[TaskData],
    ranks: Ranks,
    start: _Start,
) -> JMP:
    """Return a candidate's model, as it is in the folder or newly made."""
    path = folder / candidate.name
    if candidate.steps == 0:
        if not path.exists():
            whole = start.model
            narrower = candidate.channels if candidate.channels < whole.config.emb_size_edge else None
            mlp: FinalMLPStart = "refit" if candidate.blocks < whole.config.blocks else "sliced"
            sizes = {"blocks": candidate.blocks, "edge_channels": narrower}
            save(prune(whole, final_mlp=mlp, data=start.graphs, **sizes), path)
        return load(path).to(ranks.device)
    if not (path / FINAL).exists():
        student = _made(dataclasses.replace(candidate, steps=0), folder, settings, sources, ranks, start)
        path.mkdir(exist_ok=True)
        run = Run(
            objective=Distillation(student, start.model, tasks_of(sources), settings.terms),
            sources=sources,
            config=_training(settings, candidate),
            directory=path,
            ranks=ranks,
            validate_first=False,
            force=True,  # the front's settings were compared, and rows say which commit made them
        )
        if not train(run, resume=None).finished:
            raise SystemExit(0)  # it was told to stop, and goes on from a checkpoint
    return load(path / FINAL).to(ranks.device)


def _training(settings: FrontSettings, candidate: Candidate) -> TrainConfig:
    """Return the settings of a distillation, with one validation at its end."""
    usual = presets.demo("distill", blocks=candidate.blocks) if settings.data is None else presets.distill()
    steps = candidate.steps
    lengths = {"steps": steps, "validate_every": steps, "checkpoint_every": max(1, min(usual.checkpoint_every, steps))}
    warmup = min(usual.warmup_steps, max(1, steps // 4))
    return dataclasses.replace(usual, samples=None, warmup_steps=warmup, seed=settings.seed, **lengths)


def _times(
    models: Mapping[Candidate, JMP], settings: FrontSettings, sources: Sequence[TaskData], ranks: Ranks
) -> dict[tuple[int, int, Precision], list[float]]:
    """Return the seconds per structure of each round, for each size and precision; training makes no difference."""
    sampler = MixSampler(sizes=[len(source.split("val")) for source in sources], seed=settings.seed, batch_size=TIMED)
    batch = next(iter(loader_of(sources, "val", sampler, device=ranks.device).batches(0, TIMED)))
    tasks = tasks_of(sources)

    def call(model: JMP) -> None:
        with torch.no_grad():
            predict(model, batch, tasks)

    calls: dict[tuple[int, int, Precision], Callable[[], None]] = {}
    for (candidate, model), precision in itertools.product(models.items(), settings.precisions):
        ready = model.on(precision=precision).to(ranks.device).eval()
        calls.setdefault((candidate.blocks, candidate.channels, precision), lambda ready=ready: call(ready))
    found = by_turns(calls, ranks.device, Rounds(least=5, most=200, seconds=settings.seconds))
    return {name: [each / batch.graph.num_structures for each in seconds] for name, seconds in found.items()}


def mark(rows: Sequence[dict[str, Any]]) -> None:
    """Note in each row whether it is on the front of all: whether no other one is better in speed and error."""
    for row in rows:
        row["on_front"] = not any(_dominates(other, row) for other in rows)


def _dominates(other: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Return whether one model is as fast and as accurate as another, and better in one of the two."""
    no_worse = other["speed"] >= row["speed"] and other["error"] <= row["error"]
    return no_worse and (other["speed"] > row["speed"] or other["error"] < row["error"])


def fastest(result: Mapping[str, Any], percent: float) -> Mapping[str, Any]:
    """Return the row of the fastest model with at most so many percent more error than the whole model.

    Raises:
        ValueError: for a negative percentage.
    """
    if percent < 0:
        raise ValueError(f"--within: expected 0 or more percent, got {percent:g}")
    return max(
        (row for row in result["rows"] if row["error"] <= 1 + percent / 100),
        key=lambda row: (row["speed"], -row["error"]),
    )


def folder_of(row: Mapping[str, Any], folder: Path, settings: FrontSettings) -> str:
    """Return what `ejmp.load` reads of a row's model, and its precision."""
    path = folder / row["name"]
    whole = Path(settings.model)
    saved = path / FINAL if row["steps"] else path if path.exists() else whole
    return f"{saved} in {row['precision']}"


def table(result: Mapping[str, Any]) -> str:
    """Return a Markdown table of all models, the fastest first; those on the front are marked."""
    rows = [
        [
            row["name"],
            row["precision"],
            f"{row['structures_per_s']:.3g}",
            f"{row['speed']:.2f}",
            f"{row['error']:.3f}",
            f"{row['parameters']:,}",
            "yes" if row["on_front"] else "",
        ]
        for row in sorted(result["rows"], key=lambda row: -row["speed"])
    ]
    titles = ["model", "precision", "structures/s", "x of the whole model", "error", "parameters", "front"]
    return markdown_table(titles, rows, numbers=True)


def picture(result: Mapping[str, Any], path: Path) -> None:
    """Draw error against speed: the paper's way, ours, and the front of all.

    Args:
        result: what `measure` returned.
        path: file to write, .png or .svg.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        kinds.setdefault(_kind(row, result["rows"][0]), []).append(row)
    front = sorted((row for row in result["rows"] if row["on_front"]), key=lambda row: row["speed"])
    with axes_of(path, 7) as axes:
        axes.plot([row["speed"] for row in front], [row["error"] for row in front], "-", color="0.7", label="front")
        for (kind, rows), marker in zip(sorted(kinds.items()), itertools.cycle("os^Dv<>P"), strict=False):
            axes.plot([row["speed"] for row in rows], [row["error"] for row in rows], marker, label=kind)
        axes.set(xlabel="structures per second over the whole model's", ylabel="error over the whole model's")
        axes.set_ylim(top=1 + 1.6 * (max(row["error"] for row in result["rows"]) - 1) + 0.01)  # room for the legend


def _kind(row: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    """Return what a legend calls a model of this kind."""
    if (row["blocks"], row["channels"]) == (whole["blocks"], whole["channels"]):
        kind = "whole model"
    else:
        kind = "narrower" if row["channels"] < whole["channels"] else "fewer blocks"
        kind += ", distilled" if row["steps"] else ", least squares"
    return f"{kind}, {row['precision']}"
