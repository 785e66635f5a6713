"""From a dataset's original form to a record store, by any number of processes, and on from where one was killed.

The shards are planned from the parts of the source alone, so that the same ones come out of any number of ranks. A
shard is written, then its `.npz`: its index and statistics, and the hash by which the next run knows that it is
finished. When every rank is done, rank 0 joins these to the index of the split and writes `dataset.json`; until then
there is no dataset to open.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ejmp.data.info import DatasetInfo
from ejmp.data.readers.format import Format, Part
from ejmp.data.splits import Chosen, choose, choose_all
from ejmp.data.store.dataset import INDEX_FILES
from ejmp.data.store.durable import TEMPORARY, hash_file, written
from ejmp.data.store.manifest import FILE_NAME, Manifest, read_manifest, write_manifest
from ejmp.data.store.ranks import Ranks
from ejmp.data.store.shard import Index, Shard, write_shard
from ejmp.data.store.stats import Tally
from ejmp.graph.structure import Structure

SHARD_SIZE = 20_000
PLAN_NAME = "plan.json"
CUSTOM = "custom"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What goes into one split."""

    split: str
    folder: Path
    chosen: Sequence[Chosen]
    count: int
    shard_size: int
    digest: str
    """Of all of the above that decides what the shards hold."""

    @property
    def num_shards(self) -> int:
        """Shards of the split: all full but the last."""
        return -(-self.count // self.shard_size)

    def first(self, shard: int) -> int:
        """Return the number of the first structure of a shard, or the count behind the last."""
        return min(shard * self.shard_size, self.count)


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    format: str | Format,  # noqa: A002
    split: str | None = None,
    licence: str = "not stated",
    shard_size: int = SHARD_SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Convert a source to one store per split, `dest/train` and so on; go on where an earlier run ended.

    Call it in every process that `mpirun` started, or in one.

    Args:
        source: the dataset in its original form.
        dest: a folder; its name becomes the dataset's.
        format: a name of `ejmp.data.read.FORMATS`, or a format of your own.
        split: the split all of the source goes to; None: as the rule of the format says.
        licence: what to write into `dataset.json`.
        shard_size: structures per shard.
        progress: is called on rank 0 with the structures done and all that this rank has to do.

    Returns:
        the folders of the splits.

    Raises:
        ValueError: if the source cannot be read or split, or `dest` holds another conversion.
    """
    ranks = Ranks()
    with ranks.ending_together():
        source, dest = Path(source), Path(dest).resolve()
        reader, name = _reader(format)
        plans: list[Plan] = []
        if ranks.rank == 0:
            plans = _plan(source, dest, reader, name, split, shard_size)
            for plan in plans:
                _claim(plan)
        plans = ranks.share(plans)
        tasks = [(plan, shard) for plan in plans for shard in range(plan.num_shards)][ranks.rank :: ranks.size]
        _write_shards(tasks, source, reader, progress if ranks.rank == 0 else None)
        ranks.wait()
        if ranks.rank == 0:
            for plan in sorted(plans, key=lambda plan: plan.split != "train"):
                _publish(plan, name, str(source), licence)
        ranks.wait()
    return [plan.folder for plan in plans]


def _reader(format: str | Format) -> tuple[Format, str]:  # noqa: A002
    if isinstance(format, Format):
        return format, CUSTOM
    from ejmp.data.readers.registry import FORMATS  # noqa: PLC0415

    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    return FORMATS[format], format


def _plan(source: Path, dest: Path, reader: Format, name: str, split: str | None, shard_size: int) -> list[Plan]:
    if shard_size < 1:
        raise ValueError(f"shard_size: expected 1 or more, got {shard_size}")
    parts = reader.parts(source)
    by_split = choose(name, parts, source.name) if split is None else choose_all(parts, split)
    plans = []
    for split_name, chosen in by_split.items():
        state = hashlib.blake2b(f"{name} {shard_size}".encode(), digest_size=8)
        for piece in chosen:
            state.update(f"\0{piece.part.name}\0{piece.part.count}\0".encode())
            whole = isinstance(piece.indices, range)
            state.update(b"all" if whole else np.asarray(piece.indices, "<i8").tobytes())
        plans.append(
            Plan(
                split=split_name,
                folder=dest / split_name,
                chosen=chosen,
                count=sum(len(piece.indices) for piece in chosen),
                shard_size=shard_size,
                digest=state.hexdigest(),
            )
        )
    if not any(plan.count for plan in plans):
        raise ValueError(f"{source}: expected structures, got none")
    return plans


def _claim(plan: Plan) -> None:
    """Make the folder this conversion's, or see that it is."""
    path = plan.folder / PLAN_NAME
    mine = {"digest": plan.digest, "count": plan.count, "shard_size": plan.shard_size}
    if path.exists():
        found = json.loads(path.read_bytes())
        if found != mine:
            raise ValueError(f"{path}: dest holds another conversion, {found}; this one is {mine}. Take another folder")
    elif (plan.folder / FILE_NAME).exists():
        raise ValueError(f"{plan.folder}: dest holds a dataset this conversion did not make")
    plan.folder.mkdir(parents=True, exist_ok=True)
    for left_over in plan.folder.glob(f"*{TEMPORARY}"):
        left_over.unlink()
    if not path.exists():
        with written(path) as temporary:
            temporary.write_text(json.dumps(mine) + "\n")


def _write_shards(
    tasks: Sequence[tuple[Plan, int]], source: Path, reader: Format, progress: Callable[[int, int], None] | None
) -> None:
    total, done = sum(plan.first(shard + 1) - plan.first(shard) for plan, shard in tasks), 0
    for plan, shard in tasks:
        if _finished(plan, shard) is None:
            tally = Tally()
            structures = tally.watch(_structures(plan, shard, source, reader))
            if progress is not None:
                structures = _reported(structures, done, total, progress)
            entry, index = write_shard(plan.folder / f"{_name(shard)}.lmdb", structures, plan.first(shard))
            known = {"plan": np.array(plan.digest), **vars(index), **tally.to_arrays()}
            known |= {name: np.array(value) for name, value in asdict(entry).items()}
            with written(plan.folder / f"{_name(shard)}.npz") as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, **known)  # pyright: ignore[reportArgumentType]
        done += plan.first(shard + 1) - plan.first(shard)
        if progress is not None:
            progress(done, total)


def _reported(
    structures: Iterator[Structure], done: int, total: int, progress: Callable[[int, int], None]
) -> Iterator[Structure]:
    for number, structure in enumerate(structures, done):
        if number % 100 == 0:
            progress(number, total)
        yield structure


def _name(shard: int) -> str:
    return f"shard-{shard:05d}"


def _structures(plan: Plan, shard: int, source: Path, reader: Format) -> Iterator[Structure]:
    """Yield the structures of a shard: those from `first` to `last` of all that were chosen."""
    first, last, start = plan.first(shard), plan.first(shard + 1), 0
    for piece in plan.chosen:
        end = start + len(piece.indices)
        if start < last and first < end:
            yield from _wanted(source, reader, piece.part, piece.indices[max(first - start, 0) : last - start])
        start = end


def _wanted(source: Path, reader: Format, part: Part, indices: Sequence[int]) -> Iterator[Structure]:
    rest = iter(indices)
    wanted = next(rest, None)
    for index, structure in enumerate(reader.read(source, part)):
        if index == wanted:
            yield structure
            wanted = next(rest, None)
            if wanted is None:
                return
    raise ValueError(f"{source}: part {part.name}: expected {part.count} structures, got fewer")


def _finished(plan: Plan, shard: int) -> dict[str, Any] | None:
    """Return a shard's `.npz` if the shard is all there, or None."""
    path = plan.folder / f"{_name(shard)}.lmdb"
    try:
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
            known = dict(file)
        complete = known["plan"] == plan.digest and path.stat().st_size == known["bytes"]
        return known if complete and hash_file(path) == known["hash"] else None
    except Exception:  # noqa: BLE001, whatever is wrong with it, the shard is written again
        return None


def _publish(plan: Plan, name: str, source: str, licence: str) -> None:
    """Join the shards' indices and statistics, and make the dataset visible."""
    shards, tally, start = [], Tally(), 0
    with ExitStack() as stack:
        arrays = {}
        for field, dtype in INDEX_FILES.items():
            temporary = stack.enter_context(written(plan.folder / f"{field}.npy"))
            arrays[field] = np.lib.format.open_memmap(temporary, "w+", dtype, (plan.count,))
        for shard in range(plan.num_shards):
            with np.load(plan.folder / f"{_name(shard)}.npz", allow_pickle=False) as file:
                known = dict(file)
            entry = {field: known[field].item() for field in Shard.__dataclass_fields__}
            shards.append(Shard(**entry))
            for field in Index.__dataclass_fields__:
                arrays[field][start : start + entry["count"]] = known[field]
            start += entry["count"]
            tally.merge(Tally.from_arrays(known))
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
    )
    index = {f"{field}.npy": hash_file(plan.folder / f"{field}.npy") for field in INDEX_FILES}
    write_manifest(plan.folder, Manifest(info=info, shards=tuple(shards), index=index))


def _normalisation(plan: Plan, tally: Tally) -> tuple[Any, Any]:
    """Return linear reference and statistics of the training split; none where there is no training split yet."""
    if plan.split == "train":
        return tally.linear_reference(), tally.statistics()
    train = plan.folder.parent / "train"
    if not (train / FILE_NAME).exists():
        return {}, {}
    info = read_manifest(train).info
    return info.linear_reference, info.statistics
