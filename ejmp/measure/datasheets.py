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
    """One entry of the table."""

    name: str
    pattern: str
    """Regular expression that the whole of torch.cuda.get_device_name must match."""
    tflops: Mapping[str, float]
    """Dense peak by precision, 10^12 floating-point operations per second, two per multiply-add."""
    gbytes_per_s: float
    """Memory bandwidth, 10^9 bytes per second, read and written together."""
    source: str


_V100 = "NVIDIA V100 datasheet (2020-01): single precision, deep learning"
_A100 = "NVIDIA A100 datasheet (2021-06): FP32, TF32, FP16, BF16 without sparsity"
_H100 = "NVIDIA H100 datasheet (2022-2024): FP32; half of the TF32, FP16 and BF16 figures, which are with sparsity"
_H200 = "NVIDIA H200 datasheet (2024): FP32; half of the TF32, FP16 and BF16 figures, which are with sparsity"


def _hopper(fp32: float, tf32: float, half: float) -> dict[str, float]:
    return {"fp32": fp32, "tf32": tf32, "fp16": half, "bf16": half}


_AMPERE = {"fp32": 19.5, "tf32": 156.0, "fp16": 312.0, "bf16": 312.0}
CARDS = (
    Card(
        name="V100 SXM2",
        pattern=r"Tesla V100-SXM[23]-\d+GB",
        tflops={"fp32": 15.7, "fp16": 125.0},
        gbytes_per_s=900.0,
        source=_V100,
    ),
    Card(
        name="V100 PCIe",
        pattern=r"Tesla V100-PCIE-\d+GB",
        tflops={"fp32": 14.0, "fp16": 112.0},
        gbytes_per_s=900.0,
        source=_V100,
    ),
    Card(name="A100 40GB", pattern=r"NVIDIA A100-(SXM4|PCIE)-40GB", tflops=_AMPERE, gbytes_per_s=1555.0, source=_A100),
    Card(name="A100 80GB SXM", pattern=r"NVIDIA A100-SXM4-80GB", tflops=_AMPERE, gbytes_per_s=2039.0, source=_A100),
    Card(name="A100 80GB PCIe", pattern=r"NVIDIA A100 80GB PCIe", tflops=_AMPERE, gbytes_per_s=1935.0, source=_A100),
    Card(
        name="H100 SXM",
        pattern=r"NVIDIA H100 80GB HBM3",
        tflops=_hopper(67.0, 494.5, 989.5),
        gbytes_per_s=3350.0,
        source=_H100,
    ),
    Card(
        name="H100 PCIe",
        pattern=r"NVIDIA H100 PCIe",
        tflops=_hopper(51.0, 378.0, 756.5),
        gbytes_per_s=2000.0,
        source=_H100,
    ),
    Card(
        name="H200 SXM",
        pattern=r"NVIDIA H200",
        tflops=_hopper(67.0, 494.5, 989.5),
        gbytes_per_s=4800.0,
        source=_H200,
    ),
)


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
