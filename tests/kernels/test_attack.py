"""No op crashes, hangs, or reads what is not there, whatever it is called with; `make attack` tries more of it."""

import pytest
import torch
from support.attack_ops import BAD, NAMESPACES, Ops, attack, table
from support.inputs import require_native, require_triton
from support.op_calls import calls, names_of
from support.op_damage import KINDS

from ejmp_kernels import registry


def require(backend):
    require_native() if backend == "native" else require_triton()


@pytest.mark.parametrize(("backend", "number"), [("native", 10_000), ("triton", 40)])
def test_no_argument_ends_the_process(backend, number):
    require(backend)
    counts, bad = attack(backend, number)
    assert sum(counts.values()) == number
    assert not bad, f"{table(counts)}\n{bad[:5]}"
    assert number < 1000 or {kind for kind, _ in counts} == set(KINDS)
    assert sum(n for (_, outcome), n in counts.items() if outcome == "refused") > number / 4
    assert sum(n for (_, outcome), n in counts.items() if outcome == "ran") > number / 40


@pytest.mark.parametrize(("name", "given"), [("a", (None, torch.ones(2, 2))), ("b", (torch.ones(2, 2), None))])
def test_none_is_no_matrix(name, given):
    """Found by the 26,155th call of `make attack`."""
    require_native()
    with pytest.raises(ValueError, match=f"matmul: {name} must be a tensor, got none"):
        torch.ops.ejmp.matmul(*given, False, False)


def test_none_is_no_tensor_for_triton():
    """Found by the 268th call of `make attack`."""
    require_triton()
    Ops("triton")
    with pytest.raises(ValueError, match="swap_add: swap must be a tensor, got none"):
        torch.ops.ejmp_triton.swap_add(torch.ones(2, 2), None, None, 1.0)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_every_op_is_attacked(backend):
    require(backend)
    namespace = NAMESPACES[backend]
    assert {"triplet_double", "quadruplet_backward", "swap_add", "activate_"} < set(names_of(namespace))
    assert set(Ops(backend).names) == set(names_of(namespace))


def test_a_crash_is_known_by_its_number(monkeypatch):
    require_native()
    monkeypatch.setenv("ATTACK_CRASHES", "1007")
    counts, bad = attack("native", 30, first=1000)
    assert [(number, outcome) for number, _, outcome in bad] == [(1007, "crashed")]
    assert sum(counts.values()) == 30
    assert "| crashed |" in table(counts)
    assert BAD[-2:] == ("crashed", "hung")


@pytest.mark.parametrize("ptr", [[0, 10**12], [0, -1], [0, 2**63 - 1], [1, 6], [6, 0]])
@pytest.mark.parametrize("strided", [False, True])
def test_pointers_beyond_the_edges(ptr, strided):
    """Pointers [0, 10^12] as a strided view once passed the check and ended the process."""
    require_native()
    ptr = torch.tensor(ptr)
    ptr = torch.stack([ptr, ptr], 1)[:, 0] if strided else ptr
    x = torch.ones(6, 5)
    with pytest.raises(ValueError, match="ptr must rise from 0 to 6"):
        torch.ops.ejmp.atom_sum(x, x, ptr)
    with pytest.raises(ValueError, match="ptr must rise from 0 to 6"):
        torch.ops.ejmp.edge_sum(x, None, ptr)


def test_strided_pointers_are_read_as_they_are():
    """What lies between the entries of a strided view must not be taken for pointers."""
    require_native()
    x, ptr = torch.arange(12.0).view(6, 2), torch.tensor([[0, 77], [2, -5], [2, 10**12], [6, 3]])[:, 0]
    expected = torch.stack([x[:2].sum(0), x[2:2].sum(0), x[2:].sum(0)])
    assert torch.equal(torch.ops.ejmp.edge_sum(x, None, ptr), expected)
    assert torch.equal(torch.ops.ejmp.atom_sum(x, torch.ones_like(x), ptr), expected)


def test_a_sum_in_place_does_not_read_what_it_wrote():
    require_native()
    base = torch.randn(9)
    with pytest.raises(ValueError, match="activate_: add must not share a part of the memory of x"):
        torch.ops.ejmp.activate_(base[1:], None, base[:-1], 1.0, 1.0)
    x, other = base[:4].clone(), base.clone()
    expected = torch.nn.functional.silu(x) + x
    assert torch.allclose(torch.ops.ejmp.activate_(x, None, x, 1.0, 1.0), expected)  # itself is no part of it
    torch.ops.ejmp.activate_(other[:4], None, other[4:8], 1.0, 1.0)
    assert torch.allclose(other[:4], torch.nn.functional.silu(base[:4]) + base[4:8])


def test_inference_has_the_same_checks():
    require_native()
    at = {name: x.clone() for name, x in calls()["pair"].items()}
    at["source"][0] = 4
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(ValueError, match=r"pair: source must be in 0\.\.3, got 4"):
            registry.ops_of("native").pair(at["h"], at["radial"], at["ptr"], at["source"])


@pytest.mark.parametrize("size", [(1, 4_000_000), (2, 2_500), (4, 40)])
def test_products_are_checked_whichever_provider_makes_them(size):
    require_native()
    rows, width = size
    a = torch.ones(rows, width)
    for b, message in (
        (torch.ones(width + 1, 2), "a and b must fit together"),
        (torch.ones(width, 2, dtype=torch.float64), "b must be Float on cpu as a, got Double"),
        (torch.ones(width), "b must be a matrix"),
        (torch.ones(width, 2, dtype=torch.int64), "b must be a matrix of floats"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.ejmp.matmul(a, b, False, False)
