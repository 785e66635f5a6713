"""Block reduction: keep some interaction blocks of a model and the final MLP's columns that read them."""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import torch

from ejmp.compress.config import FINAL_MLPS, FinalMLPStart
from ejmp.compress.refit import refit
from ejmp.graph.graph import AtomGraph
from ejmp.model.jmp import JMP
from ejmp.model.layers import he_orthogonal_

FIRST_LAYER = re.compile(r"backbone\.out_mlp_[EF]\.out_mlp\.0\.linear\.weight")


def prune(
    model: JMP,
    *,
    blocks: int | None = None,
    keep: Sequence[int] | None = None,
    final_mlp: FinalMLPStart = "sliced",
    data: Iterable[AtomGraph] | None = None,
) -> JMP:
    """Return a copy of the model with fewer interaction blocks (Ghunaim et al., block reduction).

    The output block of the embedding always stays. The model's config records which of the unpruned model's blocks
    were kept; its tasks stay what they were. A model that was trained at several depths (`config.depths`) needs no
    training after it was pruned to one of these.

    Args:
        model: model to prune, which is not changed.
        blocks: number of blocks to keep, the first ones.
        keep: numbers of the blocks to keep instead, from 0, ascending.
        final_mlp: "sliced" keeps the surviving input columns of the final MLP's first layer (of both branches),
            "random" initialises that layer anew at the smaller size, "refit" corrects the sliced layer so that it
            gives what the whole one gave on `data`, in least squares (`ejmp.compress.refit`): no training, no labels.
        data: graphs for "refit", of some hundred structures such as the model will see; only for "refit".

    Raises:
        ValueError: unless exactly one of blocks and keep is given and names at least one existing block; if there is
            no data for "refit", or data for another choice.
    """
    have = model.config.blocks
    if (blocks is None) == (keep is None):
        raise ValueError("prune: give either blocks= or keep=")
    kept = list(range(blocks)) if blocks is not None else list(keep or ())
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= have:
        raise ValueError(f"prune: expected between 1 and {have} different blocks of 0..{have - 1} in order, got {kept}")
    if final_mlp not in FINAL_MLPS:
        raise ValueError(f"final_mlp: expected one of {', '.join(FINAL_MLPS)}, got {final_mlp!r}")
    if (final_mlp == "refit") != (data is not None):
        raise ValueError('prune: data= is what final_mlp="refit" needs, and nothing else does')
    origin = model.config.kept_blocks or tuple(range(have))
    config = dataclasses.replace(
        model.config, blocks=len(kept), kept_blocks=tuple(origin[i] for i in kept), depths=_depths(model, kept)
    )
    with torch.device("meta"):
        small = JMP(config, model.requested_backend, model.precision, tasks=model.tasks)
    old = model.state_dict()
    state = {}
    for name, expected in small.state_dict().items():
        value = old[_old_name(name, kept)]
        if FIRST_LAYER.fullmatch(name):
            columns = value.unflatten(1, (have + 1, -1))
            value = columns[:, [0, *(i + 1 for i in kept)]].flatten(1)
            if final_mlp == "random":
                he_orthogonal_(value)
        if value.shape != expected.shape:
            raise ValueError(f"prune: {name}: expected {list(expected.shape)}, got {list(value.shape)}")
        state[name] = value.clone()
    small.load_state_dict(state, assign=True)
    if data is not None:
        refit(small, model, kept, data)
    return small.train(model.training)


def _depths(model: JMP, kept: list[int]) -> tuple[int, ...] | None:
    """Return which numbers of the kept blocks were trained to do alone, if more than that of all of them."""
    known = [depth for depth in model.config.depths or () if depth <= len(kept)]
    trained = kept == list(range(len(kept))) and len(kept) in known
    return tuple(known) if trained and len(known) > 1 else None


def _old_name(name: str, kept: list[int]) -> str:
    """Return the unpruned model's name of a tensor: block i was block kept[i], output block i + 1 was kept[i] + 1."""
    match = re.match(r"backbone\.(int|out)_blocks\.(\d+)\.(.*)", name)
    if match is None:
        return name
    kind, number, rest = match[1], int(match[2]), match[3]
    if kind == "int":
        number = kept[number]
    elif number > 0:
        number = kept[number - 1] + 1
    return f"backbone.{kind}_blocks.{number}.{rest}"
