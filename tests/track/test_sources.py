"""The hash of what makes a benchmark changes with its own files and those all share, and with no other op's."""

import op_cases
import pytest
from support.inputs import ROOT

from ejmp.track import sources
from ejmp.track.side import copy_checkout

MODULES = sources.op_modules(ROOT / "benchmarks")


@pytest.fixture
def copy(tmp_path):
    copy_checkout(ROOT, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_table_is_that_of_the_cases():
    assert MODULES == op_cases.MODULES
    assert set(MODULES) == set(op_cases.CASES)
    for names in MODULES.values():
        assert all((ROOT / "kernels/ejmp_kernels" / f"{name}.py").exists() for name in names)


CASES = [f"{op}/forward" for op in MODULES] + ["model/6-blocks", "graph/build", "machine/product"]
CHANGED = {
    "csrc/cpu/pair.h": {"pair/forward", "pair_from_distances/forward", "model/6-blocks"},
    "csrc/cpu/neighbors.cpp": {"model/6-blocks", "graph/build"},
    "kernels/ejmp_kernels/quadruplet.py": {"quadruplet/forward", "model/6-blocks"},
    "ejmp/graph/build.py": {"model/6-blocks", "graph/build"},
    "ejmp/model/layers.py": {"model/6-blocks"},
    "csrc/cpu/simd.h": set(CASES) - {"machine/product"},
    "setup.py": set(CASES) - {"machine/product"},
    "docs/benchmarks.md": set(),
}


@pytest.mark.parametrize("path", CHANGED)
def test_what_a_change_touches(copy, path):
    before = {case: sources.source_hash(copy, case, MODULES) for case in CASES}
    assert before == {case: sources.source_hash(ROOT, case, MODULES) for case in CASES}
    with (copy / path).open("a") as file:
        file.write("\n")
    after = {case: sources.source_hash(copy, case, MODULES) for case in CASES}
    assert {case for case in CASES if before[case] != after[case]} == CHANGED[path]


def test_unknown_benchmarks_are_refused():
    with pytest.raises(ValueError, match="case: expected model, graph, machine or one of edge_to_edge"):
        sources.files_of(ROOT, "nothing/forward", MODULES)
