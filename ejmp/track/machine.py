"""Which machine a number is from, and in what state it was: numbers of two machines are never compared."""

import contextlib
import hashlib
import importlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

Machine = dict[str, Any]
"""What a machine is: cpu, cores, threads, device, gpu, mig, driver, torch, triton, python."""
IDENTITY = {"cpu": ("cpu", "threads", "torch"), "cuda": ("cpu", "gpu", "mig", "driver", "torch", "triton")}
"""What makes two machines the same, by the type of the device that is measured."""


def describe(device: str = "cpu", *, cores: Sequence[int] = ()) -> Machine:
    """Describe this machine.

    Args:
        device: device that is measured, as torch names it.
        cores: cores that are used; empty: as many threads as torch takes.
    """
    import torch  # noqa: PLC0415

    from ejmp.provenance import cpu_name  # noqa: PLC0415 - it needs torch

    found: Machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": len(cores) or torch.get_num_threads(),
        "device": torch.device(device).type,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
    }
    if found["device"] == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(torch.device(device)), **_nvidia(torch.device(device).index or 0)}
    return found


def machine_key(machine: Mapping[str, Any]) -> str:
    """Return the name under which numbers of a machine are kept: words a person knows, and a hash of its identity."""
    parts = IDENTITY["cuda" if machine.get("device") == "cuda" else "cpu"]
    identity = "\n".join(f"{name}={machine.get(name)}" for name in parts)
    words = [str(machine.get("gpu") or machine.get("cpu") or "unknown")]
    if machine.get("device") != "cuda":
        words.append(f"{machine.get('threads')} threads")
    name = re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
    return f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def state(device: str = "cpu") -> dict[str, float]:
    """Return what may move numbers of one machine: its load, and on a GPU clocks in MHz, W and degrees Celsius."""
    found = {"load": os.getloadavg()[0]}
    if device.startswith("cuda"):
        with contextlib.suppress(Exception):  # without nvidia-ml-py, or a driver that tells nothing
            nvml, card = _card(int(device.partition(":")[2] or 0))
            found |= {
                "sm_mhz": nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM),
                "memory_mhz": nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_MEM),
                "watts": nvml.nvmlDeviceGetPowerUsage(card) / 1000,
                "celsius": nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU),
            }
    return found


def _card(index: int) -> tuple[Any, Any]:
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    return nvml, nvml.nvmlDeviceGetHandleByIndex(index)


def _nvidia(index: int) -> dict[str, Any]:
    """Return driver and MIG mode, as far as nvidia-ml-py is there and the driver tells."""
    found: dict[str, Any] = {"driver": None, "mig": None}
    with contextlib.suppress(Exception):
        nvml, card = _card(index)
        found["driver"] = str(nvml.nvmlSystemGetDriverVersion())
        found["mig"] = bool(nvml.nvmlDeviceGetMigMode(card)[0])
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
