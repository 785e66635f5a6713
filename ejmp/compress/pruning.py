"""Block reduction: keep some blocks of a model and the final MLP's columns that read them; or parts of each block."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from ejmp.compress.config import FINAL_MLPS, FinalMLPStart
from ejmp.compress.narrowing import drop_residuals, narrow
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
    edge_channels: int | None = None,
    residuals: Mapping[str, int] | None = None,
    data: Iterable[AtomGraph] | None = None,
) -> JMP:
    """Return a copy of the model with fewer interaction blocks (Ghunaim et al., block reduction), or narrower ones.

    The output block of the embedding always stays. The model's config records which of the unpruned model's blocks
    were kept; its tasks stay what they were. A model that was trained at several depths (`config.depths`) needs no
    training after it was pruned to one of these. Whole blocks go first, then residual layers, then channels.

    Args:
        model: model to prune, which is not changed.
        blocks: number of blocks to keep, the first ones.
        keep: numbers of the blocks to keep instead, from 0, ascending.
        final_mlp: "sliced" keeps the surviving input columns of the final MLP's first layer (of both branches),
            "random" initialises that layer anew at the smaller size, "refit" corrects the sliced layer so that it
            gives what the whole one gave on `data`, in least squares (`ejmp.compress.refit`): no training, no labels.
        edge_channels: channels of edges to keep in every block and in the final MLP's force branch, those that bring
            most to what reads them; least squares on `data` make up for the others (`ejmp.compress.narrowing`).
        residuals: residual layers of edges to keep in each block, by their place, such as {"before_skip": 1,
            "after_skip": 1, "concat": 2}: those that change their input most on `data`.
        data: graphs of some hundred structures such as the model will see; for "refit", edge_channels and residuals.

    Raises:
        ValueError: if blocks and keep are both given, or name no existing block; if nothing is asked for; if there is
            no data where it is needed, or data where it is not; for numbers beyond what the model has.
    """
    if final_mlp not in FINAL_MLPS:
        raise ValueError(f"final_mlp: expected one of {', '.join(FINAL_MLPS)}, got {final_mlp!r}")
    narrower = edge_channels is not None or bool(residuals)
    if (final_mlp == "refit" or narrower) != (data is not None):
        raise ValueError('prune: data= is what final_mlp="refit", edge_channels= and residuals= need, and nothing else')
    if narrower and blocks is None and keep is None:
        blocks = model.config.blocks
    kept, graphs = _which(model.config.blocks, blocks, keep), list(data or ())
    small = _cut(model, kept, final_mlp)
    if final_mlp == "refit":
        refit(small, model, kept, graphs)
    if residuals:
        small = drop_residuals(small, residuals, graphs)
    if edge_channels is not None:
        small = narrow(small, edge_channels, graphs)
    return small


def _which(have: int, blocks: int | None, keep: Sequence[int] | None) -> list[int]:
    """Return the numbers of the blocks to keep, of so many."""
    if (blocks is None) == (keep is None):
        raise ValueError("prune: expected one of blocks= and keep=, or edge_channels= or residuals=; got none or both")
    kept = list(range(blocks)) if blocks is not None else list(keep or ())
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= have:
        raise ValueError(f"prune: expected between 1 and {have} different blocks of 0..{have - 1} in order, got {kept}")
    return kept


def _cut(model: JMP, kept: list[int], final_mlp: FinalMLPStart) -> JMP:
    """Return a copy of a model with some of its blocks, whose final MLP is sliced, or begins with a random layer."""
    have = model.config.blocks
    origin = model.config.kept_blocks or tuple(range(have))
    config = dataclasses.replace(
        model.config,
        blocks=len(kept),
        kept_blocks=tuple(origin[i] for i in kept),
        depths=_depths(model, kept),
        bf16_layers=(),
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
