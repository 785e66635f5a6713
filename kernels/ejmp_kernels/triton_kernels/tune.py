"""Measure launch settings on the GPU at hand: python -m ejmp_kernels.triton_kernels.tune --output configs.json.

For each kernel a few settings are timed in turn, those whose results differ or that do not fit are left out, and the
fastest is kept if it beats the committed one by 3%. The products have a list of candidates, one of which is the
vendor's product and a pass after it; other kernels try half and double of each of their settings.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ejmp_kernels import availability, registry
from ejmp_kernels.triton_kernels import launch
from ejmp_kernels.triton_kernels.tune_calls import DRY, Sizes, calls_by_kernel

Settings = dict[str, Any]
COMMITTED = Path(__file__).with_name("configs.json")
WORTH_CHANGING = 0.97
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-3, torch.float64: 1e-9}
LIMITS = {"num_warps": (2, 8), "num_stages": (1, 5)}
TILES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "PROGRAMS")
BY_POINTERS = (
    (128, 128, 32, 4, 5, 2), (128, 128, 32, 4, 4, 2), (128, 128, 64, 8, 4, 1), (128, 256, 32, 8, 4, 1),
    (256, 128, 32, 8, 4, 1), (128, 64, 32, 4, 4, 2), (64, 64, 64, 4, 4, 2),
)  # fmt: skip
BY_DESCRIPTORS = (
    (128, 256, 64, 8, 3, 1), (256, 128, 64, 8, 3, 1), (128, 128, 64, 4, 3, 2), (128, 128, 64, 8, 4, 1),
    (64, 256, 64, 4, 3, 1), (64, 128, 64, 4, 4, 2),
)  # fmt: skip
SPECIALIZED = ((128, 256, 64, 8, 3, 1),)
"""For the kernel whose warps have different tasks; it has sums for one such tile."""


def candidates(kernel: str, settings: Settings) -> Iterator[Settings]:
    """Yield settings to try instead of the committed ones."""
    if kernel == "linear_activate":
        yield {"fused": False}
        for tiles in BY_POINTERS:
            yield {"fused": True, "TMA": False, **dict(zip(TILES, tiles, strict=True))}
        for tiles in BY_DESCRIPTORS if settings["TMA"] else ():
            for flatten in (True, False):
                yield {"fused": True, "TMA": True, "FLATTEN": flatten, **dict(zip(TILES, tiles, strict=True))}
        for tiles in SPECIALIZED if settings["TMA"] else ():
            yield {"fused": True, "TMA": True, "SPECIALIZED": True, **dict(zip(TILES, tiles, strict=True))}
        return
    for name, value in settings.items():
        if type(value) is not int:
            continue
        least, most = LIMITS.get(name, (16 if name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") else 1, 4096))
        for other in (value // 2, value * 2):
            if least <= other <= most:
                yield {name: other}


def seconds(call: Callable[[], Any], *, dry: bool) -> float:
    """Return the median time of a call, with a cold L2 cache."""
    if not dry:
        return triton.testing.do_bench(call, return_mode="median") * 1e-3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def agree(results: Any, expected: Any, dtype: torch.dtype) -> bool:
    """Return whether results are equal but for rounding."""
    pairs = zip(*((x,) if isinstance(x, Tensor) else x for x in (results, expected)), strict=True)
    return all(
        ((a.double() - b.double()).abs().max() <= TOLERANCE[dtype] * b.double().abs().max()).item()
        for a, b in pairs
        if b.numel()
    )


def tune(
    kernel: str, calls: list[Callable], x: Tensor, *, dry: bool, until: float = math.inf
) -> tuple[Settings, float]:
    """Find the settings of a kernel that are best for some calls.

    Args:
        kernel: name of the kernel in configs.json.
        calls: calls of ops that launch the kernel.
        x: a tensor of the type and device of the ops' features.
        dry: whether to try only two candidates, once each.
        until: time by `time.perf_counter` after which no more candidate is tried.

    Returns:
        The settings, empty if they are the committed ones, and their time over that of the committed ones.
    """
    committed = launch.config(kernel, x)
    expected = [call() for call in calls]
    best, shortest = {}, 1.0
    reference = [seconds(call, dry=dry) for call in calls]
    sys.stdout.write(f"{kernel} {committed}: {' '.join(f'{1e6 * t:.0f}' for t in reference)} us\n")
    for candidate in list(candidates(kernel, committed))[: 2 if dry else None]:
        if time.perf_counter() > until:
            sys.stdout.write("  there is no time for more\n")
            break
        try:
            with launch.overriding(kernel, candidate):
                if not all(agree(call(), e, x.dtype) for call, e in zip(calls, expected, strict=True)):
                    sys.stdout.write(f"  {candidate}: other results\n")
                    continue
                times = [seconds(call, dry=dry) for call in calls]
        except (triton.runtime.errors.OutOfResources, triton.CompilationError, RuntimeError) as error:
            sys.stdout.write(f"  {candidate}: {type(error).__name__}\n")
            continue
        ratio = math.prod(t / r for t, r in zip(times, reference, strict=True)) ** (1 / len(times))
        sys.stdout.write(f"  {candidate}: {' '.join(f'{1e6 * t:.0f}' for t in times)} us, {ratio:.3f}\n")
        if ratio < min(shortest, WORTH_CHANGING):
            best, shortest = candidate, ratio
    return best, shortest


def write(path: Path, section: str, winners: dict[str, Settings]) -> None:
    """Write the tables, those of the file if there is one or else the committed ones, with the winners in a section."""
    tables = json.loads((path if path.exists() else COMMITTED).read_text())
    for kernel, settings in winners.items():
        tables.setdefault(section, {}).setdefault(kernel, {}).update(settings)
    line = "  {}: {}".format
    sections = (
        f" {json.dumps(name)}: {{\n" + ",\n".join(line(*map(json.dumps, item)) for item in table.items()) + "\n }"
        for name, table in tables.items()
    )
    path.write_text("{\n" + ",\n".join(sections) + "\n}\n")


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Tune all kernels, or those whose names begin as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--types", nargs="+", default=["bfloat16", "float16"], choices=[str(t)[6:] for t in launch.REAL]
    )
    parser.add_argument("--kernels", nargs="+", default=[""], help="beginnings of names in configs.json (default: all)")
    parser.add_argument("--output", type=Path, help="file of tables to write the winners to (default: only print)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, once: whether it works at all")
    options = parser.parse_args(arguments)
    registry.load_backend("triton")
    device = torch.device("cpu" if availability.interpreted() else "cuda")
    sizes = DRY if options.dry else Sizes()
    kernels = [k for k in json.loads(COMMITTED.read_text())["default"] if k.startswith(tuple(options.kernels))]
    for name in options.types:
        x = torch.empty(0, dtype=getattr(torch, name), device=device)
        calls = calls_by_kernel(kernels, sizes, x.dtype, device)
        winners = {kernel: tune(kernel, calls[kernel], x, dry=options.dry)[0] for kernel in kernels}
        if options.output:
            write(options.output, f"{launch.architecture(device)} {name}", winners)


if __name__ == "__main__":
    main()
