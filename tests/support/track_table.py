"""The table of docs/tracking.md on how often comparisons are right, from JSON files under benchmarks/results."""

import collections

from ejmp.markdown import format_rows, markdown_table
from ejmp.track.compare_report import COLUMNS


def track_table(*results):
    counts = collections.defaultdict(collections.Counter)
    for one in (one for result in results for one in result["comparisons"]):
        noted = {name: row["verdict"] for name, row in one["not_same"].items()}
        for name, share in one["shares"].items():
            counts[f"{100 * share:.0f}% slower"][noted.pop(name, "SAME")] += 1
        beside = "beside these" if one["shares"] else f"{one['benchmarks']} benchmarks"
        same = counts[f"the same code, {beside}"]
        same.update(noted.values())
        same["SAME"] += one["benchmarks"] - len(one["shares"]) - len(noted)
        same["comparisons"] += 1
    rows = []
    for name, found in sorted(counts.items()):
        verdicts = {key: n for key, n in found.items() if key != "comparisons"}
        undecided = sum(verdicts.get(key, 0) for key in ("UNSURE", "UNSTABLE"))
        cells = (verdicts.get("SLOW"), verdicts.get("FAST"), undecided, verdicts.get("SAME"))
        comparisons = found["comparisons"] or sum(verdicts.values())
        rows.append([name, str(comparisons), *(str(n or 0) for n in cells)])
    return markdown_table(["HEAD", "comparisons", "SLOW", "FAST", "undecided", "SAME"], rows, numbers=True)


def faster_table(result):
    """What became faster in a comparison of two commits."""
    shown = [
        column for column in COLUMNS if column[0] in ("benchmark", "HEAD / BASE", "interval", "BASE ms", "HEAD ms")
    ]
    return format_rows(shown, [row for row in result["rows"] if row["verdict"] == "FAST"])
