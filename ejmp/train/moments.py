"""Adam's moments by parameter name: gathered on rank 0 and given back, however ZeRO divides them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ejmp.train.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the running means of gradients and squared gradients in the optimiser's state."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """The slice of one parameter group, all its parameters laid end to end, that one rank's optimiser holds.

    At stage 0 each parameter is on its own and every rank holds all of it.
    """

    key: Tensor
    """Tensor that the optimiser updates, the key of its state, [size]."""
    whole: int
    """Number of elements of all ranks' shares together."""
    places: Mapping[str, tuple[int, nn.Parameter]]
    """Each parameter by name, with the index in the whole at which it begins."""


def shares(engine: Engine) -> Iterator[Share]:
    """Yield this rank's share of each parameter group."""
    names = {id(parameter): name for name, parameter in engine.objective.model.named_parameters()}
    if engine.zero is None:
        for parameter in engine.parameters:
            yield Share(key=parameter, whole=parameter.numel(), places={names[id(parameter)]: (0, parameter)})
        return
    zero = engine.zero
    for parameters, flat, key in zip(
        zero.bit16_groups, zero.bit16_groups_flat, zero.single_partition_of_fp32_groups, strict=True
    ):
        # DeepSpeed makes the parameters views of one tensor.
        starts = [(p.data_ptr() - flat.data_ptr()) // p.element_size() for p in parameters]
        places = {names[id(p)]: (start, p) for start, p in zip(starts, parameters, strict=True)}
        yield Share(key=key, whole=flat.numel(), places=places)


def optimizer_state(engine: Engine) -> dict[str, Tensor]:
    """Return the moments as exp_avg.NAME and exp_avg_sq.NAME on rank 0, nothing elsewhere or before the first step.

    All ranks must call it.
    """
    state = engine.optimizer.state
    found = {}
    for share in shares(engine):
        for moment in MOMENTS if share.key in state else ():
            whole = _gather(state[share.key][moment].detach().flatten(), share.whole, engine.ranks.rank)
            if whole is not None:
                for name, (start, parameter) in share.places.items():
                    values = whole[start : start + parameter.numel()]
                    found[f"{moment}.{name}"] = values.view(parameter.shape).clone()
    return found


def _gather(part: Tensor, size: int, rank: int) -> Tensor | None:
    """Return on rank 0 all ranks' parts end to end, [size] on the CPU, and None elsewhere."""
    if part.numel() == size:
        return part.cpu() if rank == 0 else None
    parts = [torch.empty_like(part) for _ in range(size // part.numel())] if rank == 0 else None
    dist.gather(part, parts)
    return None if parts is None else torch.cat([part.cpu() for part in parts])


def optimizer_steps(engine: Engine) -> int:
    """Return the number of steps the optimiser has taken."""
    steps = {int(engine.optimizer.state[s.key]["step"]) for s in shares(engine) if s.key in engine.optimizer.state}
    return max(steps, default=0)


def set_optimizer_state(engine: Engine, moments: Mapping[str, Tensor], steps: int) -> None:
    """Load into the optimiser what `optimizer_state` and `optimizer_steps` returned, with any number of ranks.

    Raises:
        ValueError: if a moment is missing, unknown or has another shape.
    """
    all_shares = list(shares(engine))
    expected = {
        f"{moment}.{name}": parameter.shape
        for share in all_shares
        for name, (_, parameter) in share.places.items()
        for moment in MOMENTS
    }
    wrong = {name for name in expected.keys() | moments.keys() if _shape(moments, name) != expected.get(name)}
    if moments and wrong:
        raise ValueError(f"optimiser state: missing, unknown or of another shape: {', '.join(sorted(wrong)[:5])}")
    state = engine.optimizer.state
    for share in all_shares:
        state.pop(share.key, None)
        if moments:
            state[share.key] = _restore(share, moments, steps, engine.ranks.rank)


def _shape(moments: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return moments[name].shape if name in moments else None


def _restore(share: Share, moments: Mapping[str, Tensor], steps: int, rank: int) -> dict[str, Tensor]:
    size = share.key.numel()
    first = 0 if size == share.whole else rank * size
    restored = {"step": torch.tensor(float(steps), device=share.key.device)}
    for moment in MOMENTS:
        whole = torch.zeros(share.whole, dtype=share.key.dtype)
        for name, (start, parameter) in share.places.items():
            whole[start : start + parameter.numel()] = moments[f"{moment}.{name}"].flatten()
        restored[moment] = whole[first : first + size].view(share.key.shape).to(share.key.device)
    return restored
