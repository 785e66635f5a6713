"""The page of a fine-tuned model: errors, learning curve, parity plots, and how to use the model."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ejmp.data import InOrder
from ejmp.model.jmp import JMP
from ejmp.train.evaluate import Errors
from ejmp.train.objective import predict
from ejmp.train.sources import Split, TaskData, loader_of, tasks_of

MOST = 1000
"""Structures in the parity plots."""
PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }} td, th {{ padding: 0.2em 1em; border-bottom: 1px solid #ccc; text-align: right }}
td:first-child {{ text-align: left }} pre {{ background: #eee; padding: 1em }} img {{ width: 100% }}</style>
<h1>{name}</h1>
<p>Fine-tuned on {counts} structures. Graphs: {graph}. Forces: {forces}.</p>
{errors}
<img alt="learning curve and parity plots" src="data:image/png;base64,{picture}">
<p>The parity plots compare predictions with labels of the {split} split. To use the model in ASE:</p>
<pre>import ase.io, ejmp

atoms = ase.io.read("structure.xyz")
atoms.calc = ejmp.Calculator({path!r})
print(atoms.get_potential_energy())</pre>
</html>
"""


def write_page(
    folder: Path, model: JMP, source: TaskData, split: Split, rows: dict[str, Errors], device: torch.device
) -> Path:
    """Write page.html into the folder of a fine-tuning run, and return its path.

    Args:
        folder: folder of the run, with its log.jsonl.
        model: the model that came out, on the device.
        source: dataset with its task.
        split: split to compare predictions and labels of.
        rows: errors by name of the model.
        device: where the model is.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    counts = ", ".join(f"{len(data)} ({name})" for name, data in source.splits.items())
    graph = source.task.graph
    page = PAGE.format(
        name=html.escape(source.name),
        counts=counts,
        graph=f"{graph.cutoff:g} A, {graph.max_neighbors} neighbours",
        forces={"gradient": "gradient of the energy", "direct": "predicted directly"}.get(
            str(source.task.forces), "none"
        ),
        errors=_table(rows),
        picture=_picture(log, _compare(model, source, split, device), source),
        split=split,
        path=str((folder / "final").resolve()),
    )
    path = folder / "page.html"
    path.write_text(page)
    return path


def _table(rows: dict[str, Errors]) -> str:
    columns = [(name, kind) for name, errors in next(iter(rows.values())).items() for kind in errors]
    lines = ["<th></th>" + "".join(f"<th>{html.escape(kind)}</th>" for _, kind in columns)]
    for model, errors in rows.items():
        cells = "".join(f"<td>{errors[name][kind]:.4g}</td>" for name, kind in columns)
        lines.append(f"<td>{html.escape(model)}</td>{cells}")
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _compare(model: JMP, source: TaskData, split: Split, device: torch.device) -> dict[str, tuple[Any, Any]]:
    """Return labels and predictions of some structures: the target [B], and the force components [3N] if there are."""
    data, tasks = source.split(split), tasks_of([source])
    sampler = InOrder(sizes=[len(data)], batch_size=16)
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    model.eval()
    with torch.no_grad():
        for number, batch in enumerate(loader_of([source], split, sampler, dtype=model.dtype, device=device).batches()):
            if number * 16 >= MOST:
                break
            raw, forces = predict(model, batch, tasks)
            label = tasks.energy(tasks.raw_energy(batch), batch)
            atoms = batch.graph.ptr.diff() if source.task.target == "energy" else 1
            predicted = tasks.energy(tasks.own_energy(raw, batch), batch)
            found.setdefault("target", []).append((label / atoms, predicted / atoms))
            if forces is not None:
                mine = tasks.forces(tasks.own_forces(forces, batch), batch)
                found.setdefault("forces", []).append((batch.forces.flatten(), mine.flatten()))
    pairs = {
        name: [torch.cat(side).cpu().numpy() for side in zip(*parts, strict=True)] for name, parts in found.items()
    }
    return {name: (label, mine) for name, (label, mine) in pairs.items()}


def _picture(log: Sequence[dict[str, Any]], pairs: dict[str, tuple[Any, Any]], source: TaskData) -> str:
    """Return a PNG of the learning curve and the parity plots, in base64."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, 1 + len(pairs), figsize=(4.5 * (1 + len(pairs)), 4), layout="constrained")
    curves = axes[0]
    validations = [line for line in log if line["event"] == "validation"]
    for kind in validations[0][source.name]:
        curves.plot([v["step"] for v in validations], [v[source.name][kind] for v in validations], ".-", label=kind)
    curves.set(title="validation", xlabel="step", ylabel="mean absolute error", yscale="log")
    curves.legend()
    per_atom = " per atom" if source.task.target == "energy" else ""
    titles = {"target": f"{source.task.target}{per_atom}, {source.task.unit}", "forces": "forces, eV/A"}
    for ax, (name, (label, predicted)) in zip(axes[1:], pairs.items(), strict=True):
        ax.plot(label, predicted, ".", markersize=3, alpha=0.5)
        ax.axline([np.nanmean(label)] * 2, slope=1, color="black", linewidth=0.8)
        ax.set(title=titles[name], xlabel="label", ylabel="prediction")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()
