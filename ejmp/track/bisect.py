"""Which commit made a benchmark slower: comparisons with the good commit, at half of what is left each time."""

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

from ejmp.track.compare import CompareRequest, checkout, compare
from ejmp.track.side import Report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to."""

    good: str
    """Last commit that is known not to be slower."""
    bad: str
    """First commit that is known to be slower."""
    between: tuple[str, ...]
    """Commits in between that could not be decided, from old to new; without any, `bad` is the culprit."""
    ratio: float
    """Time of a call at `bad` over that at the good end."""


def commits_between(repository: Path, good: str, bad: str) -> list[str]:
    """Return the commits after `good` up to `bad`, from old to new, along the first parents.

    Raises:
        ValueError: if there are none, or one of them is no commit.
    """
    words = ["git", "-C", str(repository), "rev-list", "--first-parent", "--reverse", f"{good}..{bad}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise ValueError(f"{good}..{bad}: expected two commits of {repository}: {done.stderr.strip()}")
    found = done.stdout.split()
    if not found:
        raise ValueError(f"{good}..{bad}: expected commits in between, got none")
    return found


def bisect(name: str, request: CompareRequest, report: Report = lambda _line: None) -> Found:
    """Search for the first commit at which a benchmark is slower.

    Args:
        name: the benchmark, such as "pair/forward".
        request: its base is the good commit, its head the bad one; every comparison has its settings.
        report: called with a line about what is happening.

    Raises:
        ValueError: if the benchmark is not slower at the bad commit, or there is no such one.
    """
    commits = commits_between(checkout(), request.base, request.head)
    rows: dict[int, dict[str, Any]] = {}

    def state(index: int) -> str:
        """Return the verdict on a commit, which is compared once."""
        if index not in rows:
            asked = dataclasses.replace(request, head=commits[index], only=(name,))
            result = compare(asked, report)
            found = next((row for row in result["rows"] if row["name"] == name and "ratio" in row), None)
            rows[index] = found or {"verdict": "UNSURE", "ratio": float("nan")}
            report(f"{commits[index][:12]}: {rows[index]['verdict']}, x {rows[index]['ratio']:.3f}")
        return rows[index]["verdict"]

    last = len(commits) - 1
    if state(last) != "SLOW":
        raise ValueError(f"{name}: expected it to be slower at {request.head}, got {state(last)}")
    good, bad = search(len(commits), state)
    return Found(
        good=request.base if good < 0 else commits[good],
        bad=commits[bad],
        between=tuple(commits[good + 1 : bad]),
        ratio=rows[bad]["ratio"],
    )


def search(count: int, state: Any) -> tuple[int, int]:
    """Return the last position that is not SLOW and the first that is, as far as verdicts can tell.

    Args:
        count: number of positions, the last of which is SLOW; -1 stands for the good end.
        state: gives the verdict on a position; what is neither SLOW nor SAME nor FAST is passed over.
    """
    good, bad = -1, count - 1
    while True:
        middle = (good + bad) // 2
        for index in sorted(range(good + 1, bad), key=lambda i: abs(i - middle)):
            verdict = state(index)
            if verdict == "SLOW":
                bad = index
                break
            if verdict in ("SAME", "FAST"):
                good = index
                break
        else:
            return good, bad
