"""What a GPU's number needs to be believed: versions, what the backends are, and the state of the card."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from typing import Any

import torch

from ejmp.provenance import provenance
from ejmp_kernels import availability


def describe(device: torch.device) -> dict[str, Any]:
    """Return provenance with what a GPU's number needs besides: driver, limits, clocks, what the backends are."""
    triton = importlib.util.find_spec("triton") is not None
    found = provenance(device) | {
        "triton": (_version("triton") or _version("pytorch-triton")) if triton else None,
        "triton_interpreter": os.environ.get("TRITON_INTERPRET") == "1",
        "native": availability.why_unavailable(device.type) or "there",
        "nvidia_smi": nvidia_smi(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"sm": properties.multi_processor_count, "memory_gib": properties.total_memory / 2**30}
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


FIELDS = (
    "driver_version", "power.limit", "power.draw", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu",
    "ecc.mode.current", "persistence_mode",
)  # fmt: skip


def nvidia_smi(device: torch.device) -> dict[str, str] | str:
    """Return what nvidia-smi says of the card, or why it says nothing; nothing is changed."""
    if device.type != "cuda":
        return "no GPU"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "nvidia-smi is not there"
    command = [tool, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader", f"--id={device.index or 0}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode or len(values) != len(FIELDS):
        return f"nvidia-smi failed: {(done.stderr or done.stdout).strip()[:200]}"
    return dict(zip(FIELDS, values, strict=True))


def folder_name(device: torch.device) -> str:
    """Return the folder of a GPU's results, such as nvidia-h200."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "dry"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
