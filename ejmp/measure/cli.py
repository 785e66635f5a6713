"""The commands `ejmp bench`, `profile`, `doctor`, `relevance`, and `report`, which shows saved results again."""

import argparse
import dataclasses
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ejmp.model.config import Precision

if TYPE_CHECKING:
    from ejmp.measure.workloads import Workload
    from ejmp.model.jmp import JMP


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
    from ejmp.train.sources import mix_of, with_tasks_of  # noqa: PLC0415
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
    scores = survey(
        model,
        with_tasks_of(request.model, mix_of(request.data), model),
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


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ejmp bench` to its parser."""
    parser.set_defaults(run=_bench)
    _add_workload(parser)
    parser.add_argument("--blocks", type=int, nargs="+", help="default: all down to 2")
    parser.add_argument("--precision", nargs="+", choices=get_args(Precision), help="default: all there are")
    parser.add_argument("--device", help="default: cuda if there is one, or else cpu")
    parser.add_argument("--seconds", type=float, default=100.0, help="go on measuring this long (at least two rounds)")
    parser.add_argument("--small", action="store_true", help="JMP-S instead of JMP-L")
    parser.add_argument("--model", type=Path, metavar="PATH", help="or what ejmp.load reads, with its own graphs")
    parser.add_argument("--backend", default="auto", choices=("auto", "reference", "native", "triton"))
    parser.add_argument("--compare", action="store_true", help="also time the reference backend, in the same rounds")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the results, and a picture beside them")


def _add_workload(parser: argparse.ArgumentParser) -> None:
    built_in = ("framework", "molecules", "slab", "rocksalt")
    parser.add_argument("--workload", choices=built_in, help="a built-in workload (default: framework)")
    parser.add_argument("--structures", type=Path, metavar="PATH", help="a file ase.io reads, a zip or a folder")
    parser.add_argument("--select", default="*", metavar="GLOB", help="files of the zip or folder to take")
    parser.add_argument("--batch", type=int, default=1, help="structures of PATH in the batch (default: 1)")
    parser.add_argument("--cutoff", type=float, help="A; default: that of the dataset the structures are like")


def _bench(options: argparse.Namespace) -> int:
    import torch  # noqa: PLC0415

    from ejmp.measure import bench, report  # noqa: PLC0415
    from ejmp.measure.rates import precisions_of  # noqa: PLC0415

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = _model(options)
    most = model.config.blocks if model is not None else 4 if options.small else 6
    request = bench.BenchRequest(
        workload=_workload(options, model),
        blocks=tuple(options.blocks or range(most, min(most, 2) - 1, -1)),
        precisions=tuple(options.precision or precisions_of(device)),
        device=str(device),
        rounds=dataclasses.replace(bench.ROUNDS, seconds=options.seconds),
        small=options.small,
        model=model,
        backend=options.backend,
        compare=options.compare,
    )
    if options.output is not None:
        report.need_matplotlib()
        options.output.parent.mkdir(parents=True, exist_ok=True)
    result = bench.run(request, report=lambda line: print(line, file=sys.stderr, flush=True))
    print(report.summary(result), report.table(result), sep="\n\n")
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        picture = options.output.with_suffix(".png")
        report.picture(result, picture)
        print(f"\n{options.output} {picture}")
    return 0


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ejmp profile` to its parser."""
    parser.set_defaults(run=_profile)
    _add_workload(parser)
    parser.add_argument("--blocks", type=int, default=4, help="default: 4")
    parser.add_argument("--precision", default="fp32", choices=get_args(Precision), help="default: fp32")
    parser.add_argument("--device", help="default: cuda if there is one, or else cpu")
    parser.add_argument("--small", action="store_true", help="JMP-S instead of JMP-L")
    parser.add_argument("--model", type=Path, metavar="PATH", help="or what ejmp.load reads, with its own graphs")
    parser.add_argument("--backend", default="auto", choices=("auto", "reference", "native", "triton"))
    parser.add_argument("--rounds", type=int, default=3, help="passes whose median counts (default: 3)")
    parser.add_argument("--no-fvcore", action="store_true", help="leave fvcore's table out")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the results")
    text = "write a Chrome trace of three passes (for ui.perfetto.dev); .gz at the end compresses it"
    parser.add_argument("--trace", type=Path, metavar="FILE", help=text)


def _profile(options: argparse.Namespace) -> int:
    import torch  # noqa: PLC0415

    from ejmp.measure import profile, profile_report  # noqa: PLC0415

    model = _model(options)
    request = profile.ProfileRequest(
        workload=_workload(options, model),
        blocks=options.blocks,
        precision=options.precision,
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        backend=options.backend,
        small=options.small,
        model=model,
        rounds=options.rounds,
        fvcore=not options.no_fvcore,
        trace=options.trace,
    )
    result = profile.run(request)
    print(profile_report.text(result))
    if request.trace is not None:
        print(f"\n{request.trace}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Make a parser that of `ejmp doctor`, which has no flags."""
    parser.set_defaults(run=_doctor)


def _doctor(_options: argparse.Namespace) -> int:
    from ejmp.measure import doctor  # noqa: PLC0415

    print(doctor.examine())
    return 0


def _model(options: argparse.Namespace) -> "JMP | None":
    """Return the model that is to be measured, or None for one with random weights."""
    if options.model is None:
        return None
    import ejmp  # noqa: PLC0415

    if options.small:
        raise ValueError("--model and --small exclude each other")
    return ejmp.load(options.model)


def _workload(options: argparse.Namespace, model: "JMP | None") -> "Workload":
    """Return the structures to measure on, with the graphs of the model if all its tasks have the same."""
    found = _structures(options)
    graphs = {task.graph for task in model.tasks} if model is not None else set()
    if len(graphs) != 1:
        return found
    (graph,) = graphs
    neighbors = [graph.neighbors_of(len(item.numbers)) for item in found.structures]
    return dataclasses.replace(found, cutoff=graph.cutoff, max_neighbors=neighbors)


def _structures(options: argparse.Namespace) -> "Workload":
    from ejmp.measure import workloads  # noqa: PLC0415

    if options.structures is not None:
        if options.workload is not None:
            raise ValueError("--workload and --structures exclude each other")
        if options.batch < 1:
            raise ValueError(f"--batch: expected 1 or more, got {options.batch}")
        return workloads.from_files(
            options.structures, select=options.select, most=options.batch, cutoff=options.cutoff
        )
    if options.select != "*" or options.batch != 1 or options.cutoff is not None:
        raise ValueError("--select, --batch and --cutoff need --structures")
    return workloads.BUILT_IN[options.workload or "framework"]()
