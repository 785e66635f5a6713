"""How long the runs of a study will take on a GPU, judged by the multiply-adds of a few structures of each dataset."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ejmp.data import MixSampler, make_batch
from ejmp.measure.flops import count_macs, graph_sizes
from ejmp.model.config import JMPConfig
from ejmp.model.jmp import JMP
from ejmp.study.budget import distill_config, finetune_config, scratch_config
from ejmp.study.execute import scalar_model
from ejmp.study.inputs import recipe_for
from ejmp.study.plan import BLOCKS, FEWER, RunSpec
from ejmp.study.settings import StudySettings
from ejmp.train.config import TrainConfig
from ejmp.train.sources import TaskData

TRAINING = 3
"""Work of a training step over that of its forward pass: backward is twice as much."""
GRADIENT_FORCES = 2
"""Work of energies and their gradients over that of energies, in prediction and, with all derivatives, in training."""
SAMPLE = 4
"""Structures of each dataset that are counted."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run takes."""

    steps: int | None
    """Training steps; None: it does not train."""
    flop: float
    """Operations besides training, two per multiply-add."""
    training: float = 0.0
    """Operations of the training steps."""
    max_seconds: float = float("inf")
    """Time after which the training ends, s."""
    seconds: float = 0.0
    """Time besides, which no operations are counted for, s."""

    def hours(self, tflops: float) -> float:
        """Return the time at a rate of so many 10^12 operations per second, h."""
        rate = tflops * 1e12
        return (self.flop / rate + min(self.training / rate, self.max_seconds) + self.seconds) / 3600


class Costs:
    """Costs of a study's runs.

    Args:
        settings: of the study.
        teacher: model that all runs start from.
        sources: datasets by name, with the splits that runs need.
    """

    def __init__(self, settings: StudySettings, teacher: JMP, sources: Mapping[str, TaskData]) -> None:
        self.settings = settings
        self.sources = sources
        models = {True: teacher.config, False: scalar_model(teacher).config}
        self._forward = {
            name: {direct: _forward_by_blocks(source, config) for direct, config in models.items()}
            for name, source in sources.items()
        }

    def forward(self, name: str, blocks: int, kind: Literal["direct", "scalar"]) -> float:
        """Return the operations of a forward pass on one structure of a dataset.

        Args:
            name: name of the dataset.
            blocks: number of interaction blocks.
            kind: "direct" for a model with a force branch, "scalar" for one without.
        """
        return self._forward[name][kind == "direct"][blocks]

    def of(self, spec: RunSpec) -> Cost:
        """Return the cost of a run."""
        blocks = spec.blocks or BLOCKS
        if spec.kind in ("distill", "scratch"):
            return self._of_mix(spec, blocks)
        if spec.kind == "finetune" and spec.dataset is not None:
            return self._of_finetuning(spec.dataset, spec, blocks)
        if spec.kind == "evaluate":
            return Cost(steps=None, flop=self._validation(blocks))
        if spec.kind == "relevance":
            most = self.settings.budget.relevance_structures
            work = [min(most, self._size(name, "val")) * self.forward(name, blocks, "direct") for name in self._mix]
            return Cost(steps=None, flop=TRAINING * sum(work))
        seconds = self.settings.budget.inference_seconds if spec.kind == "inference" else 0.0
        return Cost(steps=None, flop=0.0, seconds=seconds)

    @property
    def _mix(self) -> Sequence[str]:
        return self.settings.mix

    def _size(self, name: str, split: Literal["train", "val", "test"]) -> int:
        return len(self.sources[name].split(split))

    def _validation(self, blocks: int) -> float:
        return sum(self._size(name, "val") * self.forward(name, blocks, "direct") for name in self._mix)

    def _of_mix(self, spec: RunSpec, blocks: int) -> Cost:
        """Return the cost of training on the mix, of which a dataset's share goes with the root of its size."""
        budget, demo = self.settings.budget, self.settings.demo
        if spec.kind == "distill":
            config = distill_config(budget, demo=demo, blocks=blocks, seed=spec.seed)
        else:
            config = scratch_config(budget, demo=demo, seed=spec.seed)
        config = config.in_steps(epoch_size=self._epoch(), step_size=config.batch_size)
        shares = np.sqrt([self._size(name, "train") for name in self._mix])
        shares /= shares.sum()
        student, teacher = (
            float(shares @ [self.forward(name, n, "direct") for name in self._mix]) for n in (blocks, BLOCKS)
        )
        per_structure = TRAINING * student + (teacher if spec.kind == "distill" else 0.0)
        training = config.steps * config.batch_size * per_structure
        return Cost(steps=config.steps, flop=_validations(config) * self._validation(blocks), training=training)

    def _epoch(self) -> int:
        """Return the number of structures in an epoch of the mix."""
        return MixSampler(sizes=[self._size(name, "train") for name in self._mix], seed=0, batch_size=1).epoch_size

    def _of_finetuning(self, name: str, spec: RunSpec, blocks: int) -> Cost:
        source = self.sources[name]
        recipe = None if self.settings.demo else recipe_for(name)
        config = finetune_config(self.settings.budget, recipe=recipe, seed=spec.seed)
        config = config.in_steps(epoch_size=self._size(name, "train"), step_size=config.batch_size)
        more = GRADIENT_FORCES if source.task.forces == "gradient" else 1
        forward = more * self.forward(name, blocks, "scalar")
        measured = _validations(config) * self._size(name, "val") + self._size(name, "test")
        training = forward * config.steps * config.batch_size * TRAINING
        limit = float("inf") if config.max_seconds is None else config.max_seconds
        return Cost(steps=config.steps, flop=forward * measured, training=training, max_seconds=limit)


def _validations(config: TrainConfig) -> int:
    """Return how often a run validates: before the first step, at equal distances, and at the end."""
    return 1 + -(-config.steps // config.validate_every)


def _forward_by_blocks(source: TaskData, config: JMPConfig) -> dict[int, float]:
    """Return the mean operations of a forward pass on some of a dataset's structures, by number of blocks."""
    data = source.split("train" if "train" in source.splits else "val")
    chosen = np.unique(np.linspace(0, len(data) - 1, min(SAMPLE, len(data))).astype(int))
    graphs = [make_batch([data[int(i)]], [0], settings=source.task.graph).graph for i in chosen]
    sizes = [graph_sizes(graph) for graph in graphs]
    return {
        blocks: statistics.fmean(
            2.0 * sum(count_macs(dataclasses.replace(config, blocks=blocks), size).values()) for size in sizes
        )
        for blocks in (BLOCKS, *FEWER)
    }
