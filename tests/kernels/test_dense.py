"""A dense layer as one function to autograd: derivatives against plain torch, what is computed, and what is kept."""

import itertools

import pytest
import torch
from support.inputs import require_native
from support.small_cases import derivatives
from support.tolerances import relative_error, tolerance
from torch.utils.flop_counter import FlopCounterMode

from ejmp.measure.memory import StoragePeak
from ejmp.model.initialisation import one_thread
from ejmp_kernels import specification
from ejmp_kernels.activation import activate
from ejmp_kernels.dense import linear_activate, linear_swap_add
from ejmp_kernels.linear import linear

ROWS, IN, OUT = 7, 5, 6


@pytest.fixture(autouse=True)
def _native():
    require_native()


def arrays(dtype=torch.float64, rows=ROWS, size_in=IN, size_out=OUT):
    shapes = (rows, size_in), (size_out, size_in), (rows, size_out), (rows, size_out)
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_parts(function, factor, add):
    """A function of x, weight and those of factor and add that are there."""

    def run(x, weight, *others):
        others = iter(others)
        return function(
            x, weight, next(others) if factor else None, next(others) if add else None, scale=0.7, add_scale=0.3
        )

    return run


def plain(x, weight, factor, add, **scales):
    return specification.activate(torch.nn.functional.linear(x, weight), factor, add, **scales)


def two_steps(x, weight, factor, add, **scales):
    return activate(linear(x, weight), factor, add, **scales)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("factor", "add"), list(itertools.product([True, False], repeat=2)))
def test_equal_to_the_specification(factor, add, dtype):
    given = arrays(dtype)
    given = [*given[:2], *([given[2]] if factor else []), *([given[3]] if add else [])]
    mine = derivatives(with_parts(linear_activate, factor, add), given)
    exact = derivatives(with_parts(plain, factor, add), [x.double() for x in given])
    for order, (values, wanted) in enumerate(zip(mine, exact, strict=True)):
        for value, expected in zip(values, wanted, strict=True):
            assert relative_error(value, expected) <= tolerance("op", dtype, order)


@pytest.mark.parametrize("trained", [(0,), (1,), (0, 1), (0, 2), (1, 2, 3), (0, 1, 2, 3)])
def test_derivatives_by_finite_differences(trained):
    """Of some of the inputs, as when weights are frozen, or positions are."""
    given = [x.requires_grad_(i in trained) for i, x in enumerate(arrays())]
    call = with_parts(linear_activate, True, True)
    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


def test_same_bits_as_product_and_pass():
    given = [x.requires_grad_() for x in arrays(torch.float32)]
    once, twice = (with_parts(function, True, True)(*given) for function in (linear_activate, two_steps))
    assert torch.equal(once, twice)
    with torch.no_grad():
        assert torch.equal(with_parts(linear_activate, True, True)(*given), once)
    with torch.inference_mode():
        assert torch.equal(torch.ops.ejmp.linear_activate(*given, 0.7 / 0.6, 0.3), once)


def test_only_wanted_products_are_computed():
    """Forces want no gradient of weights; a first layer's weights want none of what they multiply."""
    x, weight, *others = arrays()
    product = 2 * ROWS * IN * OUT
    for wanted in ((x,), (weight,), (x, weight)):
        out = linear_activate(*(t.detach().requires_grad_() for t in (x, weight)), *others)
        inputs = [
            out.grad_fn.next_functions[i][0].variable for i, t in enumerate((x, weight)) if any(t is w for w in wanted)
        ]
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(out.sum(), inputs)
        assert counter.get_total_flops() == product * len(wanted)


def test_a_second_derivative_keeps_one_array_less():
    """Of each layer: the gradient of its product, which is made anew."""
    given = [x.requires_grad_() for x in arrays(torch.float32, rows=64, size_in=32, size_out=48)[:2]]
    held = {}
    for function in (linear_activate, two_steps):
        with StoragePeak(given) as memory:
            out = with_parts(function, False, False)(*given)
            (force,) = torch.autograd.grad(out.square().sum(), given[:1], create_graph=True)
            held[function] = memory.held
        del out, force
    assert held[two_steps] - held[linear_activate] == 64 * 48 * 4


def test_registration():
    given = [x.requires_grad_() for x in arrays()]
    torch.library.opcheck(torch.ops.ejmp.linear_activate, (*given, 0.7, 0.3))


def test_third_derivative_is_refused():
    given = [x.requires_grad_() for x in arrays()[:2]]
    first = torch.autograd.grad(linear_activate(*given).square().sum(), given[0], create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), given[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="first and second"):
        torch.autograd.grad(second.sum(), given[0])


def messages(dtype, edges, width=21, size_in=5):
    """Arrays for `linear_swap_add`, with counter-edges far from their edges."""
    generator = torch.Generator().manual_seed(4)
    x, weight, add = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((edges, size_in), (2 * width, size_in), (edges, width))
    )
    order = torch.randperm(edges, generator=generator)
    swap = torch.empty_like(order)
    swap[order] = order.view(-1, 2).flip(1).flatten() if edges else order
    return x, weight, swap, add


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("edges", "has_add"), [(0, True), (2, False), (512, True), (1538, True), (1538, False)])
def test_messages_to_edges_and_counter_edges(edges, has_add, dtype):
    """Of more rows than are made at a time, and of as many."""
    x, weight, swap, add = messages(dtype, edges)
    add = add if has_add else None
    with one_thread():
        value = linear_swap_add(x, weight, swap, add, scale=0.7)
    wide = x.double() @ weight.double().mT
    exact = specification.swap_add(wide, swap, add if add is None else add.double(), scale=0.7)
    assert value.dtype == dtype
    limit = 2e-2 if dtype == torch.bfloat16 else tolerance("op", dtype, 0)
    assert relative_error(value, exact) <= limit if edges else value.shape == (0, 21)


def test_messages_have_derivatives():
    x, weight, swap, add = messages(torch.float64, 6, width=3)
    given = [t.requires_grad_() for t in (x, weight, add)]
    assert torch.autograd.gradgradcheck(lambda x, weight, add: linear_swap_add(x, weight, swap, add), given)


def test_messages_are_counted_and_traced():
    given = messages(torch.float32, 6)
    with FlopCounterMode(display=False) as counter:
        torch.ops.ejmp.linear_swap_add(*given, 0.7)
    assert counter.get_total_flops() == 2 * 6 * 5 * 42
    torch.library.opcheck(
        torch.ops.ejmp.linear_swap_add.default, (*given, 0.7), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (64, 64), (65, 33), (129, 260), (0, 5), (5, 0)])
def test_transposed(shape, dtype):
    x = torch.randn(shape).to(dtype)
    for given in (x, x.mT, torch.randn(shape[0], 2 * shape[1]).to(dtype)[:, ::2]):
        out = torch.ops.ejmp.transposed(given)
        assert out.is_contiguous()
        assert torch.equal(out, given.mT)
