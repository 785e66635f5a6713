"""A pre-trained model made ready for another task: its backbone with a new head."""

import dataclasses
from typing import Literal

import torch

from ejmp.model.jmp import JMP


def for_finetuning(
    model: JMP, *, direct_forces: bool = False, reduction: Literal["sum", "mean"] = "sum", seed: int = 0
) -> JMP:
    """Return a model with one new, random head (JMP, arXiv 2310.16802) and the backbone of a trained one.

    Args:
        model: left as it is.
        direct_forces: keep the force branch; without it forces are gradients of the energy.
        reduction: of atoms to a structure's value: "mean" for intensive targets.
        seed: of the head.

    Raises:
        ValueError: if a force branch is asked for and the model has none.
    """
    if direct_forces and not model.config.direct_forces:
        raise ValueError("direct_forces: the model has no force branch")
    config = dataclasses.replace(model.config, num_tasks=1, direct_forces=direct_forces, energy_reduction=reduction)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        new = JMP(config, model.requested_backend, model.precision).to(model.device, model.dtype)
    state = model.state_dict()
    kept = {name: value for name, value in state.items() if not name.startswith("output.") and name in new.state_dict()}
    new.load_state_dict({**new.state_dict(), **kept})
    return new
