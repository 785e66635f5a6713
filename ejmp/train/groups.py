"""Parameter groups with learning-rate factors, and the scaling of gradients that all blocks add to."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ejmp.model.jmp import JMP

INT_BLOCK = re.compile(r"backbone\.int_blocks\.(\d+)\.")
OUT_BLOCK = re.compile(r"backbone\.out_blocks\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class LayerFactors:
    """Learning-rate factors of the parts of a model. The defaults are JMP's for fine-tuning (arXiv 2310.16802).

    All other parameters have factor 1: basis projections, final MLP and heads.
    """

    embedding: float = 0.3
    """Factor of the atom embedding, the table of elements."""
    blocks: tuple[float, ...] = (0.55, 0.40, 0.30, 0.40, 0.55, 0.625)
    """Factor of each block of the unpruned model and its output block; a pruned model's blocks keep theirs. The
    embedding's output block has the factor of block 0, also if that was pruned."""


def parameter_groups(
    model: JMP, *, lr: float, weight_decay: float, factors: LayerFactors | None = None
) -> list[dict[str, Any]]:
    """Divide the trainable parameters of a model into an optimizer's groups.

    Args:
        model: model whose parameters that require a gradient are put into one group each.
        lr: learning rate of a factor of 1.
        weight_decay: weight decay of all groups.
        factors: learning-rate factors; None: all parameters are in one group.

    Returns:
        Groups with "name", "params", "lr" (lr times the factor), "lr_factor" and "weight_decay".

    Raises:
        ValueError: if there is no factor for one of the model's blocks.
    """
    origin = model.config.kept_blocks or tuple(range(model.config.blocks))
    if factors is not None and max(origin) >= len(factors.blocks):
        raise ValueError(f"factors: expected one for block {max(origin)}, got {len(factors.blocks)} blocks")
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, factor = ("all", 1.0) if factors is None else _part(name, origin, factors)
        new = {"name": part, "params": [], "lr": lr * factor, "lr_factor": factor, "weight_decay": weight_decay}
        groups.setdefault(part, new)["params"].append(parameter)
    return list(groups.values())


def _part(name: str, origin: tuple[int, ...], factors: LayerFactors) -> tuple[str, float]:
    if name.startswith("embedding."):
        return "embedding", factors.embedding
    block = INT_BLOCK.match(name) or OUT_BLOCK.match(name)
    if block is None:
        return "rest", 1.0
    after = block.re is OUT_BLOCK
    number = 0 if after and block[1] == "0" else origin[int(block[1]) - after]
    return f"block {number}", factors.blocks[number]


def scale_shared_gradients(model: JMP) -> list[RemovableHandle]:
    """Divide the gradients of the basis projections by the number of blocks that share them, as JMP does.

    A hook on each parameter sees the sum over all blocks, before it is accumulated and before DeepSpeed sees it.
    Scaling is linear: several backward passes into one gradient are right as well. A second call would divide again.

    Returns:
        Handles of the hooks; `remove` takes a hook away.
    """
    blocks = model.config.blocks
    handles = []
    for name, module in model.backbone.bases.named_children():
        if name.startswith("mlp_"):
            users = blocks + 1 if name == "mlp_rbf_out" else blocks
            handles += [p.register_hook(_divider(users)) for p in module.parameters() if p.requires_grad]
    return handles


def _divider(users: int) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient / users
