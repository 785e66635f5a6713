"""Register the compiled ops with torch: shapes for tracing, derivatives, floating-point operations.

An op `name` has a gradient op `name_backward(grad, *inputs)`, which is registered like any other and differentiable
itself, so that losses on gradient forces (second derivatives) are right. A nonlinear op has a third one,
`name_double(*along, grad, *inputs)`: the gradient of the gradient op, which ends the chain: differentiating a third
time raises an error.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake
from torch.utils.flop_counter import register_flop_formula

from ejmp_kernels import extension, unfused

Shape = Callable[..., Tensor]


def load() -> Any:
    """Load the compiled ops and return their namespace, `torch.ops.ejmp`.

    Raises:
        RuntimeError: if they cannot be had, with the reason.
    """
    reason = extension.unavailable()
    if reason is not None:
        raise RuntimeError(f"native ops: {reason}")
    unfused.register()
    return torch.ops.ejmp


def zeros_for(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients with zeros, shaped like the inputs, in place of those that are missing."""
    return [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs, strict=True)]


def like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return uninitialised contiguous tensors of the same shapes and types."""
    return tuple(x.new_empty(x.shape) for x in tensors)


def register_nonlinear(name: str, num_inputs: int, fake: Shape, flops: Callable[..., tuple[int, int]]) -> None:
    """Register an op whose first `num_inputs` arguments are tensors with gradients, and its two gradient ops.

    Args:
        name: of the op.
        num_inputs: how many arguments have gradients; the rest are index tensors and options.
        fake: maps the op's arguments to an uninitialised result.
        flops: maps the op's arguments to the floating-point operations of its sums over neighbours, and of the
            contraction after them.
    """
    ops, n = load(), num_inputs
    op, backward_op, double_op = (getattr(ops, name + suffix) for suffix in ("", "_backward", "_double"))

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.arguments = [x for x in inputs if not isinstance(x, Tensor)]
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))

    def backward(ctx: Any, grad: Tensor) -> tuple:
        gradients = backward_op(grad, *ctx.saved_tensors, *ctx.arguments)
        return (*gradients, *[None] * (len(ctx.saved_tensors) + len(ctx.arguments) - n))

    def double(ctx: Any, *along: Tensor | None) -> tuple:
        directions = zeros_for(along, ctx.saved_tensors[1 : n + 1])
        gradients = double_op(*directions, *ctx.saved_tensors, *ctx.arguments)
        return (*gradients, *[None] * (len(ctx.saved_tensors) + len(ctx.arguments) - n - 1))

    register_fake(f"ejmp::{name}")(fake)
    register_fake(f"ejmp::{name}_backward")(lambda _grad, *inputs: like(*inputs[:n]))
    register_fake(f"ejmp::{name}_double")(lambda *inputs: like(*inputs[n : 2 * n + 1]))
    register_autograd(f"ejmp::{name}", backward, setup_context=setup)
    register_autograd(f"ejmp::{name}_backward", double, setup_context=setup)
    register_autograd(f"ejmp::{name}_double", third_derivative, setup_context=lambda ctx, inputs, output: None)

    def count(op: Any, skip: int, sums: int, contractions: int) -> None:
        def formula(*args: Any, out_val: Any = None) -> int:
            of_sums, of_contraction = flops(*args[skip:])
            return sums * of_sums + contractions * of_contraction

        register_flop_formula([op], get_raw=True)(formula)

    # A gradient makes the sums again and two of their kind; a product of dual numbers is up to three.
    count(op, 0, 1, 1)
    count(backward_op, 1, 3, 2)
    count(double_op, n + 1, 11, 5)


def third_derivative(*_: Any) -> tuple:
    """Refuse to differentiate a third time.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("ejmp's native ops have first and second derivatives only; use backend='reference'")


def wide(x: Tensor, rows: int) -> Tensor:
    """Return an uninitialised [rows, columns of x] in the type of sums: float64 for float64, or else float32."""
    return x.new_empty(rows, x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def by_atom(ptr: Tensor, num_edges: int) -> Tensor:
    """Return the target of each edge, [E], from CSR pointers [N + 1]."""
    atoms = torch.arange(len(ptr) - 1, device=ptr.device)
    return torch.repeat_interleave(atoms, ptr.diff(), output_size=num_edges)
