"""How far a long command is: a bar on a terminal, drawn by rich, and lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

_SECONDS_BETWEEN_LINES = 10
Draw = Callable[[int, int | None, str], None]
"""Function of the number done, the number of all (None: unknown) and a text behind them."""


@contextmanager
def terminal_bar(title: str = "") -> Iterator[Draw | None]:
    """Yield a function that draws a bar on standard error; None if that is no terminal, or rich is not installed.

    Args:
        title: text before the bar.
    """
    if not sys.stderr.isatty() or find_spec("rich") is None:
        yield None
        return
    from rich import progress as rich  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415

    before = [rich.TextColumn("{task.description}")] if title else []
    behind = [rich.MofNCompleteColumn(), rich.TextColumn("{task.fields[text]}")]
    with rich.Progress(*before, rich.BarColumn(), *behind, console=Console(stderr=True)) as bars:
        task = bars.add_task(title, total=None, text="", visible=False)

        def draw(done: int, total: int | None, text: str) -> None:
            bars.update(task, completed=done, total=total, text=text, visible=True)

        yield draw


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield a function that shows progress, rate and time left when it is called with the numbers done and of all.

    On a terminal that is a bar, elsewhere a line now and then. Ranks other than 0 never call it.

    Args:
        title: what is being done.
        unit: what is counted.
    """
    start = last = time.monotonic()
    with terminal_bar(title) as draw:

        def show(done: int, total: int | None) -> None:
            nonlocal last
            now = time.monotonic()
            rate = done / max(now - start, 1e-9)
            left = "" if total is None or not rate else f", {(total - done) / rate:.0f} s left"
            if draw is not None:
                draw(done, total, f"{unit}, {rate:.3g}/s{left}")
            elif now - last >= _SECONDS_BETWEEN_LINES or done == total:
                last = now
                sys.stderr.write(f"{title}: {done} of {total or '?'} {unit}, {rate:.3g}/s{left}\n")

        yield show
