"""How long calls take: one after the other, or by turns so that all see the same minutes of the machine."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds a call takes, with the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def repeated_seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Return the seconds of each of several calls, after one that is not counted.

    On CUDA they are measured by events on a queue that stays full, so that they leave out what a launch or a wait costs
    on the host.
    """
    call()
    if device.type != "cuda":
        return [time_call(call, device) for _ in range(repeats)]
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize(device)
    return [1e-3 * before.elapsed_time(after) for before, after in itertools.pairwise(events)]


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How often calls are timed by turns: until `seconds` have passed, within the limits."""

    least: int = 3
    """Smallest number of rounds."""
    most: int = 50
    """Largest number of rounds, unless `least` is larger."""
    seconds: float = 0.0
    """Time after which no round begins once there are `least`, in s; 0 makes exactly `least` rounds."""
    warm_ups: int = 1
    """Number of rounds that are run before and not timed."""


def by_turns(
    calls: Mapping[Name, Callable[[], Any]],
    device: torch.device,
    rounds: Rounds,
    *,
    after_round: Callable[[int, float], Any] = lambda _number, _seconds: None,
    flush: bool = False,
) -> dict[Name, list[float]]:
    """Time calls by turns, A B A B, so that the machine's drift touches all alike.

    Args:
        calls: what to time, by name.
        device: where the calls work; on CUDA times are between events on its queue.
        rounds: how often.
        after_round: called after each round with the number of rounds and the seconds so far.
        flush: on CUDA, empty the L2 cache before each call.

    Returns:
        The seconds of each call, one per round.
    """
    for _ in range(rounds.warm_ups):
        for call in calls.values():
            call()
    clear: Callable[[], Any] = lambda: None  # noqa: E731
    if flush and device.type == "cuda":  # writing this much takes longer than launching what comes after it
        clear = torch.empty(1 << 29, dtype=torch.int8, device=device).zero_
    synchronize(device)
    found: dict[Name, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for number in itertools.count(1):
        for name, call in calls.items():
            clear()
            found[name].append(_event_seconds(call) if device.type == "cuda" else time_call(call, device))
        passed = time.perf_counter() - start
        after_round(number, passed)
        passed = time.perf_counter() - start
        if number >= rounds.least and (number >= rounds.most or passed >= rounds.seconds):
            break
    return found


def _event_seconds(call: Callable[[], Any]) -> float:
    """Return the seconds between two events around a call on the current CUDA stream."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    after.synchronize()
    return 1e-3 * before.elapsed_time(after)


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median of the rounds' ratios, which the machine's drift does not touch."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Return median, 95th percentile (nearest rank) and number of samples."""
    ordered = sorted(values)
    rank = math.ceil(0.95 * len(ordered)) - 1
    return {"median": statistics.median(ordered), "p95": ordered[rank], "samples": len(ordered)}
