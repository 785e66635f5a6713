"""Models to start training from: random weights with fitted scale factors, or a trained backbone with a new head."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch

from ejmp.model.config import JMPConfig
from ejmp.model.jmp import JMP
from ejmp.model.scale_factors import fit_scale_factors
from ejmp.train.sources import TaskData, graphs_of


def new_model(config: JMPConfig, sources: Sequence[TaskData], *, seed: int) -> JMP:
    """Return an untrained model for the sources' tasks; its scale factors are fitted to some of their structures."""
    torch.manual_seed(seed)
    model = JMP(config, tasks=[source.task for source in sources])
    fit_scale_factors(model, list(graphs_of(model, sources, 64, seed=seed)))
    return model


def for_finetuning(
    model: JMP,
    *,
    direct_forces: bool = False,
    reduction: Literal["sum", "mean"] = "sum",
    biases: bool = True,
    seed: int = 0,
) -> JMP:
    """Return a model with one new, random head (JMP, arXiv 2310.16802) and the backbone of a trained one.

    It has no tasks: what the new head predicts is said by whoever trains it.

    Args:
        model: trained model, which is not changed.
        direct_forces: keep the force branch; without it forces are gradients of the energy.
        reduction: how atoms' outputs make a structure's: "mean" for intensive targets.
        biases: whether the head has biases; JMP's for fine-tuning on forces has none.
        seed: seed of the head's random weights.

    Raises:
        ValueError: if a force branch is asked for and the model has none.
    """
    if direct_forces and not model.config.direct_forces:
        raise ValueError("direct_forces: the model has no force branch")
    config = dataclasses.replace(
        model.config,
        num_tasks=1,
        head="mlp" if biases else "mlp-no-bias",
        direct_forces=direct_forces,
        energy_reduction=reduction,
        depths=None,
        bf16_layers=(),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        new = JMP(config, model.requested_backend, model.precision).to(model.device, model.dtype)
    state = model.state_dict()
    kept = {name: value for name, value in state.items() if not name.startswith("output.") and name in new.state_dict()}
    new.load_state_dict({**new.state_dict(), **kept})
    return new
