"""What each training command is asked to do: one frozen dataclass per command, made once from its flags.

Needs no torch, so that --help is quick.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ejmp.compress.config import DistillConfig, FinalMLPStart
from ejmp.data.source_flags import SourceRequest
from ejmp.model.config import Precision
from ejmp.train.config import TrainConfig
from ejmp.train.logs import Tracker

Device = Literal["auto", "cpu", "cuda"]
ModelSize = Literal["demo", "jmp-s", "jmp-l"]
SplitName = Literal["train", "val", "test"]
ForceKind = Literal["gradient", "direct"]


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """Where a training run is kept, whether it goes on, and with which settings."""

    directory: Path
    """Folder of the run."""
    resume: bool
    """Whether to go on from the newest checkpoint in the folder."""
    force: bool
    """Whether to go on with other settings, data or code than the run was begun with."""
    trackers: tuple[Tracker, ...]
    """Services that get the logged numbers as well."""
    config: TrainConfig
    """Settings of the training loop; what counts epochs or structures is not in steps yet."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What every command is asked."""

    device: Device
    """Device to run on; "auto" takes CUDA if there is one."""
    data: str | None
    """Record stores, as "NAME=FOLDER,..."; None: demo data."""


@dataclass(frozen=True, kw_only=True)
class TrainingRequest(Request):
    """What every command that trains is asked."""

    run: RunRequest


@dataclass(frozen=True, kw_only=True)
class PretrainRequest(TrainingRequest):
    """Pre-train a model from random weights."""

    model: ModelSize
    """Sizes of the model."""
    blocks: int | None
    """Number of interaction blocks; None: as many as models of this size have."""
    cutoff: float | None
    """Longest edge of graphs, A; None: see `ejmp.train.sources.with_graph`."""
    max_neighbors: int | None
    """Most main edges into an atom; None: see `ejmp.train.sources.with_graph`."""
    any_depth: int | None
    """Smallest number of blocks that is trained to do alone, as are all above it; None: all blocks only."""


@dataclass(frozen=True, kw_only=True)
class DistillRequest(TrainingRequest):
    """Make a student, from a teacher's blocks or a saved model, and distil the teacher into it.

    Raises:
        ValueError: unless exactly one of blocks, keep and student says what the student is.
    """

    teacher: Path | None
    """Saved teacher; None: the demo teacher."""
    teacher_precision: Precision | None
    """Precision the teacher runs in; None: the fastest of the device."""
    blocks: int | None
    """The student keeps this many of the teacher's blocks, the first ones."""
    keep: tuple[int, ...] | None
    """The student keeps these blocks of the teacher."""
    student: Path | None
    """Saved model to go on with as the student."""
    final_mlp: FinalMLPStart
    """How the first layer of a pruned student's final MLP is made; see `ejmp.prune`."""
    freeze_blocks: bool
    """Whether to train only the final MLP and the heads."""
    any_depth: int | None
    """Smallest number of the student's blocks that is trained to do alone, as are all above it; None: all only."""
    terms: DistillConfig
    """Weights of the loss."""
    synthetic: int
    """Structures to add to each dataset's training split, made by the teacher; 0: none."""
    temperature: float
    """Temperature at which the teacher makes them, K."""

    def __post_init__(self) -> None:
        """Check that there is one student, and the numbers."""
        if self.synthetic < 0 or not 0 <= self.temperature < float("inf"):
            got = f"{self.synthetic}, {self.temperature}"
            raise ValueError(f"--synthetic, --temperature: expected 0 or more, got {got}")
        if sum(map(bool, (self.blocks, self.keep, self.student))) != 1:
            raise ValueError("student: expected one of --blocks, --keep and --student")


@dataclass(frozen=True, kw_only=True)
class FinetuneRequest(TrainingRequest):
    """Fine-tune a model on one dataset."""

    frames: Path | None
    """Files of the user's own, to be converted to the record store that `data` names."""
    reading: SourceRequest
    """What is told about these files."""
    demo: str
    """Name of the demo set to train on if there is no record store."""
    recipe: str | None
    """Name of JMP's fine-tuning task whose losses, normalisation and graphs are asked for; None: those of the data."""
    target: str | None
    """What is learned from a record store: "energy", or the name of another label; None: what JMP learns of a dataset
    of its name, or the energy."""
    forces: ForceKind
    """How forces are predicted, for a record store with forces."""
    start: Path | None
    """Saved model whose backbone is the start; None: the demo teacher's."""
    scratch: bool
    """Whether to start from random weights of the same sizes instead."""
    energy_weight: float | None
    """Weight of the target's error in the loss; None: see `ejmp.train.recipes`."""
    force_weight: float | None
    """Weight of the forces' error in the loss; None: see `ejmp.train.recipes`."""
    reduction: Literal["sum", "mean"] | None
    """How atoms' outputs make a structure's; None: JMP's for a dataset of its name, or "sum"."""
    cutoff: float | None
    """Longest edge of graphs, A; None: see `ejmp.train.sources.with_graph`."""
    max_neighbors: int | None
    """Most main edges into an atom; None: see `ejmp.train.sources.with_graph`."""


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(Request):
    """Measure the errors of saved models."""

    models: tuple[Path, ...]
    """Saved models; none: the demo teacher."""
    demo: str | None
    """Name of the demo set to fine-tune on that is evaluated instead of the demo mix."""
    split: SplitName
    """Split to evaluate."""
    batch_size: int
    """Number of structures per rank and step."""
    output: Path | None
    """File to write the errors to, as JSON."""
