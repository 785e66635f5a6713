"""The runs that a study is made of, as a function of its settings and of what was asked for; needs no torch."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ejmp.catalog import CATALOG
from ejmp.study.settings import Part, StudySettings

Kind = Literal["constant", "evaluate", "distill", "scratch", "relevance", "inference", "finetune"]
Strategy = Literal["zero", "mean", "teacher", "br", "br_random", "br_refit", "br_kd", "scratch"]
BLOCKS = 6
"""Number of interaction blocks of the teacher."""
FEWER = (5, 4, 3, 2)
"""Numbers of blocks that it is pruned to."""
CURVES = (6, 4, 3)
"""Numbers of blocks in Figure 4."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run of a study."""

    name: str
    """Name of the run, and of its folder."""
    kind: Kind
    """What is done."""
    strategy: Strategy | None = None
    """How the model is made that the run measures or trains."""
    blocks: int | None = None
    """Number of interaction blocks of that model."""
    dataset: str | None = None
    """Dataset to fine-tune on; None: the pre-training mix."""
    seed: int = 0
    """Seed of the run."""
    needs: tuple[str, ...] = ()
    """Names of the runs that must be finished before it starts."""


LONGEST_FIRST: tuple[Kind, ...] = ("distill", "scratch", "finetune", "relevance", "evaluate", "constant", "inference")
"""Kinds of runs in the order in which they are started: of several processes, none ends long after the others."""


def plan(parts: Sequence[Part], settings: StudySettings) -> tuple[RunSpec, ...]:
    """Return the runs of some parts, each once: long ones first, and those that others need before them.

    Args:
        parts: tables and figures that are asked for.
        settings: of the study.
    """
    found: dict[str, RunSpec] = {}
    for part in parts:
        for spec in runs_of(part, settings):
            found.setdefault(spec.name, spec)
    ordered = sorted(found.values(), key=lambda spec: (LONGEST_FIRST.index(spec.kind), -(spec.blocks or 0)))
    # Speed is measured when the other runs are done and the machine is quiet.
    others = tuple(spec.name for spec in ordered if spec.kind != "inference")
    return tuple(replace(spec, needs=others) if spec.kind == "inference" else spec for spec in ordered)


def runs_of(part: Part, settings: StudySettings) -> Iterator[RunSpec]:
    """Yield the runs that one table or figure is made of, and those they need, in the order of its rows."""
    if part == "table1":
        yield from _table1(settings)
    elif part == "table2":
        yield RunSpec(name="inference", kind="inference")
    elif part == "fig2":
        yield RunSpec(name="relevance", kind="relevance", strategy="teacher", blocks=BLOCKS)
    elif part == "fig3":
        for dataset in settings.downstream:
            yield from _downstream(dataset, settings)
    else:
        for dataset in settings.downstream:
            yield from (_finetune(dataset, "teacher" if b == BLOCKS else "br", b, 0) for b in CURVES)


def _table1(settings: StudySettings) -> Iterator[RunSpec]:
    yield RunSpec(name="zero", kind="constant", strategy="zero")
    yield RunSpec(name="teacher", kind="evaluate", strategy="teacher", blocks=BLOCKS)
    for blocks in FEWER:
        yield RunSpec(name=f"br-{blocks}", kind="evaluate", strategy="br", blocks=blocks)
        yield RunSpec(name=f"random-{blocks}", kind="evaluate", strategy="br_random", blocks=blocks)
        yield RunSpec(name=f"refit-{blocks}", kind="evaluate", strategy="br_refit", blocks=blocks)
        yield from _distilled(blocks, range(settings.seeds))
        yield RunSpec(name=f"scratch-{blocks}-seed0", kind="scratch", strategy="scratch", blocks=blocks)


def _distilled(blocks: int, seeds: Iterable[int]) -> Iterator[RunSpec]:
    for seed in seeds:
        yield RunSpec(name=f"kd-{blocks}-seed{seed}", kind="distill", strategy="br_kd", blocks=blocks, seed=seed)


def control(dataset: str) -> Strategy:
    """Return which control without a model is a dataset's: predicting no forces, or the mean of a scalar target."""
    return "mean" if CATALOG[dataset].finetuning[0].force_std is None else "zero"


def _downstream(dataset: str, settings: StudySettings) -> Iterator[RunSpec]:
    strategy = control(dataset)
    yield RunSpec(name=f"{dataset}-{strategy}", kind="constant", strategy=strategy, dataset=dataset)
    for seed in range(settings.finetune_seeds):
        yield _finetune(dataset, "teacher", BLOCKS, seed)
    for blocks in FEWER:
        yield from _distilled(blocks, (0,))
        for strategy in ("br", "br_random", "br_kd"):
            yield from (_finetune(dataset, strategy, blocks, seed) for seed in range(settings.finetune_seeds))


def _finetune(dataset: str, strategy: Strategy, blocks: int, seed: int) -> RunSpec:
    short = {"br_random": "random", "br_kd": "kd"}.get(strategy, strategy)
    needs = (f"kd-{blocks}-seed0",) if strategy == "br_kd" else ()
    name = f"{dataset}-{short}-{blocks}-seed{seed}"
    return RunSpec(
        name=name, kind="finetune", strategy=strategy, blocks=blocks, dataset=dataset, seed=seed, needs=needs
    )
