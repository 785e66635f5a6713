"""The commands of `ejmp data`: convert, stats, verify, info, fetch. Flags need no torch; the work does."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ejmp.catalog import DOWNLOADS
from ejmp.data.source_flags import SourceRequest, add_allow_close, add_limit, add_source_flags
from ejmp.limits import limiting, parse_limits
from ejmp.progress import progress_bar

if TYPE_CHECKING:
    from ejmp.data.info import LabelRow, Statistics
    from ejmp.data.store.describe import Histogram

_BAR = 40


@dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """What `ejmp data convert` is asked to do; the fields are those of `ejmp.data.convert`."""

    source: Path
    """Dataset in its original form."""
    dest: Path
    """Folder for the splits; its name becomes the dataset's."""
    format: str | None
    """Format of the source, a name of `ejmp.data.read.FORMATS`; None: as its contents say."""
    split: str | None
    """Split that all of the source goes to; None: as the dataset's rule says."""
    licence: str
    """Licence to write into `dataset.json`."""
    shard_size: int
    """Structures per shard."""
    reading: SourceRequest
    """What it is told about the source."""

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> Self:
        """Return the request that the parsed command line states."""
        names = cls.__dataclass_fields__.keys() - {"reading"}
        return cls(reading=SourceRequest.from_flags(flags), **{name: getattr(flags, name) for name in names})


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands to the parser of `ejmp data`."""
    commands = parser.add_subparsers(dest="data_command", required=True)
    text = "Run it again to go on after an interruption, and under mpirun -n N to use N processes."
    parser = commands.add_parser("convert", help="from a dataset's original form to a record store", epilog=text)
    parser.set_defaults(run=lambda flags: _convert(ConvertRequest.from_flags(flags)))
    parser.add_argument("source", type=Path, help="the file or the folder of the dataset in its original form")
    parser.add_argument(
        "dest", type=Path, help="a folder; its name becomes the dataset's, its splits are folders in it"
    )
    parser.add_argument(
        "--format", help="the format of the source: oc20, ani1x, ..., ase (default: as its contents say)"
    )
    add_source_flags(parser, "labels, of the formats ase, rmd17 and md22")
    parser.add_argument("--split", help="the split all of the source goes to (default: as the dataset's rule says)")
    parser.add_argument("--licence", default="not stated", help="to be written into dataset.json")
    parser.add_argument("--shard-size", type=int, default=20_000, help="structures per shard (default: 20000)")
    _add_split_command(commands, "stats", _stats, "linear reference, means, deviations and histograms of one split")
    verify = _add_split_command(commands, "verify", _verify, "check every byte and every structure of one split")
    add_allow_close(verify)
    add_limit(verify)
    verify.set_defaults(run=lambda flags: _verify(flags.path, allow_close=flags.allow_close, limit=flags.limit))
    _add_split_command(commands, "info", _info, "what dataset.json says of one split")
    get = commands.add_parser("fetch", help="download a dataset in its original form")
    get.set_defaults(run=lambda flags: _fetch(flags.name, flags.dest))
    get.add_argument("name", choices=DOWNLOADS, help="what to download")
    get.add_argument("dest", type=Path, help="the folder to put it in")


def _add_split_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, run: Callable[[Path], int], text: str
) -> argparse.ArgumentParser:
    """Add a command whose argument is the folder of a split."""
    command = commands.add_parser(name, help=text)
    command.set_defaults(run=lambda flags: run(flags.path))
    command.add_argument("path", type=Path, help="the folder of a split")
    return command


def _convert(request: ConvertRequest) -> int:
    from ejmp.data.store.conversion import convert  # noqa: PLC0415
    from ejmp.data.store.dataset import open_store  # noqa: PLC0415
    from ejmp.data.store.writers import Writers  # noqa: PLC0415

    with request.reading.checking(), progress_bar("converting", "structures") as progress:
        folders = convert(
            request.source,
            request.dest,
            format=request.format,
            options=request.reading.options,
            split=request.split,
            licence=request.licence,
            shard_size=request.shard_size,
            progress=progress,
        )
    if Writers().rank == 0:
        infos = [open_store(folder).info for folder in folders]
        _print_labels(f"labels of {request.source}", [row for info in infos for row in info.labels])
        for folder, info in zip(folders, infos, strict=True):
            print(f"{folder}: {info.count} structures")
    return 0


def _stats(path: Path) -> int:
    from ejmp.data.store.dataset import open_store  # noqa: PLC0415
    from ejmp.data.store.describe import describe  # noqa: PLC0415

    store = open_store(path)
    with progress_bar("reading", "structures") as progress:
        found = describe(store, progress)
    reference = found.tally.linear_reference()
    print("element     atoms   least squares of this split's energies, eV")
    for z, atoms in found.elements.items():
        print(f"{z:7d} {atoms:9d}   {reference.get(z, float('nan')):.6f}")
    _print_statistics(found.tally.statistics())
    for name, histogram in found.histograms.items():
        _print_histogram(name, histogram)
    return 0


def _verify(path: Path, *, allow_close: bool = False, limit: Sequence[str] = ()) -> int:
    from ejmp.data.readers.validation import checking  # noqa: PLC0415
    from ejmp.data.store.dataset import verify  # noqa: PLC0415

    problems, files = [], 0
    checks = checking(allow_close=allow_close)
    with limiting(**parse_limits(limit)), checks, progress_bar("verifying", "files") as progress:
        total = len(list(path.glob("shard-*.lmdb"))) + 3
        for files, (_, found) in enumerate(verify(path), 1):
            problems += found
            progress(files, max(files, total))
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{path}: {files} files, {len(problems)} problems")
    return 1 if problems else 0


def _info(path: Path) -> int:
    from ejmp.data.store.dataset import open_store  # noqa: PLC0415

    store = open_store(path)
    info = store.info
    print(f"{info.name}, {info.split} split: {info.count} structures, {store.num_atoms.sum(dtype=int)} atoms")
    print(f"source   {info.source} ({info.format})\nlicence  {info.licence}")
    print("units    " + ", ".join(f"{name} {unit}" for name, unit in info.units.items()))
    print("linear reference of the training split, eV by atomic number:")
    print("  " + ", ".join(f"{z}: {energy:.6f}" for z, energy in info.linear_reference.items()))
    _print_statistics(info.statistics)
    _print_labels("labels", info.labels)
    return 0


def _fetch(name: str, dest: Path) -> int:
    from ejmp.fetch import fetch  # noqa: PLC0415

    entry, download = DOWNLOADS[name]
    print(f"{name}: licence {entry.licence}; {entry.page}", flush=True)
    for remote in download.files:
        checked = "checked against " + remote.hash.split(":")[0] if remote.hash else "no published hash to check"
        print(f"{remote.url} ({remote.size}; {checked})", flush=True)
        with progress_bar(remote.name, "bytes") as progress:
            print(fetch(remote, dest, progress))
    print(f"unpack it if it is an archive, then: ejmp data convert SOURCE DEST --format {download.format}")
    return 0


def _print_labels(title: str, rows: Sequence["LabelRow"]) -> None:
    from ejmp.data.readers.options import join_rows, table_lines  # noqa: PLC0415

    if rows:
        print("\n".join([f"{title}:", *(f"  {line}" for line in table_lines(join_rows(rows)))]))


def _print_statistics(statistics: Mapping[str, "Statistics"]) -> None:
    for name, values in statistics.items():
        print(f"{name}: mean {values.mean:.6g}, standard deviation {values.std:.6g} {values.unit}".rstrip())


def _print_histogram(name: str, histogram: "Histogram") -> None:
    print(f"\n{name}{', ' * bool(histogram.unit)}{histogram.unit}")
    most = max(int(histogram.counts.max()), 1)
    for low, high, count in zip(histogram.edges[:-1], histogram.edges[1:], histogram.counts, strict=True):
        print(f"{low:10.4g} to {high:<10.4g} {count:10d} {'#' * round(_BAR * int(count) / most)}".rstrip())
