"""The list of runs of a study, the settings it follows from, and who takes which."""

import dataclasses
import json
import os

import pytest

from ejmp.catalog import CATALOG
from ejmp.study import budget, published
from ejmp.study.plan import BLOCKS, FEWER, plan, runs_of
from ejmp.study.settings import DOWNSTREAM, MIX, PARTS, check_parts, claim, make_settings
from ejmp.study.spread import stand_alone, which_shard
from ejmp.train import presets


def settings(**changes):
    usual = {"teacher": None, "data": None, "seeds": None, "finetune_seeds": None, "changes": {}}
    return make_settings(**{**usual, **changes})


@pytest.mark.parametrize("parts", [*((part,) for part in PARTS), PARTS, ("fig3", "table1")])
@pytest.mark.parametrize("seeds", [1, 4])
def test_plan_is_complete(parts, seeds):
    """Every name once, every need before the run that has it, and the same list each time."""
    asked = settings(seeds=seeds, finetune_seeds=2)
    runs = plan(parts, asked)
    assert runs == plan(parts, settings(seeds=seeds, finetune_seeds=2))
    names = [spec.name for spec in runs]
    assert len(set(names)) == len(names)
    for i, spec in enumerate(runs):
        assert set(spec.needs) <= set(names[:i]), spec.name
    assert {spec.name for part in parts for spec in runs_of(part, asked)} == set(names)


def test_runs_of_table_1():
    """Counted by hand: 2 without pruning, and for each of 4 sizes BR, random, refitted, scratch and 3 seeds of KD."""
    runs = plan(("table1",), settings())
    assert len(runs) == 2 + 4 * (4 + 3)
    assert sorted(spec.seed for spec in runs if (spec.kind, spec.blocks) == ("distill", 4)) == [0, 1, 2]
    assert {spec.blocks for spec in runs if spec.blocks} == {BLOCKS, *FEWER}
    assert not any(spec.needs for spec in runs)


def test_runs_of_figure_3():
    """For each of 5 datasets a control, the whole model, and 3 strategies at 4 sizes; KD starts from Table 1's runs."""
    runs = {spec.name: spec for spec in plan(("fig3",), settings(finetune_seeds=2))}
    assert len(runs) == 5 * (1 + 2 + 4 * 3 * 2) + 4
    assert runs["qm9-kd-3-seed1"].needs == ("kd-3-seed0",)
    assert runs["qm9-mean"].strategy == "mean"
    assert runs["md22-zero"].strategy == "zero"
    table1 = {spec.name: spec for spec in plan(("table1",), settings())}
    assert runs["kd-3-seed0"] == table1["kd-3-seed0"]


def test_figure_4_trains_nothing_that_figure_3_does_not():
    assert set(plan(("fig4",), settings())) <= set(plan(("fig3",), settings()))
    assert len(plan(("fig4",), settings())) == 5 * 3


def test_speed_is_measured_last():
    runs = plan(PARTS, settings())
    assert runs[-1].name == "inference"
    assert set(runs[-1].needs) == {spec.name for spec in runs[:-1]}
    assert plan(("table2",), settings())[0].needs == ()


def test_datasets_are_those_of_the_catalogue():
    found = settings(teacher="t", data="qmof=a,oc22=b,oc20=c")
    assert (found.mix, found.downstream) == (("oc20", "oc22"), ("qmof",))
    assert (settings().mix, settings().downstream) == (MIX, DOWNSTREAM)


def test_refusals():
    with pytest.raises(ValueError, match=r"--teacher: expected a model that was trained on the data .* got none"):
        settings(data="oc20=a")
    with pytest.raises(ValueError, match=r"--data: expected some of oc20, .* got 'oc21'"):
        settings(teacher="t", data="oc21=a")
    with pytest.raises(ValueError, match="--seeds: expected 1 or more, got 0"):
        settings(seeds=0)
    with pytest.raises(ValueError, match=r"Budget\.distill_steps: expected a positive number, got 0"):
        settings(changes={"distill_steps": 0})
    with pytest.raises(ValueError, match=r"--data: fig4 needs some of rmd17, qm9, spice, md22, qmof, got oc20"):
        check_parts(("fig4",), settings(teacher="t", data="oc20=a"))
    with pytest.raises(ValueError, match=r"--data: fig3 needs some of oc20, .* got qm9"):
        check_parts(("fig3",), settings(teacher="t", data="qm9=a"))


def test_a_folder_holds_one_study(tmp_path):
    asked = settings(seeds=2, changes={"distill_steps": 7, "finetune_steps": None})
    claim(tmp_path, asked)
    before = (tmp_path / "plan.json").read_bytes()
    claim(tmp_path, asked)
    assert json.loads(before)["budget"]["distill_steps"] == 7
    with pytest.raises(ValueError, match="distill_steps is 7 there and 400 here; seeds is 2 there and 5 here"):
        claim(tmp_path, settings(seeds=5))
    assert (tmp_path / "plan.json").read_bytes() == before


def test_shards(monkeypatch):
    assert which_shard("2/5") == (2, 5, 2)
    for text in ("5/5", "-1/3", "1", "a/b", "1/2/3"):
        with pytest.raises(ValueError, match="--shard: expected I/N"):
            which_shard(text)
    with pytest.raises(ValueError, match="SLURM_ARRAY_TASK_ID is not set"):
        which_shard("slurm")
    for name, value in (("ID", 7), ("COUNT", 4), ("MIN", 1), ("STEP", 2)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert which_shard("slurm")[:2] == (3, 4)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "5")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "8")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    assert which_shard("mpi") == (5, 8, 1)


def test_a_rank_stands_alone(monkeypatch):
    """No launcher's variables are left, and of two GPUs each rank sees one."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    stand_alone(3)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK"} & set(os.environ)


def test_settings_of_training():
    lengths = dataclasses.replace(budget.DEMO, distill_steps=150, finetune_steps=60, validations=6)
    distill = budget.distill_config(lengths, demo=True, blocks=4, seed=3)
    assert (distill.steps, distill.seed, distill.validate_every, distill.warmup_steps) == (150, 3, 150, 20)
    assert distill.lr == presets.demo("distill").lr
    finetune = budget.finetune_config(lengths, recipe=None, seed=0)
    assert (finetune.steps, finetune.validate_every, finetune.warmup_steps) == (60, 10, 10)
    for name, seconds, batch in (("qm9", 172_800.0, 48), ("spice", 86_400.0, 2)):
        recipe = CATALOG[name].finetuning[0]
        real = budget.finetune_config(budget.FULL, recipe=recipe, seed=1)
        assert dataclasses.replace(real, max_seconds=7 * 86_400.0, seed=0) == presets.finetune(recipe)
        assert (real.max_seconds, real.batch_size) == (seconds, batch)
    scratch = budget.scratch_config(budget.FULL, demo=False, seed=0)
    assert (scratch.samples, scratch.epochs, scratch.edge_dropout) == (1_800_000, None, 0.1)


def test_published_numbers():
    """Spot checks against the paper's tables, and its differences to the teacher: 58.1 - 22.5 is 35.6, printed 35.7."""
    assert published.TABLE1["br_kd", 4] == {"oc20": 26.7, "oc22": 34.5, "ani1x": 58.1, "transition1x": 24.2}
    assert published.TABLE1["br", 2]["ani1x"] - published.TABLE1["teacher", 6]["ani1x"] == pytest.approx(
        689.3, abs=0.11
    )
    assert published.TABLE2[2] == {"throughput": 38.0, "gflops": 0.59, "parameters": 55.5e6}
    assert 1 - published.TABLE2[4]["parameters"] / published.TABLE2[6]["parameters"] == pytest.approx(0.327, abs=1e-3)
