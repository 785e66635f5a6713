"""What a GPU's datasheet promises: dense peak of matrix products by precision, and memory bandwidth.

Datasheets of Ampere and Hopper print tensor-core rates with 2:4 sparsity; half of that is dense. float32 is the rate of
the ordinary units, which is what products without TF32 run on. A card that is not in the table is unknown: no guess.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the datasheet of one card says."""

    name: str
    """Name of the card in results."""
    pattern: str
    """Regular expression that the whole of torch.cuda.get_device_name must match."""
    tflops: Mapping[str, float]
    """Dense peak by precision, 10^12 floating-point operations per second, two per multiply-add."""
    gbytes_per_s: float
    """Memory bandwidth, 10^9 bytes per second, read and written together."""
    source: str
    """Datasheet and its figures that the numbers are from."""


_V100 = "NVIDIA V100 datasheet (2020-01): single precision, deep learning"
_A100 = "NVIDIA A100 datasheet (2021-06): FP32, TF32, FP16, BF16 without sparsity"
_H100 = "NVIDIA H100 datasheet (2022-2024): FP32; half of the TF32, FP16 and BF16 figures, which are with sparsity"
_H200 = "NVIDIA H200 datasheet (2024): FP32; half of the TF32, FP16 and BF16 figures, which are with sparsity"


def _hopper(fp32: float, tf32: float, half: float) -> dict[str, float]:
    return {"fp32": fp32, "tf32": tf32, "fp16": half, "bf16": half}


_AMPERE = {"fp32": 19.5, "tf32": 156.0, "fp16": 312.0, "bf16": 312.0}
_CARDS: tuple[tuple[str, str, Mapping[str, float], float, str], ...] = (
    ("V100 SXM2", r"Tesla V100-SXM[23]-\d+GB", {"fp32": 15.7, "fp16": 125.0}, 900.0, _V100),
    ("V100 PCIe", r"Tesla V100-PCIE-\d+GB", {"fp32": 14.0, "fp16": 112.0}, 900.0, _V100),
    ("A100 40GB", r"NVIDIA A100-(SXM4|PCIE)-40GB", _AMPERE, 1555.0, _A100),
    ("A100 80GB SXM", r"NVIDIA A100-SXM4-80GB", _AMPERE, 2039.0, _A100),
    ("A100 80GB PCIe", r"NVIDIA A100 80GB PCIe", _AMPERE, 1935.0, _A100),
    ("H100 SXM", r"NVIDIA H100 80GB HBM3", _hopper(67.0, 494.5, 989.5), 3350.0, _H100),
    ("H100 PCIe", r"NVIDIA H100 PCIe", _hopper(51.0, 378.0, 756.5), 2000.0, _H100),
    ("H200 SXM", r"NVIDIA H200", _hopper(67.0, 494.5, 989.5), 4800.0, _H200),
)
CARDS = tuple(
    Card(name=name, pattern=pattern, tflops=tflops, gbytes_per_s=rate, source=source)
    for name, pattern, tflops, rate, source in _CARDS
)
"""The cards whose datasheets are known."""


def find(name: str) -> Card | None:
    """Return the card that torch calls by a name, or None if the table does not have it."""
    return next((card for card in CARDS if re.fullmatch(card.pattern, name)), None)


def card_of(device: torch.device) -> Card | None:
    """Return a device's card, or None for a CPU or an unknown card."""
    return find(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """Return the datasheet's dense peak of a device, or None where it is unknown or there is none."""
    card = card_of(device)
    return None if card is None else card.tflops.get(precision)
