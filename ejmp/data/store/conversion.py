"""Convert a dataset from its original form to a record store, by any number of processes, and resume after a kill.

The shards are planned from the parts of the source alone, so that the same ones come out of any number of writers. A
shard is written, then its `.npz`: its index and statistics, and the hash by which the next run knows that it is
finished. When every rank is done, rank 0 joins these to the index of the split and writes `dataset.json`; until then
there is no dataset to open.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ejmp.data.info import DatasetInfo, LabelRow
from ejmp.data.readers.by_name import checked, configured, find_format, recognised
from ejmp.data.readers.files import Versions, unchanged, versions
from ejmp.data.readers.format import Format, Part
from ejmp.data.readers.options import ReadOptions, Survey, join_rows, surveying
from ejmp.data.readers.refused import without_refused
from ejmp.data.readers.validation import current_checks
from ejmp.data.store.dataset import INDEX_FILES
from ejmp.data.store.durable import TEMPORARY, hash_file, written
from ejmp.data.store.manifest import FILE_NAME, Manifest, read_manifest, write_manifest
from ejmp.data.store.plan import SplitPlan, plan_splits
from ejmp.data.store.shard import Index, Shard, write_shard
from ejmp.data.store.stats import Tally
from ejmp.data.store.writers import Writers
from ejmp.graph.structure import Structure
from ejmp.lock import locked

SHARD_SIZE = 20_000
"""Structures per shard, unless another number is asked for."""
PLAN_NAME = "plan.json"
"""File in the folder of a split by which a conversion knows that the folder is its own."""
LOCK = ".lock"
"""File in the dataset's folder by which a second conversion notices the first."""
CUSTOM = "custom"
"""What `dataset.json` calls a format that is not one of ejmp's."""


def convert(  # noqa: PLR0913, all but two by name
    source: str | Path,
    dest: str | Path,
    *,
    format: str | Format | None = None,  # noqa: A002
    options: ReadOptions | None = None,
    split: str | None = None,
    licence: str = "not stated",
    shard_size: int = SHARD_SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Convert a source to one store per split, `dest/train` and so on, resuming where an earlier run ended.

    Call it in every process that `mpirun` started, or in one.

    Args:
        source: the dataset in its original form.
        dest: a folder; its name becomes the dataset's.
        format: a name of `ejmp.data.read.FORMATS`, or a format of your own; None: as the contents say, which is said on
            stderr.
        options: which arrays are labels, their units, what tags mean; None: as the format's reader knows.
        split: the split all of the source goes to; None: as the rule of the format says.
        licence: what to write into `dataset.json`.
        shard_size: structures per shard.
        progress: called on rank 0 with the number of structures done and of all that this rank has to do.

    Returns:
        The folders of the splits.

    Raises:
        ValueError: if the source cannot be read or split, or `dest` holds another conversion, or is being written.
    """
    writers = Writers()
    source, dest = Path(source), Path(dest).resolve()
    with ExitStack() as stack, writers.ending_together():
        if writers.rank == 0 and not stack.enter_context(locked(dest / LOCK, wait=False)):
            raise ValueError(f"{dest}: another process converts into it")
        survey = Survey(quiet=writers.rank != 0)
        reader, name = _reader(source, format, options or ReadOptions(), survey)
        if current_checks().on_error == "skip":
            reader = without_refused(reader)
        plans: list[SplitPlan] = []
        before = versions(source)
        if writers.rank == 0:
            chosen_by = "" if options in (None, ReadOptions()) else f" {options}"
            plans = plan_splits(source, dest, reader, name, split, shard_size, chosen_by)
            for plan in plans:
                _claim(plan)
        plans, before = writers.share((plans, before))
        tasks = [(plan, shard) for plan in plans for shard in range(plan.num_shards)][writers.rank :: writers.size]
        with surveying(survey):
            _write_shards(tasks, source, reader, survey, before, progress if writers.rank == 0 else None)
        writers.wait()
        if writers.rank == 0:
            for plan in sorted(plans, key=lambda plan: plan.split != "train"):
                _publish(plan, name, str(source), licence)
        writers.wait()
    return [plan.folder for plan in plans]


def _reader(source: Path, format: str | Format | None, options: ReadOptions, survey: Survey) -> tuple[Format, str]:  # noqa: A002
    """Return the format that options make of the one that was asked for or recognised, and its name.

    Raises:
        ValueError: if there is no such format, or it does not take the options.
    """
    if isinstance(format, Format):
        return checked(configured(format, CUSTOM, options, survey)), CUSTOM
    name = recognised(source, survey) if format is None else format
    return configured(find_format(name), name, options, survey), name


def _claim(plan: SplitPlan) -> None:
    """Make the folder of a split this conversion's own, and remove what an interrupted run left half written.

    Raises:
        ValueError: if it holds another conversion, or a dataset that no conversion made.
    """
    path = plan.folder / PLAN_NAME
    claim = {"digest": plan.digest, "count": plan.count, "shard_size": plan.shard_size}
    if path.exists():
        found = json.loads(path.read_bytes())
        if found != claim:
            problem = f"dest holds another conversion, {found}; this one is {claim}. Take another folder"
            raise ValueError(f"{path}: {problem}")
    elif (plan.folder / FILE_NAME).exists():
        raise ValueError(f"{plan.folder}: dest holds a dataset this conversion did not make")
    plan.folder.mkdir(parents=True, exist_ok=True)
    for left_over in plan.folder.glob(f"*{TEMPORARY}"):
        left_over.unlink()
    if not path.exists():
        with written(path) as temporary:
            temporary.write_text(json.dumps(claim) + "\n")


def _write_shards(
    tasks: Sequence[tuple[SplitPlan, int]],
    source: Path,
    reader: Format,
    survey: Survey,
    before: Versions,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write the given shards of the given splits, except those that are already finished.

    Raises:
        SourceError: if a file of the source has changed since then; the shard that it was read for is not written.
    """
    total, done = sum(plan.first(shard + 1) - plan.first(shard) for plan, shard in tasks), 0
    for plan, shard in tasks:
        if _finished(plan, shard) is None:
            tally = Tally()
            structures = unchanged(before, _structures(plan, shard, source, reader))
            structures = tally.watch(survey.counted(structures))
            if progress is not None:
                structures = _reported(structures, done, total, progress)
            entry, index = write_shard(plan.folder / f"{_shard_name(shard)}.lmdb", structures, plan.first(shard))
            known = {"plan": np.array(plan.digest), **vars(index), **tally.to_arrays()}
            known |= {name: np.array(value) for name, value in asdict(entry).items()}
            known["labels"] = np.array(json.dumps([asdict(row) for row in survey.take()]))
            with written(plan.folder / f"{_shard_name(shard)}.npz") as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, **known)  # pyright: ignore[reportArgumentType]
        done += plan.first(shard + 1) - plan.first(shard)
        if progress is not None:
            progress(done, total)


def _reported(
    structures: Iterator[Structure], done: int, total: int, progress: Callable[[int, int], None]
) -> Iterator[Structure]:
    """Yield the structures as they come, and report progress every hundred."""
    for number, structure in enumerate(structures, done):
        if number % 100 == 0:
            progress(number, total)
        yield structure


def _shard_name(shard: int) -> str:
    return f"shard-{shard:05d}"


def _structures(plan: SplitPlan, shard: int, source: Path, reader: Format) -> Iterator[Structure]:
    """Yield the structures of a shard, in order."""
    first, last, start = plan.first(shard), plan.first(shard + 1), 0
    for piece in plan.chosen:
        end = start + len(piece.indices)
        if start < last and first < end:
            yield from _wanted(source, reader, piece.part, piece.indices[max(first - start, 0) : last - start])
        start = end


def _wanted(source: Path, reader: Format, part: Part, indices: Sequence[int]) -> Iterator[Structure]:
    """Yield those structures of a part whose numbers in it are wanted; these ascend."""
    rest = iter(indices)
    wanted = next(rest, None)
    for index, structure in enumerate(reader.read(source, part)):
        if index == wanted:
            yield structure
            wanted = next(rest, None)
            if wanted is None:
                return
    raise ValueError(f"{source}: part {part.name}: expected {part.count} structures, got fewer")


def _finished(plan: SplitPlan, shard: int) -> dict[str, Any] | None:
    """Return the contents of a shard's `.npz` if the shard is complete, or else None."""
    path = plan.folder / f"{_shard_name(shard)}.lmdb"
    try:
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
            known = dict(file)
        complete = "labels" in known and known["plan"] == plan.digest and path.stat().st_size == known["bytes"]
        return known if complete and hash_file(path) == known["hash"] else None
    except Exception:  # noqa: BLE001, whatever is wrong with it, the shard is written again
        return None


def _publish(plan: SplitPlan, name: str, source: str, licence: str) -> None:
    """Join the shards' indices and statistics, and write `dataset.json`, which makes the split visible."""
    shards, labels, tally, start = [], [], Tally(), 0
    with ExitStack() as stack:
        arrays = {}
        for field, dtype in INDEX_FILES.items():
            temporary = stack.enter_context(written(plan.folder / f"{field}.npy"))
            arrays[field] = np.lib.format.open_memmap(temporary, "w+", dtype, (plan.count,))
        for shard in range(plan.num_shards):
            with np.load(plan.folder / f"{_shard_name(shard)}.npz", allow_pickle=False) as file:
                known = dict(file)
            entry = {field: known[field].item() for field in Shard.__dataclass_fields__}
            shards.append(Shard(**entry))
            for field in Index.__dataclass_fields__:
                arrays[field][start : start + entry["count"]] = known[field]
            start += entry["count"]
            tally.merge(Tally.from_arrays(known))
            labels += [LabelRow(**row) for row in json.loads(known["labels"].item())]
        for array in arrays.values():
            array.flush()
    reference, statistics = _normalisation(plan, tally)
    info = DatasetInfo(
        name=plan.folder.parent.name,
        format=name,
        split=plan.split,
        count=plan.count,
        source=source,
        licence=licence,
        linear_reference=reference,
        statistics=statistics,
        labels=join_rows(labels),
    )
    index = {f"{field}.npy": hash_file(plan.folder / f"{field}.npy") for field in INDEX_FILES}
    write_manifest(plan.folder, Manifest(info=info, shards=tuple(shards), index=index))


def _normalisation(plan: SplitPlan, tally: Tally) -> tuple[Any, Any]:
    """Return linear reference and statistics of the training split; empty ones if there is no training split yet."""
    if plan.split == "train":
        return tally.linear_reference(), tally.statistics()
    train = plan.folder.parent / "train"
    if not (train / FILE_NAME).exists():
        return {}, {}
    info = read_manifest(train).info
    return info.linear_reference, info.statistics
