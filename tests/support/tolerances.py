"""The one table of tolerances: the largest difference allowed, relative to the largest value of the quantity."""

import torch

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
RELATIVE = {
    # what is compared: {type, or precision of a model: by derivative order, the last for all orders from there on}
    "model": {F64: (1e-9,), F32: (1e-4,)},
    "padded model": {F64: (1e-11,), F32: (1e-4,)},
    "model of turned straight molecules": {F64: (1e-5,), F32: (1e-3,)},
    "Triton's model": {"fp32": (1e-5,), "fp16": (2e-2,), "bf16": (1e-1,)},
    "replayed model": {"fp32": (1e-4, 5e-4), "tf32": (1e-2, 5e-2), "fp16": (5e-2, 0.25), "bf16": (5e-2, 0.25)},
    "orthonormal rows": {F64: (1e-13,), F32: (1e-5,)},
    "op": {F64: (1e-11,), F32: (3e-4,), F16: (2e-3,), BF16: (1e-2,)},
    "op rounded once": {F16: (2**-11,), BF16: (2**-8,)},
    "op on another device": {F64: (1e-12,), F32: (1e-5,), BF16: (1e-2,)},
    "op in plain torch": {F64: (1e-13,), F32: (2e-6,), F16: (1e-3,), BF16: (8e-3,)},
    # a GPU's exponential is an approximation
    "op in plain torch on a GPU": {F64: (1e-13,), F32: (1e-5,), F16: (1e-3,), BF16: (8e-3,)},
    "product": {F32: (1e-6,), BF16: (1e-2,)},
    "product with an epilogue": {F64: (1e-13,), F32: (2e-6,), F16: (1e-3,), BF16: (8e-3,)},
}


def tolerance(what, dtype, order=0):
    """Return the relative error allowed in what is compared, by type or precision and order of derivative."""
    by_order = RELATIVE[what][dtype]
    return by_order[min(order, len(by_order) - 1)]


def relative_error(value, expected):
    """Return the largest difference over the largest expected magnitude."""
    value = torch.as_tensor(value, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert value.shape == expected.shape, f"{tuple(value.shape)} is not {tuple(expected.shape)}"
    scale = expected.abs().max().item()
    return (value - expected).abs().max().item() / (scale or 1.0)


def assert_close(value, expected, dtype=torch.float64, order=0, what="model"):
    error, allowed = relative_error(value, expected), tolerance(what, dtype, order)
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.0e}"
