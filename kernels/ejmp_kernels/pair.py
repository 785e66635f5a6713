"""Sum over the many neighbours of an atom: out[n, r, c] = sum of radial[e, r] h[source[e], c] over edges e into n.

Reads radial once and h from the cache, writes out once: 4 (E R + N C + N R C) bytes in float32; 2 E R C FLOP. The sums
run as small matrix products over pieces of 64 neighbours; the gradient for h walks the edges by source. The 128
Gaussians of a pair are never stored: `radial` projects them on the fly. Specification: `specification.pair_sum`.
Source: GemNet-OC (arXiv 2204.02782), atom to atom.
"""

from typing import Any

import torch
from torch import Tensor

from ejmp_kernels.registry import Backend, ops_of, register_bilinear, when_loaded


def pair(h: Tensor, radial: Tensor, ptr: Tensor, source: Tensor, *, backend: Backend = "native") -> Tensor:
    """Sum neighbours of each atom times their radial basis.

    Args:
        h: [N, C], float32 or float64.
        radial: [E, R].
        ptr: [N + 1] int64, CSR pointers of the edges over targets.
        source: [E] int64.
        backend: whose kernels to use.

    Returns:
        [N, R * C], radial-major.

    Raises:
        ValueError: if shapes, types or devices do not fit together, or an index is out of range.
    """
    return ops_of(backend).pair(h, radial, ptr, source)


def _fake(h: Tensor, radial: Tensor, _ptr: Tensor, _source: Tensor) -> Tensor:
    return h.new_empty(h.shape[0], radial.shape[1] * h.shape[1])


def _flops(h: torch.Size, radial: torch.Size, *_: torch.Size, out_shape: Any = None) -> int:
    return 2 * radial[0] * radial[1] * h[1]


when_loaded(lambda namespace: register_bilinear(f"{namespace}::pair", _fake, _flops))
