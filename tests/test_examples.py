"""The scripts in examples/ run as a user runs them."""

import dataclasses
import subprocess
import sys

import ase.calculators.singlepoint
import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from support.inputs import ROOT, environment

import ejmp
from ejmp.train.demo import demo_config


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A small model with one task."""
    torch.manual_seed(0)
    sizes = {name: 8 for name in vars(demo_config()) if name.startswith("emb_size")}
    config = dataclasses.replace(demo_config(blocks=1), num_tasks=1, num_radial=8, **sizes)
    graph = ejmp.GraphSettings(cutoff=5.0, max_neighbors=12, tags="none")
    folder = tmp_path_factory.mktemp("examples") / "model"
    ejmp.save(ejmp.JMP(config, tasks=[ejmp.Task(name="any", graph=graph)]), folder)
    return folder


def example(name, *arguments):
    command = [sys.executable, ROOT / "examples" / name, *map(str, arguments)]
    variables = environment(DS_ACCELERATOR="cpu")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_relax_many(start, tmp_path):
    pytest.importorskip("torch_sim")
    crystals = [bulk(name, cubic=True) for name in ("Cu", "Al")]
    for crystal in crystals:
        crystal.rattle(0.05, seed=1)
    ase.io.write(tmp_path / "crystals.extxyz", crystals)
    printed = example("relax_many.py", start, tmp_path / "crystals.extxyz", tmp_path / "relaxed.extxyz")
    relaxed = ase.io.read(tmp_path / "relaxed.extxyz", ":")
    assert [atoms.get_chemical_formula() for atoms in relaxed] == ["Cu4", "Al4"]
    energies = [p.energy for p in ejmp.Predictor(start)(relaxed)]
    assert [atoms.info["relaxed_energy"] for atoms in relaxed] == pytest.approx(energies, abs=1e-5)
    assert "0: Cu4" in printed


def test_finetune_your_own(start, tmp_path):
    pytest.importorskip("deepspeed")
    random, frames = np.random.default_rng(0), []
    for _ in range(12):
        atoms = molecule("CH3OH")
        atoms.positions += random.normal(scale=0.05, size=(6, 3))
        labels = {"energy": random.normal() - 2000, "forces": random.normal(size=(6, 3))}
        atoms.calc = ase.calculators.singlepoint.SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    ase.io.write(tmp_path / "frames.extxyz", frames)
    printed = example("finetune_your_own.py", tmp_path / "frames.extxyz", start, tmp_path / "run", 2)
    assert "after 5 steps" in printed
    assert (tmp_path / "run" / "page.html").is_file()
    energies = [float(line.split()[0]) for line in printed.splitlines() if line.endswith(" eV") and line[0] == "-"]
    assert len(energies) == 3
    assert energies == pytest.approx([atoms.get_potential_energy() for atoms in frames[:3]], abs=30)
