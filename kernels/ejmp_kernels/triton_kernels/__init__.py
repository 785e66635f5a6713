"""The ops in Triton, as torch.ops.ejmp_triton; importing this package needs Triton and defines them.

One file per op: kernels, then the op. Names and arguments are those of torch.ops.ejmp, whose shapes for tracing and
derivatives `ejmp_kernels.registry` registers for both. Accumulation and geometry are in float32 (float64 for float64);
features may be float16 or bfloat16.
"""

from ejmp_kernels.triton_kernels import (
    activation,
    edge_embedding,
    gemm,
    gemm_swap,
    pair,
    quadruplet,
    quadruplet_backward,
    radial,
    sums,
    triplet,
)

__all__ = [
    "activation",
    "edge_embedding",
    "gemm",
    "gemm_swap",
    "pair",
    "quadruplet",
    "quadruplet_backward",
    "radial",
    "sums",
    "triplet",
]
