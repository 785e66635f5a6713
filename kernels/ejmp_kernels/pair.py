"""Sum over the many neighbours of an atom: out[n, r, c] = sum of radial[e, r] h[source[e], c] over edges e into n.

Reads radial once and h from the cache, writes out once: 4 (E R + N C + N R C) bytes in float32; 2 E R C FLOP. The sums
run as small matrix products over pieces of 64 neighbours; the gradient for h walks the edges by source. The 128
Gaussians of a pair are never stored: `radial` projects them on the fly. Specification: `specification.pair`. Source:
GemNet-OC (arXiv 2204.02782), atom to atom.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake
from torch.utils.flop_counter import register_flop_formula

from ejmp_kernels.registry import Backend, for_each_backend, like, ops, zeros_for


def pair(h: Tensor, radial: Tensor, ptr: Tensor, source: Tensor, *, backend: Backend = "native") -> Tensor:
    """Sum neighbours of each atom times their radial basis.

    Args:
        h: [N, C], float32 or float64.
        radial: [E, R].
        ptr: [N + 1] int64, CSR pointers of the edges over targets.
        source: [E] int64.
        backend: whose kernels.

    Returns:
        [N, R * C], radial-major.

    Raises:
        ValueError: if shapes, types or devices do not fit together, or an index is out of range.
    """
    return ops(backend).pair(h, radial, ptr, source)


@for_each_backend
def _register(namespace: str) -> None:
    own = getattr(torch.ops, namespace)

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple:
        return (*own.pair_backward(grad, *ctx.saved_tensors), None, None)

    def double(ctx: Any, u_h: Tensor | None, u_radial: Tensor | None) -> tuple:
        """The op is linear in both inputs, so its gradient's gradient is made of both ops."""
        grad, h, radial, *edges = ctx.saved_tensors
        u_h, u_radial = zeros_for((u_h, u_radial), (h, radial))
        to_grad = own.pair(u_h, radial, *edges) + own.pair(h, u_radial, *edges)
        return (to_grad, *own.pair_backward(grad, u_h, u_radial, *edges), None, None)

    register_fake(f"{namespace}::pair")(
        lambda h, radial, ptr, source: h.new_empty(h.shape[0], radial.shape[1] * h.shape[1])
    )
    register_fake(f"{namespace}::pair_backward")(lambda grad, h, radial, ptr, source: like(h, radial))
    register_autograd(f"{namespace}::pair", backward, setup_context=setup)
    register_autograd(f"{namespace}::pair_backward", double, setup_context=setup)
    register_flop_formula([own.pair])(lambda h, radial, ptr, source, out_shape=None: 2 * radial[0] * radial[1] * h[1])
    register_flop_formula([own.pair_backward])(
        lambda grad, h, radial, ptr, source, out_shape=None: 4 * radial[0] * radial[1] * h[1]
    )
