"""`ejmp reproduce` as users start it: to the end, again, killed, told to stop, in two processes, and as a dry run."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
from support.study_cases import LENGTHS, reproduce, start, write_inputs

from ejmp import cli
from ejmp.study.numbers import COLUMNS

pytest.importorskip("deepspeed")
TABLE1_RUNS = 22
"""Two without pruning, and BR, random, scratch and one seed of KD for each of four sizes."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a teacher and nine stores."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def flags(inputs, *names, seeds=1):
    """Return the flags for the teacher, some of the stores and few steps."""
    stores = ",".join(f"{name}={inputs / name}" for name in names)
    return ("--teacher", inputs / "teacher", "--data", stores, *LENGTHS, "--seeds", seeds)


def tables(study):
    """Return what has to be the same whenever a study is done: no times, and nothing of the machine."""
    found = json.loads((study / "study.json").read_text())
    for task in found.get("fig4", {}).get("tasks", ()):
        for curve in task["curves"]:
            del curve["seconds"]
    return {name: found[name] for name in ("seeds", "demo", "table1", "fig2", "fig3", "fig4") if name in found}


def state(study):
    """Return the times at which the files of all runs were last changed, but for their locks."""
    files = (path for path in (study / "runs").rglob("*") if path.is_file() and path.name != "lock")
    return {path.relative_to(study): path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """Table 1 on one store, done without a break."""
    folder = tmp_path_factory.mktemp("studies") / "undisturbed"
    out, _ = reproduce("table1", "--run", folder, *flags(inputs, "ani1x"))
    return folder, out


def test_table_1(inputs, undisturbed):
    """Every run has its line and its folder; the tables are written, and a second call does nothing again."""
    folder, out = undisturbed
    assert re.findall(rf"^\[(\d+)/{TABLE1_RUNS}\]", out, re.MULTILINE) == [str(i) for i in range(1, TABLE1_RUNS + 1)]
    assert "| 4 blocks, br+kd |" in out
    study = json.loads((folder / "study.json").read_text())
    assert set(study) == {"command", "seeds", "commit", "machine", "demo", "table1", "runs"}
    assert (study["demo"], study["table1"]["columns"]) == (False, ["ani1x"])
    assert study["command"].startswith("ejmp reproduce table1 --run ")
    runs = {run["name"]: run for run in study["runs"]}
    assert len(runs) == TABLE1_RUNS
    assert (runs["kd-4-seed0"]["steps"], runs["kd-4-seed0"]["config"]["terms"]["forces"]) == (4, 1.0)
    assert not list((folder / "runs").glob("*/checkpoints"))
    with (folder / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert {row["strategy"] for row in rows} == {"zero", "teacher", "br", "br_random", "br_refit", "br_kd", "scratch"}
    before = state(folder)
    again, _ = reproduce("table1", "--run", folder, *flags(inputs, "ani1x"))
    assert state(folder) == before
    assert not re.search(r"^\[", again, re.MULTILINE)
    assert "| 4 blocks, br+kd |" in again


def test_other_settings_are_refused(inputs, undisturbed):
    folder, _ = undisturbed
    _, errors = reproduce("table1", "--run", folder, *flags(inputs, "ani1x", seeds=2), status=2)
    assert "holds a study with other settings: seeds is 1 there and 2 here" in errors


def test_two_processes_do_the_same(inputs, undisturbed, tmp_path):
    out, _ = reproduce("table1", "--run", tmp_path / "two", "--processes", 2, *flags(inputs, "ani1x"))
    assert sorted(re.findall(rf"^\[\d+/{TABLE1_RUNS}\] ([\w-]+):", out, re.MULTILINE)) == sorted(
        path.name for path in (tmp_path / "two" / "runs").iterdir()
    )
    assert tables(tmp_path / "two") == tables(undisturbed[0])


def killed(arguments, chance, most):
    """Start a study, kill it when it has printed some lines; return whether it was still at work."""
    process = start(*arguments, errors=subprocess.STDOUT)
    wanted = chance.randint(1, most)
    for number, _ in enumerate(process.stdout, 1):  # some training steps, and the end of each run
        if number == wanted:
            break
    time.sleep(chance.uniform(0, 0.5))
    at_work = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return at_work


def survives(inputs, undisturbed, folder, kills):
    """Kill a study at random moments, let it end, and compare its tables with those of the undisturbed one."""
    chance, done = random.Random(kills), 0
    arguments = ("table1", "--run", folder, *flags(inputs, "ani1x"))
    for _ in range(kills):
        done += killed(arguments, chance, 24 // kills + 2)
        if (folder / "study.json").exists():
            shutil.rmtree(folder)
    assert done >= kills / 2
    reproduce(*arguments)
    assert tables(folder) == tables(undisturbed[0])


def test_survives_three_kills(inputs, undisturbed, tmp_path):
    survives(inputs, undisturbed, tmp_path / "killed", 3)


@pytest.mark.slow
def test_survives_twenty_kills(inputs, undisturbed, tmp_path):
    survives(inputs, undisturbed, tmp_path / "killed", 20)


def test_told_to_stop(inputs, undisturbed, tmp_path):
    """SIGTERM in the middle of a training: a checkpoint, exit status 0, and the same tables in the end."""
    folder = tmp_path / "stopped"
    arguments = ("table1", "--run", folder, *flags(inputs, "ani1x"))
    process = start(*arguments)
    for text in process.stderr:
        if text.startswith("step 1 of 4 "):
            process.terminate()
            break
    process.communicate(timeout=120)
    assert process.returncode == 0
    (step,) = [path.name for path in folder.glob("runs/*/checkpoints/*") if not path.name.startswith(".")][-1:]
    assert re.fullmatch(r"step-\d+", step)
    assert not (folder / "study.json").exists()
    (stopped,) = folder.glob("runs/*/log.jsonl")
    reproduce(*arguments)
    noted = [json.loads(line) for line in stopped.read_text().splitlines()]
    steps = [line["step"] for line in noted if line["event"] == "train"]
    assert steps == sorted(set(steps))  # it went on from where it was
    assert tables(folder) == tables(undisturbed[0])


def test_everything(inputs, tmp_path):
    """All parts on one set to pre-train and one to fine-tune on; what is asked for later is added."""
    words = flags(inputs, "ani1x", "qm9")
    reproduce("fig2", "--run", tmp_path / "all", *words)
    assert [name for name in ("table1", "fig2", "fig3") if name in tables(tmp_path / "all")] == ["fig2"]
    out, _ = reproduce("all", "--run", tmp_path / "all", *words)
    study = json.loads((tmp_path / "all" / "study.json").read_text())
    assert {"table1", "table2", "fig2", "fig3", "fig4"} < set(study)
    assert [row["blocks"] for row in study["table2"]["rows"]] == [6, 5, 4, 3, 2]
    assert all(row["gflops"] == 2 * row["gmacs"] > 0 for row in study["table2"]["rows"])
    assert all(sum(study["fig2"][branch]) == pytest.approx(100) for branch in ("energy", "forces"))
    (task,) = study["fig3"]["tasks"]
    assert (task["dataset"], task["unit"], len(task["rows"])) == ("qm9", "meV", 14)
    (curves,) = (task["curves"] for task in study["fig4"]["tasks"])
    assert [curve["blocks"] for curve in curves] == [6, 4, 3]
    assert all(len(c["seconds"]) == len(c["error"]) >= 3 and c["seconds"][0] == 0 for c in curves)
    assert study["runs"][-1]["name"] == "inference"
    assert "Figure 4" in (tmp_path / "all" / "index.html").read_text()
    assert "U0 (QM9)" in out


def test_nothing_is_gathered_too_early(inputs, tmp_path, capsys):
    words = map(str, flags(inputs, "ani1x"))
    assert cli.main(["reproduce", "table1", "--run", str(tmp_path / "new"), *words, "--gather"]) == 2
    assert (
        f"{TABLE1_RUNS} runs are not finished (kd-5-seed0, kd-4-seed0, kd-3-seed0, kd-2-seed0, scratch-5-seed0, ...)"
        in capsys.readouterr().err
    )


def dry(inputs, capsys, folder, *more, status=0):
    """Return what a dry run of everything on nine stores prints."""
    names = ("oc20", "oc22", "ani1x", "transition1x", "rmd17", "qm9", "spice", "md22", "qmof")
    words = [*map(str, flags(inputs, *names)), *map(str, more)]
    assert cli.main(["reproduce", "all", "--run", str(folder), "--dry-run", *words]) == status
    return capsys.readouterr()


def test_dry_run_shows_the_plan(inputs, tmp_path, capsys):
    """It writes nothing, and twice the rate halves the hours."""
    hours = []
    for rate in (1e-6, 2e-6):
        text = dry(inputs, capsys, tmp_path / "none", "--tflops", rate, "--finetune-seconds", 1e12).out
        rows = {row[0]: row for line in text.splitlines() if len(row := line.strip("| ").split(" | ")) == 4}
        assert {"kd-4-seed0", "md22-kd-2-seed0", "inference", "zero"} < set(rows)
        assert rows["rmd17-br-3-seed0"][1:3] == ["finetune", "4"]
        hours.append({name: float(row[3]) for name, row in rows.items() if row[1] == "finetune"})
    assert hours[1] == pytest.approx({name: value / 2 for name, value in hours[0].items()}, rel=0.01)
    assert hours[0]["rmd17-teacher-6-seed0"] > hours[0]["rmd17-br-5-seed0"] > hours[0]["rmd17-br-2-seed0"] > 0
    assert not (tmp_path / "none").exists()
    assert "9 datasets and the teacher are as they should be" in text


def test_dry_run_names_every_bad_input(inputs, tmp_path, capsys):
    """A store without a split, one that is not there, one without forces, a teacher that is none: a message each."""
    broken = tmp_path / "broken"
    shutil.copytree(inputs, broken)
    shutil.rmtree(broken / "spice" / "test")
    shutil.rmtree(broken / "oc22")
    shutil.rmtree(broken / "md22")
    shutil.copytree(inputs / "qm9", broken / "md22")
    (broken / "teacher" / "model.safetensors").write_bytes(b"no tensors")
    lines = dry(broken, capsys, tmp_path / "none", status=2).err.splitlines()
    assert len(lines) == 4
    for line, expected in zip(
        lines,
        (
            f"ejmp reproduce: --teacher {broken}/teacher: ",
            f"ejmp reproduce: --data oc22: data: {broken}/oc22: no split with a dataset.json",
            "ejmp reproduce: --data spice: expected the splits test, train, val, test is missing",
            "ejmp reproduce: --data md22: expected forces, got energy, gap",
        ),
        strict=True,
    ):
        assert line.startswith(expected)
    assert not (tmp_path / "none").exists()
