"""How far a long command is: a bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

_SECONDS_BETWEEN_LINES = 10


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield a function that shows progress when it is called with the number done and the number of all.

    It draws a bar with rate and time left on a terminal, and writes lines elsewhere or without rich. Ranks other than 0
    never call it.

    Args:
        title: what is being done.
        unit: what is counted.
    """
    if not sys.stderr.isatty() or find_spec("rich") is None:
        yield _lines(title, unit)
        return
    from rich import progress as rich  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415

    columns = [
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn(unit),
    ]
    rate = rich.TextColumn("{task.fields[rate]}")
    with rich.Progress(*columns, rate, rich.TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        task, start = bars.add_task(title, total=None, rate="", visible=False), time.monotonic()

        def show(done: int, total: int | None) -> None:
            rate = f"{done / max(time.monotonic() - start, 1e-9):.3g}/s"
            bars.update(task, completed=done, total=total, rate=rate, visible=True)

        yield show


def _lines(title: str, unit: str) -> Callable[[int, int | None], None]:
    start = last = time.monotonic()

    def show(done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _SECONDS_BETWEEN_LINES and done != total:
            return
        last, rate = now, done / max(now - start, 1e-9)
        left = "" if total is None or not rate else f", {(total - done) / rate:.0f} s left"
        sys.stderr.write(f"{title}: {done} of {total or '?'} {unit}, {rate:.3g}/s{left}\n")

    return show
