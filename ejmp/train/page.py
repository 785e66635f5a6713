"""The page of a training run: errors, learning curves, parity plots, how it was made, and how to use the model."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ejmp.data import make_batch
from ejmp.model.jmp import JMP
from ejmp.train.evaluate import Errors
from ejmp.train.markup import (
    COLORS,
    GLYPHS,
    INK,
    Cell,
    code,
    document,
    draw,
    facts,
    figure,
    folded,
    heading,
    legend,
    log_axis,
    need_matplotlib,
    number,
    paragraph,
    table,
)
from ejmp.train.objective import predict
from ejmp.train.sources import Split, TaskData, tasks_of

MOST_STRUCTURES = 128
"""Structures of a dataset in its parity plots."""
MOST_POINTS = 400
"""Points of a curve; each is the mean of successive values where there are more."""
BATCH = 16
Line = dict[str, Any]
"""A line of log.jsonl."""
Pair = tuple[np.ndarray, np.ndarray]
"""Labels and predictions, [n] each."""


def report_page(folder: Path, made: str, model: JMP, sources: Sequence[TaskData], rows: dict[str, Errors]) -> str:
    """Write the page of a run, and return the line that says where it is, or that matplotlib is missing.

    Arguments are those of `write_page`.
    """
    try:
        path = write_page(folder, made, model, sources, rows)
    except ModuleNotFoundError as error:
        return f"\nno page of it: {error}"
    return f"\nits page: {path}"


def write_page(folder: Path, made: str, model: JMP, sources: Sequence[TaskData], rows: dict[str, Errors]) -> Path:
    """Write page.html, which needs no other file, into the folder of a run, and return its path.

    Args:
        folder: folder of the run, with its log.jsonl and run.json.
        made: what was done, such as "Fine-tuned".
        model: the model that came out.
        sources: datasets with their tasks; parity plots are of their test splits, or where one has none, of validation.
        rows: errors by name of the model.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    need_matplotlib()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    described = json.loads((folder / "run.json").read_text())
    split: Split = "test" if all("test" in source.splits for source in sources) else "val"
    title = ", ".join(source.name for source in sources)
    body = [
        heading(title, 1),
        paragraph(f"{made} by ejmp: errors, learning curves, and predictions against labels."),
        table("Data.", ["dataset", "structures", "graphs", "forces"], map(_data, sources)),
        heading("Errors"),
        _errors(rows),
        heading("Learning curves"),
        _curves(log),
        _validations(log),
        heading(f"Predictions against labels, {split} split"),
        _parity(model, sources, split),
        heading("How to use the model"),
        *_usage(folder, sources),
        heading("How it was made"),
        facts({name: value for name, value in described["machine"].items() if name != "load_before"}),
        folded("all settings", code(json.dumps(described, indent=1))),
    ]
    path = folder / "page.html"
    path.write_text(document(title, body), encoding="utf-8")
    return path


def _data(source: TaskData) -> list[Cell]:
    counts = ", ".join(f"{len(data)} ({name})" for name, data in source.splits.items())
    graph, forces = source.task.graph, str(source.task.forces)
    told = {"gradient": "gradient of the energy", "direct": "predicted directly"}.get(forces, "none")
    return [source.name, counts, f"{graph.cutoff:g} A, {graph.max_neighbors} neighbours", told]


def _errors(rows: dict[str, Errors]) -> str:
    kinds = dict.fromkeys((name, kind) for errors in rows.values() for name, found in errors.items() for kind in found)
    cells = [
        [(name, spoken(kind)), *(number(errors.get(name, {}).get(kind)) for errors in rows.values())]
        for name, kind in kinds
    ]
    return table("Mean absolute errors.", ["error", *rows], cells)


def spoken(kind: str) -> str:
    """Return what people call an error of `Maes.result`: "forces_meV_per_A" is "forces, meV/A"."""
    what, _, unit = kind.partition("_")
    return f"{what}, {unit.replace('_per_', '/')}" if unit else what


def _by_step(log: Sequence[Line], event: str) -> list[Line]:
    """Return the lines of an event in the order of their steps; of a step that was repeated, the last one."""
    return [line for _, line in sorted({line["step"]: line for line in log if line["event"] == event}.items())]


def _thin(x: Iterable[float], y: Iterable[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """Return the finite points of a curve, or if there are too many, means of as many as are neighbours."""
    points = np.array([(a, b) for a, b in zip(x, y, strict=True) if b is not None and math.isfinite(b)]).reshape(-1, 2)
    if len(points) > MOST_POINTS:
        points = np.array([part.mean(0) for part in np.array_split(points, MOST_POINTS)])
    return points[:, 0], points[:, 1]


def _curves(log: Sequence[Line]) -> str:
    steps, validations = _by_step(log, "train"), _by_step(log, "validation")
    panels: list[tuple[Cell, str]] = []
    for key, label in (("loss", "loss"), ("lr", "learning rate")):
        curve = _thin([line["step"] for line in steps], [line[key] for line in steps])
        if len(curve[0]):
            panels.append((label, _curve_panel(key, label, {label: curve})))
    names = list(dict.fromkeys(name for line in validations for name, found in line.items() if isinstance(found, dict)))
    kinds = dict.fromkeys(kind for line in validations for name in names for kind in line.get(name, {}))
    for i, kind in enumerate(kinds):
        curves = {}
        for name in names:
            known = [line for line in validations if kind in line.get(name, {})]
            curves[name] = _thin([line["step"] for line in known], [line[name][kind] for line in known])
        panels.append((f"validation: {spoken(kind)}", _curve_panel(f"validation-{i}", spoken(kind), curves)))
    key = legend((name, *_look(i)) for i, name in enumerate(names)) if len(names) > 1 else ""
    skipped = len(_by_step(log, "skipped"))
    caption = "Loss and base learning rate, and mean absolute errors of the validation split, by step."
    return figure(panels, caption + f" Steps skipped because they were not finite: {skipped}." * bool(skipped), key)


def _look(i: int) -> tuple[str, str]:
    return COLORS[i % len(COLORS)], list(GLYPHS)[i % len(GLYPHS)]


def _curve_panel(name: str, label: str, curves: dict[str, Pair]) -> str:
    """Return curves over steps as SVG; in it, the line of curve i is the group with the id NAME-curve-i."""

    def plot(axes: Any) -> None:
        for i, (x, y) in enumerate(curves.values()):
            color, marker = _look(i) if name.startswith("validation") else (INK, "o")
            axes.plot(x, y, color=color, marker=marker if len(x) <= 40 else None, markersize=3.5, gid=f"curve-{i}")
        axes.set(xlabel="step", ylabel=label)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if name != "lr":
            log_axis(axes, "y", np.concatenate([y for _, y in curves.values()]).tolist())

    told = "; ".join(
        f"{which}: from {number(float(y[0]))} at step {x[0]:.0f} to {number(float(y[-1]))} at step {x[-1]:.0f}"
        for which, (x, y) in curves.items()
        if len(x)
    )
    return draw(name, f"{label} by step. {told}", plot)


def _validations(log: Sequence[Line]) -> str:
    lines = _by_step(log, "validation")
    columns = dict.fromkeys(
        (name, kind) for line in lines for name, found in line.items() if isinstance(found, dict) for kind in found
    )
    rows = [[str(line["step"]), *(number(line.get(name, {}).get(kind)) for name, kind in columns)] for line in lines]
    titles = ["step", *(f"{name}: {spoken(kind)}" for name, kind in columns)]
    return folded("the numbers", table("Validation errors by step.", titles, rows))


def _parity(model: JMP, sources: Sequence[TaskData], split: Split) -> str:
    panels: list[tuple[Cell, str]] = []
    for i, source in enumerate(sources):
        task = source.task
        names = {"target": (f"{task.target}, {task.unit}", 1.0, task.unit), "forces": ("forces, eV/A", 1e3, "meV/A")}
        if task.target == "energy":
            names["target"] = ("energy per atom, less reference and mean, eV", 1e3, "meV")
        for kind, pair in compare(model, source, split).items():
            label, factor, unit = names[kind]
            error = factor * float(np.abs(pair[1] - pair[0]).mean())
            title = f"{source.name}: {label.partition(',')[0]}"
            told = f"mean absolute error {number(error)} {unit}, {len(pair[0])} values"
            panels.append(((title, told), _scatter(f"parity-{i}-{kind}", f"{title}, {told}", label, pair)))
    caption = (
        f"At most {MOST_STRUCTURES} structures of a dataset, evenly spread over its split; fixed atoms are left out."
    )
    return figure(panels, caption)


def _scatter(name: str, alt: str, label: str, pair: Pair) -> str:
    def plot(axes: Any) -> None:
        ends = [float(np.min(pair)), float(np.max(pair))]
        axes.plot(ends, ends, color=INK, linewidth=0.8)
        axes.plot(*pair, ".", markersize=3, alpha=0.5, color=COLORS[0], rasterized=True)
        axes.set(xlabel=label, ylabel="prediction")

    return draw(name, f"Predictions against labels, {alt}.", plot)


def compare(model: JMP, source: TaskData, split: Split) -> dict[str, Pair]:
    """Return labels and predictions of some structures of a split, spread evenly over it, without missing labels.

    "target" is the energy per atom less the linear reference and mean, in eV, or another target in its unit; it is left
    out if the model was not trained on it. "forces" are components on free atoms, eV/A, if the task has forces.
    """
    data, tasks, task = source.split(split), tasks_of([source]), source.task
    chosen = range(0, len(data), max(1, math.ceil(len(data) / MOST_STRUCTURES)))
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"target": [], "forces": []}
    model.eval()
    for first in range(0, len(chosen), BATCH):
        items = [data[i] for i in chosen[first : first + BATCH]]
        batch = make_batch(items, [0] * len(items), settings=task.graph, dtype=model.dtype).to(model.device)
        with torch.no_grad():
            raw, forces = predict(model, batch, tasks)
        if task.energy_weight:
            label, mine = tasks.raw_energy(batch), tasks.own_energy(raw, batch).double()
            if task.target == "energy":
                sides = [value * task.std / batch.graph.ptr.diff() for value in (label, mine)]
            else:
                sides = [value * task.std + task.mean for value in (label, mine)]
            known = ~label.isnan()
            found["target"].append((sides[0][known], sides[1][known]))
        if forces is not None:
            mine = tasks.forces(tasks.own_forces(forces, batch), batch)
            free = batch.has_forces & ~batch.fixed
            found["forces"].append((batch.forces[free].double().flatten(), mine[free].flatten()))
    joined = {
        name: [torch.cat(side).detach().cpu().numpy() for side in zip(*parts, strict=True)]
        for name, parts in found.items()
        if parts
    }
    return {name: (label, mine) for name, (label, mine) in joined.items() if len(label)}


def _usage(folder: Path, sources: Sequence[TaskData]) -> Iterable[str]:
    task = sources[0].task
    path = str((folder / "final").resolve())
    named = f", task={task.name!r}" if len(sources) > 1 else ""
    lines = ["import ase.io, ejmp", "", 'atoms = ase.io.read("structure.xyz")']
    if task.target == "energy":
        lines += [f"atoms.calc = ejmp.Calculator({path!r}{named})", "print(atoms.get_potential_energy())  # eV"]
    else:
        lines += [
            f"(found,) = ejmp.Predictor({path!r}{named})(atoms)",
            f"print(found.energy)  # {task.target}, {task.unit}",
        ]
    yield code("\n".join(lines))
