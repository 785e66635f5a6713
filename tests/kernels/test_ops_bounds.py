"""Triton's ops touch nothing beside their tensors: each runs with pages around them that end the process."""

import signal
import subprocess
import sys

import pytest
from support.inputs import environment, require_triton
from support.small_cases import CASES

ANGULAR = ("edge_to_edge", "atom_to_edge", "edge_to_atom", "quadruplet")
GROUPS = {
    "triplet": (["edge_to_edge", "edge_to_atom"], {"triplet", "triplet_backward", "triplet_double"}),
    "quadruplet": (["quadruplet"], {"quadruplet", "quadruplet_backward", "quadruplet_double"}),
    "simple": (
        [name for name in CASES if name not in ANGULAR and name != "linear"],
        {
            *("pair", "pair_backward", "radial", "radial_transposed", "atom_sum", "atom_sum_backward", "gather_add"),
            *("edge_sum", "activate", "activate_", "activate_backward", "activate_double"),
            *("swap_add", "swap_add_backward", "swap_add_double"),
        },
    ),
}
"""Names of cases, and of the ops that they must run."""


def run(side, *names):
    command = [sys.executable, "-m", "support.guard_pages", side, *names]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


@pytest.mark.parametrize("side", ["end", "start"])
@pytest.mark.parametrize("group", GROUPS)
def test_within_bounds(group, side):
    require_triton()
    names, ops = GROUPS[group]
    done = run(side, *names)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert ops <= set(done.stdout.split())


@pytest.mark.parametrize("side", ["end", "start"])
@pytest.mark.parametrize("name", ["wrong_load", "wrong_store"])
def test_a_mask_wrong_by_one_is_noticed(name, side):
    require_triton()
    done = run(side, name)
    assert done.stdout == "right\n", done.stderr[-2000:]
    assert done.returncode == -signal.SIGSEGV
