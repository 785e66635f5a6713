"""The commands `ejmp bench compare`, `bisect` and `history`."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ejmp.track.compare import CompareRequest
    from ejmp.track.history import Series
    from ejmp.track.schema import Reading

FOLDER = Path("bench-history")
"""Folder of the history, unless another is named."""


def add_verbs(parser: Any) -> None:
    """Add the verbs below `ejmp bench` to its parser, which still runs the block-count benchmark without one."""
    parser.epilog = "without a verb: one forward pass by number of interaction blocks"
    verbs = parser.add_subparsers(dest="bench_command", metavar="{compare,bisect,history}")
    text = "two commits or folders: right results first, exact differences, then times; exit 1 if HEAD is slower"
    _add_compare(verbs.add_parser("compare", help=text, description=_COMPARE))
    _add_bisect(verbs.add_parser("bisect", help="which commit made a benchmark slower", description=_BISECT))
    history = verbs.add_parser("history", help="records of past runs, and trends", description=_HISTORY)
    _add_history(history.add_subparsers(dest="history_command", required=True))


_COMPARE = """Compare the speed of two commits, or of folders with checkouts. Exit status: 0 nothing became slower, 1 a
benchmark is slower and was so again in fresh processes, 2 results are wrong or a side does not run, 3 too noisy to
tell."""
_BISECT = "Find the first commit between GOOD and BAD at which a benchmark is slower, by comparisons with GOOD."
_HISTORY = "Keep what benchmarks write, per machine, and look for changes."


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_compare)
    parser.add_argument("base", metavar="BASE", help="commit, or folder of a checkout")
    parser.add_argument("head", metavar="HEAD", help="commit, or folder of a checkout")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help='benchmarks, such as "pair/*"')
    _add_shared(parser)
    parser.add_argument(
        "--kernels", action="store_true", help="also compile the Triton and CUDA kernels of both (minutes)"
    )
    parser.add_argument("--exact-only", action="store_true", help="time nothing")
    parser.add_argument("--calibrate", type=Path, metavar="JSON", help="note the noise of two equal sides")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write everything that was found")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report")
    text = "let a benchmark of HEAD wait this share of its time after each call, to see that it is found"
    parser.add_argument("--slow-head", nargs="+", default=[], metavar="CASE=SHARE", help=text)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--core", type=int, nargs="+", default=[], help="cores of the workers (default: all)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--backend", default="native", choices=("native", "triton"), help="default: native")
    parser.add_argument("--budget", type=float, default=900.0, metavar="SECONDS", help="no more pairs after it: 900")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of each pair of processes (default: 20)")
    parser.add_argument("--tolerances", type=Path, metavar="JSON", help="what --calibrate wrote")


def _request(options: argparse.Namespace, base: str, head: str, only: list[str], **more: Any) -> "CompareRequest":
    from ejmp.track.compare import CompareRequest  # noqa: PLC0415

    return CompareRequest(
        base=base,
        head=head,
        only=tuple(only),
        cores=tuple(options.core),
        device=options.device,
        backend=options.backend,
        budget_seconds=options.budget,
        rounds=options.rounds,
        tolerances=options.tolerances,
        **more,
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _compare(options: argparse.Namespace) -> int:
    from ejmp.track.compare import compare, read_slow  # noqa: PLC0415
    from ejmp.track.compare_report import markdown  # noqa: PLC0415
    from ejmp.track.tolerances import Tolerances  # noqa: PLC0415

    more = {"kernels": options.kernels, "exact_only": options.exact_only, "slow_head": read_slow(options.slow_head)}
    result = compare(_request(options, options.base, options.head, options.only, **more), report=_say)
    text = markdown(result)
    print(text, end="")
    for path, content in ((options.output, json.dumps(result, indent=1) + "\n"), (options.markdown, text)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    if options.calibrate is not None:
        Tolerances.read(options.calibrate).joined(result).write(options.calibrate)
    return result["status"]


def _add_bisect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_bisect)
    parser.add_argument("op", metavar="OP", help="benchmark, such as pair/forward")
    parser.add_argument("good", metavar="GOOD", help="commit at which it is fast")
    parser.add_argument("bad", metavar="BAD", help="commit at which it is slow")
    _add_shared(parser)


def _bisect(options: argparse.Namespace) -> int:
    from ejmp.track.bisect import bisect  # noqa: PLC0415

    found = bisect(options.op, _request(options, options.good, options.bad, [options.op]), report=_say)
    if found.between:
        print(f"{options.op}: slower (x {found.ratio:.3f}) between {found.good} and {found.bad}; not decided:")
        print("\n".join(found.between))
    else:
        print(f"{options.op}: slower (x {found.ratio:.3f}) since {found.bad}")
    return 0


def _add_history(verbs: Any) -> None:
    text = "files of benchmarks: pytest-benchmark's JSON, a comparison's --output, make gpu's campaign.json, .jsonl"
    add = verbs.add_parser("add", help="append what benchmarks wrote")
    add.add_argument("files", nargs="+", type=Path, metavar="FILE", help=text)
    show = verbs.add_parser("show", help="the newest records, as tables")
    check = verbs.add_parser("check", help="change points of the trends; exit 1 if the newest is slower")
    report = verbs.add_parser("report", help="one HTML page")
    report.add_argument(
        "--output", type=Path, default=Path("history.html"), metavar="HTML", help="default: %(default)s"
    )
    for name, verb in (("add", add), ("show", show), ("check", check), ("report", report)):
        verb.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
        verb.set_defaults(run={"add": _history_add, "show": _show, "check": _check, "report": _report}[name])
    for verb in (show, check, report):
        verb.add_argument("--dirty", action="store_true", help="also records of code that differed from its commit")


def _history_add(options: argparse.Namespace) -> int:
    from ejmp.track import history  # noqa: PLC0415
    from ejmp.track.schema import records_of  # noqa: PLC0415

    for file in options.files:
        reading = records_of(file)
        _warn(reading.problems)
        for path, count in history.add(options.folder, reading.records).items():
            print(f"{path}: {count} records of {file}")
    return 0


def _warn(problems: tuple[str, ...]) -> None:
    for line in problems:
        _say(f"skipped: {line}")


def _read(options: argparse.Namespace) -> "tuple[dict[str, Reading], list[Series]]":
    from ejmp.track import history  # noqa: PLC0415

    found = history.read(options.folder)
    for reading in found.values():
        _warn(reading.problems)
    return found, history.series_of(found, clean=not options.dirty)


def _show(options: argparse.Namespace) -> int:
    from ejmp.markdown import markdown_table  # noqa: PLC0415

    _, series = _read(options)
    for key in dict.fromkeys(one.key for one in series):
        rows = []
        for one in (one for one in series if one.key == key):
            last = one.records[-1]
            speedup = "-" if last.speedup is None else f"{last.speedup:.2f}"
            cells = [one.title, last.commit[:12], last.date, f"{1e3 * last.median:.4g}", speedup, str(len(one.records))]
            rows.append(cells)
        titles = ["benchmark", "commit", "date", "ms", "x of reference", "records"]
        print(f"## {key}\n\n{markdown_table(titles, rows)}\n")
    return 0


def _check(options: argparse.Namespace) -> int:
    from ejmp.track import history  # noqa: PLC0415

    _, series = _read(options)
    found = [change for one in series for change in history.changes(one)]
    short = sum(len(one.records) < history.LEAST_POINTS for one in series)
    print("\n".join(change.line for change in found) or "no trend changes")
    print(
        f"{len(series)} trends, of which {short} have fewer than {history.LEAST_POINTS} records and were not searched"
    )
    last = {id(change.series): change for change in found}
    return int(any(change.ratio > 1 for change in last.values()))


def _report(options: argparse.Namespace) -> int:
    from ejmp.track import history, page  # noqa: PLC0415

    found, series = _read(options)
    try:
        changes = [change for one in series for change in history.changes(one)]
    except ModuleNotFoundError as error:
        _say(f"change points are left out: {error}")
        changes = []
    problems = [line for reading in found.values() for line in reading.problems]
    page.write_page(options.output, series, changes, problems)
    print(options.output)
    return 0
