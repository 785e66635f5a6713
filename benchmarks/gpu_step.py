"""A step of the GPU campaign: rows that are on disk as soon as they are measured, or say why they could not be."""

import contextlib
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_provenance import describe
from gpu_setting import Setting

from ejmp.track import machine
from ejmp.track.schema import of_measured

FORMAT = 2
"""Version of the layout of a campaign's JSON."""
FILE = "campaign.json"
"""The one file of a campaign, whose "steps" are the results by name: few files come back from some machines."""
LONG = ("log_tail", "text", "parameters")
"""Fields of rows that are not printed."""
UNTIMED = ("build", "test", "sanitize", "tune")
"""Steps whose times are those of tools, and no benchmark's."""
NAMES = ("what", "file", "tool", "op", "order", "kind")
"""Fields of rows that say what was measured; some have a shape besides."""
COUNTS = ("structures", "blocks")
"""Fields of rows that say how much of it."""
WAYS = ("way", "contestant", "backend")
"""Fields of rows that say which code ran."""
MEASURED = {
    "ms": "ms",
    "precision": "precision",
    "error": "error_vs_float64",
    "edges": "edges",
    "blocks": "blocks",
    "parameters": "parameters",
    "peak_mib": "peak_mib",
    "gbytes_per_s": "gbytes_per_s",
    "gemm_share": "share_of_gemm_rate",
    "copy_share": "share_of_copy_rate",
}
"""Fields of rows by what `ejmp.track.schema.of_measured` calls them."""


class Skip(Exception):  # noqa: N818 - not an error
    """Raised where something is not measured, with the reason."""


class Step:
    """The results of one step, written after every row: what was measured survives whatever comes after.

    Args:
        name: name of the step and of its file.
        setting: where the campaign runs.
        **about: values that hold for all rows.
    """

    def __init__(self, name: str, setting: Setting, **about: Any) -> None:
        self.setting = setting
        self.path = setting.out / FILE
        self.others = read_steps(setting.out)
        self.machine = machine.describe(str(setting.device))
        self.start = time.perf_counter()
        self.lost = ""
        made = describe(setting.device)
        self.result: dict[str, Any] = {"step": name, "dry": setting.dry, "provenance": made, **about}
        self.result["rows"] = []
        self.write()

    def left(self) -> float:
        """Return the seconds that are left of the step's budget."""
        return self.setting.seconds - (time.perf_counter() - self.start)

    def require_time(self) -> None:
        """Raise Skip if there is no time for one more row.

        Raises:
            Skip: if the budget is used up, or the GPU is lost.
        """
        if self.lost or self.left() < 0:
            raise Skip(self.lost or f"the step's {self.setting.seconds:.0f} s were used up")

    def write(self) -> None:
        """Write the campaign's file with this step's results in it; a reader never meets half of one."""
        self.result["seconds"] = time.perf_counter() - self.start
        self.path.parent.mkdir(parents=True, exist_ok=True)
        steps = self.others | {self.result["step"]: self.result}
        new = self.path.with_suffix(".part")
        new.write_text(json.dumps({"benchmark": "gpu_campaign", "format": FORMAT, "steps": steps}, indent=1) + "\n")
        new.replace(self.path)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, write the file and print a line about the row."""
        if "ms" in row and "failed" not in row and self.result["step"] not in UNTIMED:
            with contextlib.suppress(ValueError):  # a time of 0, which some clocks give
                row["record"] = self.record(row)
        self.result["rows"].append(row)
        self.write()
        state = row.get("skipped") or row.get("failed")
        named = ", ".join(str(v)[:100] for k, v in row.items() if isinstance(v, str | int) and k not in LONG)
        print(f"  {named}" if state else f"  {named}: {row.get('ms', 0):.4g} ms", flush=True)

    def record(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a measured row as every benchmark writes it, for histories and comparisons."""
        named = [str(row[name]) for name in (*NAMES, "shape") if name in row]
        named += [f"{row[name]}-{name}" for name in COUNTS if name in row]
        info = {"commit": self.result["provenance"]["commit"], "date": self.result["provenance"]["date"]}
        info |= {theirs: row[ours] for ours, theirs in MEASURED.items() if row.get(ours) is not None}
        info["backend"] = next((row[name] for name in WAYS if name in row), "")
        if row.get("tflops"):
            info["gflops"] = 1e3 * row["tflops"]
        if row.get("x of reference"):
            info["reference_ms"] = row["x of reference"] * row["ms"]
        return of_measured(
            suite=f"gpu_{self.result['step']}{'_dry' if self.setting.dry else ''}",
            name="/".join(named) or "all",
            seconds=[1e-3 * row["ms"]],
            info=info,
            machine=self.machine,
        ).to_dict()

    @contextlib.contextmanager
    def row(self, **about: Any) -> Iterator[dict[str, Any]]:
        """Add the row that the body fills, or the reason why it could not."""
        found = dict(about)
        with reasons(found):
            yield found
        if any(word in found.get("failed", "") for word in ("CUDA error", "illegal memory access")):
            self.lost = "an earlier row broke the CUDA context"
        self.add(found)
        gc.collect()
        if self.setting.device.type == "cuda" and not self.lost:
            torch.cuda.empty_cache()


def read_steps(folder: Path) -> dict[str, Any]:
    """Return the results of a campaign's steps by name, none if there is no file of this layout."""
    path = folder / FILE
    found = json.loads(path.read_text()) if path.exists() else {}
    return found["steps"] if found.get("format") == FORMAT else {}


@contextlib.contextmanager
def reasons(row: dict[str, Any]) -> Iterator[None]:
    """Note in a row why it could not be measured: one row must not end the others."""
    try:
        yield
    except Skip as reason:
        row["skipped"] = str(reason)
    except torch.OutOfMemoryError:
        row["skipped"] = "out of memory"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is in the row
        row["failed"] = f"{type(error).__name__}: {str(error).strip()[:300]}"


def require_error(row: dict[str, Any], tolerance: float) -> None:
    """Raise RuntimeError if a row's error is above a tolerance, so that nothing wrong is timed.

    Raises:
        RuntimeError: if the error is larger, or not a number.
    """
    if not row["error"] <= tolerance:
        raise RuntimeError(f"not timed: error {row['error']:.1e}")
