"""The catalogue: complete, well-formed, with the published numbers, and the names of the package around it."""

import importlib
import pkgutil
import re
import subprocess
import sys
from functools import partial
from types import FunctionType, ModuleType

import pytest

import ejmp
from ejmp import data
from ejmp.catalog import CATALOG, DOWNLOADS, FINETUNING
from ejmp.data import DEMO_DOWNSTREAM, DEMO_MIX, FORMATS

GRAPHS = {
    "oc20": (12.0, 30),
    "oc22": (12.0, 30),
    "ani1x": (8.0, 30),
    "transition1x": (8.0, 30),
    "rmd17": (7.0, 100),
    "qm9": (8.0, 30),
    "spice": (12.0, 30),
    "md22": (12.0, 30),
    "qmof": (19.0, 30),
}
"""Cutoff (A) and neighbours in JMP's published code, in the order of the catalogue."""


def test_every_dataset_has_the_published_graph():
    assert {name: (row.graph.cutoff, row.graph.max_neighbors) for name, row in CATALOG.items()} == GRAPHS


@pytest.mark.parametrize(("num_atoms", "neighbors"), [(1, 30), (200, 30), (201, 10), (300, 10), (301, 5), (10_000, 5)])
def test_large_frameworks_have_fewer_neighbours(num_atoms, neighbors):
    assert CATALOG["qmof"].graph.neighbors_of(num_atoms) == neighbors
    assert CATALOG["rmd17"].graph.neighbors_of(num_atoms) == 100


def test_normalisation_is_that_of_the_specification(shared):
    specification = shared("spec/method.md").read_text()
    tasks = [row.pretraining for row in CATALOG.values() if row.pretraining is not None]
    for name, values in (
        ("energy std", [task.energy_std for task in tasks]),
        ("force std", [task.force_std for task in tasks]),
    ):
        assert f"{name}: {', '.join(map(repr, values))}" in specification
    assert [task.force_weight for task in tasks] == [73, 80, 15, 14]
    for task in FINETUNING.values():
        forces = "" if task.force_std is None else f", force 0, {task.force_std!r}"
        assert f"{task.mean!r}, {task.std!r}{forces}" in specification


def test_the_order_is_that_of_heads_and_of_the_generators_seeds():
    assert list(CATALOG) == list(GRAPHS)
    assert DEMO_MIX == ("oc20", "oc22", "ani1x", "transition1x")
    assert DEMO_DOWNSTREAM == ("rmd17", "qm9", "spice", "md22", "qmof")


def test_names_are_those_of_the_rows_and_of_the_formats():
    for name, row in CATALOG.items():
        assert name == row.name
        assert row.downloads
    assert set(CATALOG) <= set(FORMATS)
    assert {download.format for _, download in DOWNLOADS.values()} == set(FORMATS) - {"oc20", "ase"}
    assert len(DOWNLOADS) == sum(len(row.downloads) for row in CATALOG.values()) == 13
    assert list(FINETUNING) == ["aspirin", "qm9_u0", "solvated_amino_acids", "ac_ala3_nhme", "qmof_gap"]


def test_addresses_and_hashes_are_well_formed():
    for name, (row, download) in DOWNLOADS.items():
        assert name == name.lower() == download.name
        assert row.licence
        assert download.files
        for remote in download.files:
            assert re.fullmatch(r"https?://\S+", remote.url)
            assert remote.hash is None or re.fullmatch(r"md5:[0-9a-f]{32}", remote.hash)
            assert "/" not in remote.name


def test_it_is_plain_data_that_needs_no_package():
    code = "import sys, ejmp.catalog; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_formats_belong_to_read():
    assert data.read.FORMATS is FORMATS
    assert isinstance(data.read, FunctionType)


PACKAGES = ["ejmp", *(found.name for found in pkgutil.walk_packages(ejmp.__path__, "ejmp.") if found.ispkg)]


@pytest.mark.parametrize("name", PACKAGES)
def test_no_function_stands_before_a_module_of_its_name(name):
    package = importlib.import_module(name)
    modules = {found.name for found in pkgutil.iter_modules(package.__path__)} - {"__main__"}
    for module in modules:
        importlib.import_module(f"{name}.{module}")
    # A package that imports a name when it is first used is asked for it: the import above may stand before it.
    find = getattr(package, "__getattr__", partial(getattr, package))
    names = getattr(package, "__all__", ()) if hasattr(package, "__getattr__") else dir(package)
    public = modules & {*names}
    assert not [module for module in public if not isinstance(find(module), ModuleType)]
