"""`ejmp relevance`, and `ejmp report`, which shows saved results again."""

import argparse
import functools
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RelevanceRequest:
    """Score the blocks of a saved model on some datasets.

    Raises:
        ValueError: if structures or batch is not positive.
    """

    model: Path
    """Model to score, as `ejmp.load` reads it."""
    data: str | None
    """Record stores, as "NAME=FOLDER,..."; None: the demo mix."""
    structures: int
    """Largest number of structures to take of each dataset."""
    batch: int
    """Number of structures per batch."""
    labels: bool
    """Whether the loss is that of energies and forces on labels; otherwise it is their magnitudes."""
    output: Path | None
    """File to write: the scores if its name ends in .json, otherwise a picture of them."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, value in (("structures", self.structures), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"--{name}: expected 1 or more, got {value}")


def add_relevance(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ejmp relevance` to its parser."""
    parser.set_defaults(run=_relevance)
    parser.add_argument("model", type=Path, help="what ejmp.load reads")
    parser.add_argument("--data", metavar="NAME=FOLDER,...", help="record stores (default: the embedded demo mix)")
    parser.add_argument("--structures", type=int, default=32, help="at most this many of each dataset (default: 32)")
    parser.add_argument("--batch", type=int, default=4, help="structures per batch (default: 4)")
    parser.add_argument(
        "--labels", action="store_true", help="loss of energies and forces on labels, instead of their magnitudes"
    )
    parser.add_argument("--output", type=Path, metavar="PNG|JSON", help="draw the scores, or write them")


def _relevance(options: argparse.Namespace) -> int:
    import ejmp  # noqa: PLC0415
    from ejmp.measure import report  # noqa: PLC0415
    from ejmp.train.sources import demo_mix, from_stores, with_tasks_of  # noqa: PLC0415
    from ejmp.train.survey import survey  # noqa: PLC0415

    request = RelevanceRequest(
        model=options.model,
        data=options.data,
        structures=options.structures,
        batch=options.batch,
        labels=options.labels,
        output=options.output,
    )
    writes_json = request.output is not None and request.output.suffix == ".json"
    if request.output is not None and not writes_json:
        report.need_matplotlib()
    model = ejmp.load(request.model)
    sources = from_stores(request.data) if request.data else demo_mix()
    scores = survey(
        model,
        with_tasks_of(request.model, sources, model),
        structures=request.structures,
        batch_size=request.batch,
        labels=request.labels,
    )
    print(report.relevance_table(scores))
    if request.output is not None:
        if writes_json:
            request.output.write_text(json.dumps({"relevance": scores}, indent=1) + "\n")
        else:
            report.relevance_picture(scores, request.output)
        print(f"\n{request.output}")
    return 0


@dataclass(frozen=True, kw_only=True)
class ReportRequest:
    """Show a result that `ejmp bench`, `profile` or `relevance` has saved."""

    result: Path
    """JSON file of the result."""
    output: Path | None
    """Picture to draw; None: only the text is printed."""


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ejmp report` to its parser."""
    parser.set_defaults(run=_report)
    parser.add_argument("result", type=Path, metavar="JSON", help="what --output of bench, profile or relevance wrote")
    parser.add_argument("--output", type=Path, metavar="PNG", help="draw the picture of a bench or relevance result")


def _report(options: argparse.Namespace) -> int:
    from ejmp.measure import profile_report, report  # noqa: PLC0415

    request = ReportRequest(result=options.result, output=options.output)
    result = json.loads(request.result.read_text())
    picture = None
    if "relevance" in result:
        scores = result["relevance"]
        text, picture = report.relevance_table(scores), functools.partial(report.relevance_picture, scores)
    elif "rows" in result and "graph_ms" in result:
        text = f"{report.summary(result)}\n\n{report.table(result)}"
        picture = functools.partial(report.picture, result)
    elif "modules" in result:
        text = profile_report.text(result)
    else:
        raise ValueError(f"{request.result}: expected a result of bench, profile or relevance")
    print(text)
    if request.output is not None:
        if picture is None:
            raise ValueError("--output: there is no picture of a profile")
        picture(request.output)
        print(f"\n{request.output}")
    return 0
