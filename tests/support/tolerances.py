"""The one table of tolerances: the largest difference allowed, relative to the largest value of the quantity."""

import torch

RELATIVE = {
    # (dtype, derivative order of the model's energy)
    (torch.float64, 0): 1e-9,
    (torch.float64, 1): 1e-9,
    (torch.float64, "parameter gradient"): 1e-6,
    (torch.float32, 0): 1e-4,
    (torch.float32, 1): 1e-4,
}


def relative_error(value, expected):
    """Largest difference over the largest expected magnitude."""
    value = torch.as_tensor(value, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert value.shape == expected.shape, f"{tuple(value.shape)} is not {tuple(expected.shape)}"
    scale = expected.abs().max().item()
    return (value - expected).abs().max().item() / (scale or 1.0)


def assert_close(value, expected, dtype=torch.float64, order=0):
    error = relative_error(value, expected)
    assert error <= RELATIVE[dtype, order], f"relative error {error:.2e}, allowed {RELATIVE[dtype, order]:.0e}"
