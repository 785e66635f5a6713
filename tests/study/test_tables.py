"""Means, spreads, curves and rows of numbers, against numpy and small logs by hand."""

import numpy as np
import pytest

from ejmp.data.store.durable import write_json
from ejmp.lock import locked
from ejmp.study.numbers import COLUMNS, csv_rows
from ejmp.study.plan import plan
from ejmp.study.record import is_finished, run_folder
from ejmp.study.settings import make_settings
from ejmp.study.shards import duration, progress
from ejmp.study.tables import curve, fig2, fig3, main_error, summary, table1


def asked(**changes):
    return make_settings(
        **{"teacher": None, "data": None, "seeds": 3, "finetune_seeds": 2, "changes": {}, **changes},
    )


def finish(study, spec, values, seconds=1.0):
    """Give a run a result."""
    folder = run_folder(study, spec.name)
    folder.mkdir(parents=True)
    write_json(folder / "result.json", {"name": spec.name, "seconds": seconds, "values": values})


@pytest.mark.parametrize("count", [1, 2, 5])
def test_summary(count):
    values = np.random.default_rng(count).lognormal(3, 2, count).tolist()
    found = summary(values)
    assert found["mean"] == pytest.approx(np.mean(values), rel=1e-14)
    assert found["seeds"] == values
    if count == 1:
        assert found["spread"] is None
    else:
        assert found["spread"] == pytest.approx(np.std(values, ddof=1), rel=1e-13)


def test_main_error():
    assert main_error({"energy_meV": 3.0, "energy_meV_per_atom": 1.0, "forces_meV_per_A": 2.0}) == ("meV/A", 2.0)
    assert main_error({"energy_meV": 3.0, "energy_meV_per_atom": 1.0}) == ("meV", 3.0)
    assert main_error({"gap_eV": 0.5}) == ("eV", 0.5)


def test_table_1(tmp_path):
    """Rows in the plan's order; seeds of one strategy and size are one row."""
    random, errors, settings = np.random.default_rng(0), {}, asked()
    for spec in plan(("table1",), settings):
        errors[spec.name] = {name: {"forces_meV_per_A": random.normal()} for name in settings.mix}
        finish(tmp_path, spec, {"errors": errors[spec.name]})
    part = table1(tmp_path, settings)
    rows = {(row["strategy"], row["blocks"]): row for row in part["rows"]}
    assert len(rows) == len(part["rows"]) == 2 + 4 * 5
    of_three = [errors[f"kd-3-seed{seed}"]["ani1x"]["forces_meV_per_A"] for seed in range(3)]
    found = rows["br_kd", 3]["values"]["ani1x"]
    assert found["seeds"] == of_three
    assert found["spread"] == pytest.approx(np.std(of_three, ddof=1))
    assert rows["br_kd", 3]["published"]["ani1x"] == 97.6
    assert rows["br", 5]["values"]["oc22"]["seeds"] == [errors["br-5"]["oc22"]["forces_meV_per_A"]]
    assert rows["zero", None]["published"] is None
    assert rows["br_random", 2]["published"] is None
    written = list(csv_rows({"table1": part}))
    assert len(written) == 4 * len(rows)
    assert all(len(row) == len(COLUMNS) for row in written)


def test_figure_2(tmp_path):
    """Shares of each dataset's sum, averaged over the datasets: not the shares of a sum over datasets."""
    random = np.random.default_rng(1)
    scores = {name: {k: random.random(7).tolist() for k in ("energy", "forces", "combined")} for name in "ab"}
    scores["b"]["energy"] = (1000 * np.array(scores["b"]["energy"])).tolist()
    finish(tmp_path, plan(("fig2",), asked())[0], {"scores": scores})
    part = fig2(tmp_path, asked())
    for branch in ("energy", "forces"):
        table = np.array([scores[name][branch] for name in "ab"])
        np.testing.assert_allclose(part[branch], (100 * table / table.sum(1, keepdims=True)).mean(0), rtol=1e-12)
    assert part["labels"][0] == "embedding"
    assert len(part["labels"]) == 7


def test_figure_3(tmp_path):
    """A task per dataset, in its own unit; runs that others only need are not rows."""
    settings, errors = asked(), {}
    kinds = {"qm9": "gap_eV", "qmof": "gap_eV"}
    for number, spec in enumerate(plan(("fig3",), settings)):
        name = spec.dataset or "oc20"
        errors[spec.name] = number
        finish(tmp_path, spec, {"errors": {name: {kinds.get(name, "forces_meV_per_A"): float(number)}}})
    tasks = {task["dataset"]: task for task in fig3(tmp_path, settings)["tasks"]}
    assert [tasks[name]["unit"] for name in settings.downstream] == ["meV/A", "eV", "meV/A", "meV/A", "eV"]
    rows = {(row["strategy"], row["blocks"]): row for row in tasks["spice"]["rows"]}
    assert len(rows) == 1 + 1 + 4 * 3
    assert rows["br_kd", 2]["seeds"] == [errors[f"spice-kd-2-seed{seed}"] for seed in range(2)]
    assert rows["br_kd", 2]["mean"] == np.mean(rows["br_kd", 2]["seeds"])
    assert tasks["qm9"]["label"] == "HOMO-LUMO gap (QM9)"


def line(event, step, time, **more):
    return {"event": event, "step": step, "time": time, **more}


def test_curve_counts_neither_validations_nor_interruptions():
    """2 s a step; validations take 50 s; after step 30 the run was away for an hour and went on from step 20."""
    error = {"spice": {"forces_meV_per_A": 9.0}}
    lines = [
        line("validation", 0, 50, **error),
        line("train", 10, 70),
        line("train", 20, 90),
        line("validation", 20, 140, spice={"forces_meV_per_A": 5.0}, score=5.0),
        line("train", 30, 160),
        line("train", 30, 3780),
        line("train", 40, 3800),
        line("validation", 40, 3850, spice={"forces_meV_per_A": 4.0}, score=4.0),
    ]
    assert curve(lines, "spice") == ("meV/A", [0.0, 40.0, 80.0], [9.0, 5.0, 4.0])


def test_progress(tmp_path):
    """Runs left are taken to last as long as finished ones of their kind, and are shared by the shards."""
    runs = plan(("table1",), asked(seeds=1))
    for spec in runs:
        if spec.blocks in (None, 6, 5):
            finish(tmp_path, spec, {}, seconds={"distill": 600.0, "evaluate": 5.0}.get(spec.kind, 60.0))
    last = next(spec for spec in runs if spec.name == "kd-5-seed0")
    left = 3 * (600 + 3 * 5 + 60)
    assert progress(tmp_path, runs, last, 2) == f"[7/22] kd-5-seed0: 10.0 min; about {left / 120:.1f} min left"
    assert [duration(seconds) for seconds in (3, 600, 7200)] == ["3 s", "10.0 min", "2.0 h"]


def test_locks(tmp_path):
    with locked(tmp_path / "new" / "lock", wait=False) as mine:
        assert mine
        with locked(tmp_path / "new" / "lock", wait=False) as twice:
            assert not twice
    with locked(tmp_path / "new" / "lock", wait=True) as mine:
        assert mine
    assert not is_finished(tmp_path, "new")
