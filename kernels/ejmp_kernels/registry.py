"""Register the ops of both backends with torch: shapes for tracing, derivatives, floating-point operations.

The compiled ops are `torch.ops.ejmp`, those of Triton `torch.ops.ejmp_triton`; their names and arguments are the same.
An op `name` has a gradient op `name_backward(grad, *inputs)`, which is registered like any other and differentiable
itself, so that losses on gradient forces (second derivatives) are right. The gradient of a bilinear op's gradient op is
made of both. A nonlinear op has a third one, `name_double(*along, grad, *inputs)`: the gradient of the gradient op,
which ends the chain: differentiating a third time raises an error.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake
from torch.utils.flop_counter import register_flop_formula

from ejmp_kernels import availability, unfused

Shape = Callable[..., Tensor]
Backend = Literal["native", "triton"]
LOW = (torch.float16, torch.bfloat16)
"""The types of 16 bits."""
NAMESPACES: dict[Backend, str] = {"native": "ejmp", "triton": "ejmp_triton"}
"""Where the ops of each backend are, below torch.ops."""


class _NotLoaded:
    """The ops of a backend that is not loaded: asking for one raises the reason."""

    def __init__(self, backend: Backend) -> None:
        self._backend: Backend = backend

    def __getattr__(self, name: str) -> Any:
        reason = why_unavailable(self._backend)
        raise RuntimeError(f"{self._backend} ops: {reason or 'call ejmp_kernels.registry.load_backend first'}")


_ops: dict[Backend, Any] = {backend: _NotLoaded(backend) for backend in NAMESPACES}
_registrations: list[Callable[[str], None]] = []


def why_unavailable(backend: Backend, device: str | None = None) -> str | None:
    """Return why a backend's ops cannot run, anywhere or on a type of device, or None if they can."""
    if backend == "native":
        return availability.why_unavailable(device or "cpu")
    return availability.why_triton_unavailable(device)


def load_backend(backend: Backend) -> None:
    """Load a backend's ops and register their derivatives with torch; a second call changes nothing.

    Raises:
        RuntimeError: if the ops cannot run here, with the reason.
    """
    if not isinstance(_ops[backend], _NotLoaded):
        return
    reason = why_unavailable(backend)
    if reason is not None:
        raise RuntimeError(f"{backend} ops: {reason}")
    if backend == "native":
        unfused.register()
    else:
        importlib.import_module("ejmp_kernels.triton_kernels")
    for register in _registrations:
        register(NAMESPACES[backend])
    _ops[backend] = getattr(torch.ops, NAMESPACES[backend])


def ops_of(backend: Backend) -> Any:
    """Return the namespace of a backend's ops, in which each op of a backend that is not loaded is a RuntimeError."""
    return _ops[backend]


def is_recorded(*tensors: Tensor | None) -> bool:
    """Return whether derivatives will be asked for of what is computed of some tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def when_loaded(register: Callable[[str], None]) -> Callable[[str], None]:
    """Call a function with the namespace of each backend: now if the backend is loaded, or else when it will be."""
    _registrations.append(register)
    for backend, namespace in NAMESPACES.items():
        if not isinstance(_ops[backend], _NotLoaded):
            register(namespace)
    return register


def check_storage(op: str, name: str, x: Tensor) -> None:
    """Raise ValueError if a tensor on the CPU does not lie in its storage, which may have been resized to nothing."""
    if x.device.type != "cpu" or not x.numel():
        return
    if x.is_contiguous():  # the usual case, quickly
        span = x.numel()
    else:
        span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    if (x.storage_offset() + span) * x.itemsize > x.untyped_storage().nbytes():
        raise ValueError(f"{op}: {name} must lie in its storage of {x.untyped_storage().nbytes()} bytes")


def register_shape(name: str, fake: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
    """Register what an op returns for tensors without numbers, which have to be on one device as any others.

    Args:
        name: name of the op, with its namespace.
        fake: maps the op's arguments to an uninitialised result.
    """
    names = [argument.name for argument in _op(name).default._schema.arguments]  # noqa: SLF001 - the only way to ask

    def checked(*arguments: Any) -> Any:
        tensors = [(n, x) for n, x in zip(names, arguments, strict=True) if isinstance(x, Tensor)]
        first, like = tensors[0]
        for other, x in tensors:
            if x.device != like.device:
                raise ValueError(f"{name}: {other} must be on {like.device} as {first}, got {x.device}")
        return fake(*arguments)

    register_fake(name)(checked)


def zeros_for(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients, with zeros shaped like the input in place of each None."""
    return [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs, strict=True)]


def _op(name: str) -> Any:
    namespace, op_name = name.split("::")
    return getattr(getattr(torch.ops, namespace), op_name)


def like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return uninitialised contiguous tensors with the shapes and types of the given ones."""
    return tuple(x.new_empty(x.shape) for x in tensors)


def register_bilinear(name: str, fake: Shape, flops: Callable[..., int] | None = None) -> None:
    """Register an op that is linear in each of its first two arguments, and its gradient op.

    The gradient's gradient is made of both ops, so that they can be differentiated as often as one likes.

    Args:
        name: name of the op, with its namespace.
        fake: maps the op's arguments, of which all but the first two are index tensors, to an uninitialised result.
        flops: maps the shapes of the op's arguments, and of its result as `out_shape`, to floating-point operations;
            None to count none.
    """
    op, backward_op = _op(name), _op(f"{name}_backward")

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple:
        _x, _y, *ids = ctx.saved_tensors
        return (*backward_op(grad, *ctx.saved_tensors), *[None] * len(ids))

    def double(ctx: Any, u_x: Tensor | None, u_y: Tensor | None) -> tuple:
        grad, x, y, *ids = ctx.saved_tensors
        u_x, u_y = zeros_for((u_x, u_y), (x, y))
        to_grad = op(u_x, y, *ids) + op(x, u_y, *ids)
        return (to_grad, *backward_op(grad, u_x, u_y, *ids), *[None] * len(ids))

    register_shape(name, fake)
    register_shape(f"{name}_backward", lambda _grad, x, y, *_ids: like(x, y))
    register_autograd(name, backward, setup_context=setup)
    register_autograd(f"{name}_backward", double, setup_context=setup)
    if flops is not None:
        register_flop_formula([op])(flops)
        register_flop_formula([backward_op])(lambda _grad, *shapes, out_shape=None: 2 * flops(*shapes))


def register_nonlinear(name: str, num_inputs: int, fake: Shape, flops: Callable[..., tuple[int, int]]) -> None:
    """Register an op whose first `num_inputs` arguments are tensors with gradients, and its two gradient ops.

    Args:
        name: name of the op, with its namespace.
        num_inputs: number of arguments that have gradients; the rest are index tensors and options.
        fake: maps the op's arguments to an uninitialised result.
        flops: maps the op's arguments to the floating-point operations of its sums over neighbours, and of the
            contraction after them.
    """
    n = num_inputs
    op, backward_op, double_op = (_op(name + suffix) for suffix in ("", "_backward", "_double"))

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

    register_shape(name, fake)
    register_shape(f"{name}_backward", lambda _grad, *inputs: like(*inputs[:n]))
    register_shape(f"{name}_double", lambda *inputs: like(*inputs[n : 2 * n + 1]))
    register_autograd(name, backward, setup_context=setup)
    register_autograd(f"{name}_backward", double, setup_context=setup)
    refuse_third_derivative(f"{name}_double")

    def count(op: Any, skip: int, sums: int, contractions: int) -> None:
        def formula(*args: Any, out_val: Any = None) -> int:
            of_sums, of_contraction = flops(*args[skip:])
            return sums * of_sums + contractions * of_contraction

        register_flop_formula([op], get_raw=True)(formula)

    # A gradient makes the sums again and two of their kind; a product of dual numbers is up to three.
    count(op, 0, 1, 1)
    count(backward_op, 1, 3, 2)
    count(double_op, n + 1, 11, 5)


def refuse_third_derivative(name: str) -> None:
    """Make differentiating an op, which is the gradient of a gradient op, a NotImplementedError."""

    def backward(*_: Any) -> tuple:
        raise NotImplementedError("ejmp's compiled ops have first and second derivatives only; use backend='reference'")

    register_autograd(name, backward, setup_context=lambda ctx, inputs, output: None)


def wide(x: Tensor, rows: int) -> Tensor:
    """Return an uninitialised [rows, columns of x] in the type of sums: float64 for float64, or else float32."""
    return x.new_empty(rows, x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def by_atom(ptr: Tensor, num_edges: int) -> Tensor:
    """Return the target of each edge, [E], from CSR pointers [N + 1]."""
    atoms = torch.arange(len(ptr) - 1, device=ptr.device)
    return torch.repeat_interleave(atoms, ptr.diff(), output_size=num_edges)


if availability.why_unavailable() is None:
    load_backend("native")
