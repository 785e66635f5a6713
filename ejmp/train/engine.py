"""DeepSpeed around an objective: backward, reduction over ranks, clipping, and no step that is not finite.

DeepSpeed runs in float32, because JMP computes in low precision itself but keeps float32 weights. What DeepSpeed does
differently by stage and precision (finite checks, clipping, loss scaling) is done here, on the reduced gradients.
"""

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ejmp.compress.losses import Losses
from ejmp.data.sampling.batch import Batch
from ejmp.train.config import TrainConfig
from ejmp.train.distributed import Ranks, sum_over_ranks
from ejmp.train.objective import Objective

LOG = logging.getLogger(__name__)
MAX_SKIPPED = 20
"""Number of steps skipped in a row after which training gives up."""
BUCKET = 50_000_000
"""Largest number of elements that are reduced or gathered at once: 200 MB."""
FIRST_SCALE = 2.0**16
"""Loss scale at the start of a run in fp16."""
GOOD_STEPS = 2000
"""Steps without an overflow after which the loss scale is doubled."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step was like."""

    losses: Losses
    """Losses computed on this rank's batch."""
    loss: float
    """Total loss, averaged over the ranks."""
    grad_norm: float
    """Norm of the gradient averaged over all ranks, before clipping."""
    skipped: bool
    """Whether loss or gradient was not finite on some rank, so that no weight has changed."""
    suspects: tuple[str, ...]
    """This rank's structures, as `Objective.suspects` calls them, if the step was skipped and they may be why; empty
    if only other ranks' losses were not finite."""
    lr: float
    """Learning rate of the first parameter group."""


def deepspeed_json(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's settings for a run; clipping and loss scaling are not in them, the `Engine` does both."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage:
        zero |= {"overlap_comm": False, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
        zero |= {"compute_grad_norm": False}  # the engine computes it, at every stage
    return {
        "train_batch_size": config.batch_size * world_size,
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.lr,
                "betas": list(config.betas),
                "eps": 1e-8,
                "weight_decay": config.weight_decay,
                "torch_adam": True,  # DeepSpeed's own optimisers need a compiler at run time
                "fused": True,
            },
        },
        "zero_optimization": zero,
    }


class Engine:
    """Takes optimiser steps on an objective, divided among ranks as ZeRO does.

    A step whose loss or gradient is not finite on any rank is skipped on all, at any stage and precision. Every
    parameter gets a gradient on every rank (zero if unused), so ranks may train different heads. With precision
    "fp16" the loss is scaled: by half as much after a skipped step, by twice as much after 2000 good ones.

    Args:
        objective: what to minimise; `objective.model` holds all that is trained.
        groups: parameter groups as torch.optim takes them, with the largest learning rate of each; see `set_lr`.
        config: settings of the run.
        ranks: this process among all, from `start`.

    Raises:
        ModuleNotFoundError: without deepspeed.
        ValueError: if the groups are not the trainable parameters of `objective.model`, or those are not float32.
    """

    def __init__(
        self, objective: Objective, groups: Sequence[Mapping[str, Any]], config: TrainConfig, ranks: Ranks
    ) -> None:
        deepspeed = _deepspeed()
        self.objective, self.config, self.ranks = objective, config, ranks
        groups = _checked_groups(objective, groups)
        self.largest_lrs = [group["lr"] for group in groups]
        self.parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        self._forward = _Forward(objective)
        self.deepspeed, self.optimizer, *_ = deepspeed.initialize(
            model=self._forward, model_parameters=groups, config=deepspeed_json(config, ranks.world_size)
        )
        self.zero = self.optimizer if config.zero_stage else None
        self.loss_scale = FIRST_SCALE if config.precision == "fp16" else 1.0
        self.good_steps = 0
        self.skipped = 0
        self.skipped_in_row = 0

    def set_lr(self, rate: Callable[[float], float]) -> None:
        """Set each group's learning rate to what a function makes of its largest one."""
        for group, largest in zip(self.optimizer.param_groups, self.largest_lrs, strict=True):
            group["lr"] = rate(largest)

    def step(self, batch: Batch) -> StepResult:
        """Differentiate the objective on this rank's batch and change the weights by the mean over ranks.

        Raises:
            RuntimeError: after 20 skipped steps in a row.
        """
        total = self.deepspeed(batch)
        losses = self._forward.losses
        self._backward(total * self.loss_scale)
        gradients = self._gradients()
        loss, norm = self._reduce(total.detach(), gradients)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if skipped:
            self._drop_gradients()
        else:
            self._clip(gradients, norm)
            self.deepspeed.step()
        return StepResult(
            losses=losses,
            loss=loss,
            grad_norm=norm,
            skipped=skipped,
            suspects=self._count(skipped, loss, total, batch),
            lr=self.optimizer.param_groups[0]["lr"],
        )

    def _backward(self, loss: Tensor) -> None:
        """Give every parameter its mean gradient over ranks, zero for one that no rank uses.

        ZeRO would reduce gradients in buckets while it goes, in the order in which they come, which must be the same
        on all ranks: with heads that only some ranks use it is not, and ZeRO-2 would quietly mix up parameters. So
        they are reduced after the backward pass, all of them, in the order of the groups.
        """
        fixed_order = nullcontext() if self.zero is None else self.deepspeed.coalesce_grad_reduction()
        with fixed_order:
            self.deepspeed.backward(loss)
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def _gradients(self) -> list[Tensor]:
        """Return the mean gradients over ranks: all of them at stage 0, this rank's share at stages 1 and 2."""
        if self.zero is None:
            return [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return [gradient for group in self.zero.averaged_gradients.values() for gradient in group]

    def _reduce(self, total: Tensor, gradients: list[Tensor]) -> tuple[float, float]:
        """Return the mean loss over ranks and the norm of the whole gradient, without the loss scale."""
        squares = torch.zeros((), dtype=torch.float64, device=total.device)
        if gradients:
            norms = torch._foreach_norm(gradients, 2, torch.float64)  # noqa: SLF001  # pyright: ignore[reportPrivateImportUsage]
            squares = torch.stack(norms).square().sum()
        shares = self.ranks.world_size if self.zero is None else 1
        loss, squares = sum_over_ranks(torch.stack([total.double(), squares / shares])).tolist()
        return loss / self.ranks.world_size, math.sqrt(squares) / self.loss_scale

    def _clip(self, gradients: list[Tensor], norm: float) -> None:
        """Undo the loss scale of this rank's gradients and clip them, in place."""
        clip, factor = self.config.clip, 1 / self.loss_scale
        if self.config.clip_kind == "norm":
            factor *= min(1.0, clip / (norm + 1e-6))
        if factor != 1:
            torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
        if self.config.clip_kind == "value":
            torch._foreach_clamp_min_(gradients, -clip)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_clamp_max_(gradients, clip)  # pyright: ignore[reportPrivateImportUsage]

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.zero is not None:
            for group in self.zero.averaged_gradients:
                self.zero.averaged_gradients[group] = None

    def _count(self, skipped: bool, loss: float, total: Tensor, batch: Batch) -> tuple[str, ...]:
        """Update the counts and the loss scale; return the structures that may have made the step fail."""
        if not skipped:
            self.skipped_in_row = 0
            self.good_steps += 1
            if self.config.precision == "fp16" and self.good_steps % GOOD_STEPS == 0:
                self.loss_scale *= 2
            return ()
        self.skipped += 1
        self.skipped_in_row += 1
        self.good_steps = 0
        innocent = not math.isfinite(loss) and bool(total.isfinite())
        suspects = () if innocent else self.objective.suspects(batch)
        what = "gradient" if math.isfinite(loss) else "loss"
        where = ", ".join(suspects) or "not here"
        LOG.warning("rank %d: step skipped, %s not finite: %s", self.ranks.rank, what, where)
        if self.config.precision == "fp16":
            self.loss_scale /= 2
        if self.skipped_in_row >= MAX_SKIPPED:
            raise RuntimeError(f"{MAX_SKIPPED} steps in a row had a {what} that is not finite; last: {suspects}")
        return suspects

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the loss scale, ready for JSON; `checkpoint` saves weights and moments."""
        return {name: getattr(self, name) for name in ("loss_scale", "good_steps", "skipped", "skipped_in_row")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set what `state_dict` returned; a run in another precision keeps its own loss scale."""
        for name in ("good_steps", "skipped", "skipped_in_row"):
            setattr(self, name, int(state[name]))
        if self.config.precision == "fp16" and state["loss_scale"] != 1:
            self.loss_scale = float(state["loss_scale"])


class _Forward(nn.Module):
    """The objective as DeepSpeed wants it: a module that returns one tensor."""

    losses: Losses
    """Losses of the last forward pass."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch) -> Tensor:
        self.losses = self.objective(batch)
        return self.losses.total


def _checked_groups(objective: Objective, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups without empty parameters, on which ZeRO stumbles, and without empty groups.

    Raises:
        ValueError: as `Engine`.
    """
    names = {id(parameter): name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    inside = {id(parameter) for parameter in objective.model.parameters()}
    given = [id(parameter) for group in groups for parameter in group["params"]]
    if outside := [name for key, name in names.items() if key not in inside]:
        raise ValueError(f"objective: expected all that is trained inside objective.model, got {', '.join(outside)}")
    if len(given) != len(set(given)) or set(given) != set(names):
        missing = [name for key, name in names.items() if key not in given]
        raise ValueError(
            f"groups: expected each of the {len(names)} trainable parameters of the model once, got {len(given)}, "
            f"{len(set(given))} of them different; missing: {', '.join(missing[:5]) or 'none'}"
        )
    kept = [{**group, "params": [p for p in group["params"] if p.numel()]} for group in groups]
    types = {parameter.dtype for group in kept for parameter in group["params"]}
    if types != {torch.float32}:
        raise ValueError(f"objective.model: expected float32 parameters, got {sorted(map(str, types))}")
    return [group for group in kept if group["params"]]


def _deepspeed() -> Any:
    try:
        import deepspeed  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("training needs DeepSpeed: pip install ejmp[train]") from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed would spend minutes on compiling this op when it is first used on a CPU; training has no use for it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor. is deprecated", FutureWarning)  # DeepSpeed calls it
    return deepspeed
