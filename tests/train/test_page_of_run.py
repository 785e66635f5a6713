"""The page of a training run: its curves are the log's, its errors those of evaluation, and nothing else is needed."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
from support.few import few
from support.pages import Page

import ejmp
from ejmp.train.config import TrainConfig
from ejmp.train.demo import demo_config
from ejmp.train.evaluate import evaluate
from ejmp.train.loop import Run, train
from ejmp.train.objective import Supervised
from ejmp.train.page import compare, report_page, write_page
from ejmp.train.sources import demo_downstream, demo_mix, tasks_of
from ejmp.train.start import for_finetuning, new_model

pytest.importorskip("deepspeed")
pytest.importorskip("matplotlib")
CONFIG = TrainConfig(
    steps=6, batch_size=2, lr=3e-3, warmup_steps=2, validate_every=3, checkpoint_every=6, log_every=1, zero_stage=0
)
KINDS = ("energy_meV", "energy_meV_per_atom", "forces_meV_per_A")


@pytest.fixture(scope="module")
def sources():
    return few(demo_mix()[::2], 6)  # oc20 and ani1x


@pytest.fixture(scope="module")
def model(sources):
    return new_model(dataclasses.replace(demo_config(blocks=1), num_tasks=3), sources, seed=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory, ranks, sources, model):
    """Folder of a run, with its page, its result, and the model as it is after it."""
    folder = tmp_path_factory.mktemp("run")
    trained = ejmp.prune(model, blocks=1)
    objective = Supervised(trained, tasks_of(sources))
    result = train(Run(objective=objective, sources=sources, config=CONFIG, directory=folder, ranks=ranks))
    best = ejmp.load(folder / "final")
    printed = report_page(folder, "Pre-trained", best, sources, {"untrained": result.before, "<b>": result.after})
    assert printed == f"\nits page: {folder / 'page.html'}"
    return folder, result, best


def page_in(folder):
    path = folder / "page.html"
    assert path.stat().st_size < 1e6
    page = Page(path.read_text(encoding="utf-8"))
    page.check()
    return page


def lines(folder, event):
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in found if line["event"] == event]


def curve(folder, name):
    """The points of a curve in the page, in the units of its drawing."""
    text = (folder / "page.html").read_text(encoding="utf-8")
    path = re.search(rf'<g id="{name}">\s*<path d="([^"]+)"', text)[1]
    return np.array([float(word) for word in re.findall(r"-?\d+\.?\d*", path)]).reshape(-1, 2).T


def check_curve(folder, name, steps, values):
    """The drawing is a linear map of the values, or of their logarithms where they span a factor of 8."""
    x, y = curve(folder, name)
    values = np.array(values)
    shown = np.log(values) if values.max() >= 8 * values.min() else values
    for drawn, meant in ((x, np.array(steps, float)), (-y, shown)):  # y points down in SVG
        assert len(drawn) == len(meant)
        slope, start = np.polyfit(meant, drawn, 1)
        assert slope > 0
        assert np.abs(slope * meant + start - drawn).max() < 1e-3 * np.ptp(drawn)


def test_curves_are_those_of_the_log(run):
    folder = run[0]
    page_in(folder)
    trained, validated = lines(folder, "train"), lines(folder, "validation")
    steps = [1, 2, 3, 4, 5, 6]
    check_curve(folder, "loss-curve-0", steps, [line["loss"] for line in trained])
    check_curve(folder, "lr-curve-0", steps, [line["lr"] for line in trained])
    both = {"oc20": 0, "ani1x": 1}
    for i, kind in enumerate(KINDS):
        every = [line[name][kind] for name in both for line in validated]
        assert max(every) < 8 * min(every)  # so that the axis is linear
        for name, j in both.items():
            check_curve(folder, f"validation-{i}-curve-{j}", [0, 3, 6], [line[name][kind] for line in validated])


def test_numbers_of_the_page(run, sources, ranks):
    """Validation errors, the errors of the models by name, and those above the parity plots."""
    folder, result, best = run
    page = page_in(folder)
    numbers = np.array([float(cell) for cell in page.cells if re.fullmatch(r"[\d.]+", cell)])
    errors = evaluate(best, sources, ranks)
    for found in (result.before, result.after, *lines(folder, "validation")):
        for name in ("oc20", "ani1x"):
            for kind in KINDS:
                assert np.isclose(numbers, found[name][kind], rtol=6e-4).any()
    told = re.findall(r"mean absolute error ([\d.]+) (meV(?:/A)?), \d+ values", " ".join(page.texts))
    expected = [
        (errors[name][kind], unit)
        for name in ("oc20", "ani1x")
        for kind, unit in zip(KINDS[1:], ("meV", "meV/A"), strict=True)
    ]
    assert [unit for _, unit in told] == [unit for _, unit in expected]
    assert np.allclose([float(error) for error, _ in told], [error for error, _ in expected], rtol=6e-4)
    assert "<b>" in page.cells  # the name of a model, escaped
    assert len(page.named("image")) == 4  # points are pixels, so that the file stays small


def test_what_is_told(run):
    folder = run[0]
    text = page_in(folder).text
    assert "Pre-trained" in text
    assert f"ejmp.Calculator('{folder / 'final'}', task='oc20')" in text
    assert json.dumps(json.loads((folder / "run.json").read_text()), indent=1) in text
    assert "3.2 A, 8 neighbours" in text
    assert "skipped" not in text


def test_predictions_and_labels(sources, model):
    """Labels less mean, and force components of free atoms, computed from the structures alone."""
    source = sources[0]
    pairs = compare(model, source, "val")
    structures = [source.split("val")[i] for i in range(6)]
    free = [s.forces[~s.fixed] if s.fixed is not None else s.forces for s in structures]
    assert np.allclose(pairs["forces"][0], np.concatenate(free).ravel(), atol=1e-6)
    task = source.task
    reference = [sum((task.linear_reference or {}).get(int(z), 0.0) for z in s.numbers) for s in structures]
    energies = [(s.energy - e - task.mean) / len(s.numbers) for s, e in zip(structures, reference, strict=True)]
    assert np.allclose(pairs["target"][0], energies, atol=1e-6)


def test_gradient_forces(model):
    """They are the model's negative gradient of the energy, in eV/A."""
    (source,) = few([demo_downstream("rmd17")], 2)
    tuned = for_finetuning(model, direct_forces=False, reduction="sum", seed=0)
    tuned.tasks = tasks_of([source])
    graph = ejmp.build_graph([source.split("test")[i] for i in range(2)], settings=source.task.graph)
    expected = ejmp.gradient_forces(tuned, graph, task=0).detach() * source.task.std
    assert np.allclose(compare(tuned, source, "test")["forces"][1], expected.flatten(), rtol=1e-4, atol=1e-6)


def test_scalar_target_and_long_log(tmp_path, model):
    """A long log is thinned to means; of a step that was repeated after a stop, the last line counts."""
    (source,) = few([demo_downstream("qm9")], 6)
    tuned = for_finetuning(model, direct_forces=False, reduction="mean", seed=0)
    tuned.tasks = tasks_of([source])
    key = f"{source.task.target}_{source.task.unit}"
    losses = [None if step == 77 else 3.0 + np.sin(step / 150) for step in range(1, 20_001)]
    log = [{"event": "train", "step": 1, "loss": 1e9, "lr": 1e-3}]
    log += [{"event": "train", "step": i + 1, "loss": loss, "lr": 1e-3} for i, loss in enumerate(losses)]
    log += [{"event": "skipped", "step": step, "loss": None, "lr": 1e-3} for step in (7, 9)]
    log += [{"event": "validation", "step": s, "qm9": {key: 0.5}, "score": 0.5} for s in (0, 20_000)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + "\n")
    (tmp_path / "run.json").write_text(json.dumps({"machine": {"cpu": "<i>EPYC"}}))
    write_page(tmp_path, "Fine-tuned", tuned, [source], {"after": {"qm9": {key: 0.5}}})
    page = page_in(tmp_path)
    x, y = curve(tmp_path, "loss-curve-0")
    assert 100 < len(x) <= 400
    assert (np.diff(x) >= 0).all()
    steps = 20_000 * (x - x[0]) / np.ptp(x)
    assert np.corrcoef(-y, np.sin(steps / 150))[0, 1] > 0.95
    assert "Steps skipped because they were not finite: 2." in page.text
    assert "<i>EPYC" in page.text
    assert f"ejmp.Predictor('{tmp_path / 'final'}')(atoms)" in page.text
    label, _ = compare(tuned, source, "test")["target"]
    assert np.allclose(label, [source.split("test")[i].targets[source.task.target] for i in range(6)])
    assert ", test split" in page.text


def test_without_matplotlib(run, sources, monkeypatch):
    folder, result, best = run
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (folder / "page.html").rename(folder / "kept.html")
    printed = report_page(folder, "Pre-trained", best, sources, {"after": result.after})
    assert re.fullmatch(r"\nno page of it: [^\n]*matplotlib[^\n]*; pip install ejmp\[bench\] brings it", printed)
    assert not (folder / "page.html").exists()
    (folder / "kept.html").rename(folder / "page.html")
