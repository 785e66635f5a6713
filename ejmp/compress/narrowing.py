"""Narrower blocks: fewer channels of edges, fewer residual layers, and least squares that make up for the channels."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ejmp.compress.config import RESIDUALS
from ejmp.compress.refit import solve
from ejmp.graph.graph import AtomGraph
from ejmp.model.config import JMPConfig
from ejmp.model.jmp import JMP
from ejmp.model.layers import Residual

RIDGE = 1e-6
"""Ridge of the least squares, as a share of a channel's sum of squares."""
FINAL = "final MLP"
"""The channels of the force branch's final MLP; see `_spaces`."""
STREAM = "stream"
"""The channels of the edges, from the embedding to what the output blocks make of them."""


@torch.no_grad()
def narrow(model: JMP, channels: int, graphs: Iterable[AtomGraph]) -> JMP:
    """Return a copy of a model with fewer channels of edges, in all blocks and in the final MLP's force branch.

    Which channels stay is decided by how much of what they are read by comes from them: for a linear map with weights
    W and inputs x, channel c has the score (sum of x_c^2) |W_c|^2, over the sum of all channels' scores; over all maps
    that read the same channels, the scores are added (with one map, that is the criterion of Sun et al., arXiv
    2306.11695, squared). The edges' residual stream is one set of channels, the final MLP's is another, and the hidden
    layer inside each interaction, residual layer and head is one of its own.

    Then each map that lost inputs is corrected so that it gives what it gave, in least squares over the rows of the
    graphs (He et al., arXiv 1707.06168): with K the kept and L the lost channels, D minimises

        sum |x_L W_L^T - x_K D^T|^2 + ridge * sum_k |x_k|^2 |D_k|^2,    W' = W_K + D

    from sums in float64, whose memory does not grow with the number of graphs. A model whose lost channels are zero
    everywhere gives the same as before.

    Args:
        model: model to make narrower, which is not changed.
        channels: number of channels to keep, at most what there are. Kernels like multiples of 64.
        graphs: graphs such as the model will see, of some hundred structures; no labels are needed.

    Raises:
        ValueError: if there are not so many channels, no graphs, or a feature is not finite.
    """
    have = model.config.emb_size_edge
    if not 0 < channels <= have:
        raise ValueError(f"edge channels: expected 1 to {have}, got {channels}")
    config = dataclasses.replace(model.config, emb_size_edge=channels, kept_force_channels=None, depths=None)
    with torch.device("meta"):
        small = JMP(config, model.requested_backend, model.precision, tasks=model.tasks)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: value.shape for name, value in small.state_dict().items()}
    narrowed = {
        name: _Narrowed(name, value, shapes[name], model.config)
        for name, value in parameters.items()
        if value.shape != shapes[name]
    }
    sums = _sums(model, {each.weight for each in narrowed.values() if each.loses_inputs}, graphs)
    scores: dict[str, Tensor] = {}
    for each in {each.weight: each for each in narrowed.values()}.values():  # some weights have two names
        if each.loses_inputs:
            space, score = each.scores(sums[each.weight])
            scores[space] = scores.get(space, 0) + score
    kept = {space: score.topk(channels).indices.sort().values for space, score in scores.items()}
    state = {name: value.clone() for name, value in model.state_dict().items() if name not in narrowed}
    state |= {name: each.narrowed(kept, sums) for name, each in narrowed.items()}
    small.load_state_dict(state, assign=True)
    if model.config.direct_forces:
        origin = model.config.kept_force_channels or tuple(range(have))
        chosen = tuple(origin[i] for i in kept.get(FINAL, torch.arange(channels)).tolist())
        small.config = dataclasses.replace(config, kept_force_channels=chosen)
    return small.train(model.training)


class _Narrowed:
    """One tensor of a model that loses rows or columns.

    Args:
        name: its name in the state dict.
        weight: its values.
        shape: what it shall have.
        config: of the model it is of.
    """

    def __init__(self, name: str, weight: Tensor, shape: torch.Size, config: JMPConfig) -> None:
        self.weight = weight
        self.rows, self.columns = _spaces(name)
        self.loses_outputs = weight.shape[0] != shape[0]
        self.loses_inputs = weight.ndim == 2 and weight.shape[1] != shape[1]
        self._channels = config.emb_size_edge
        self._parts = config.blocks + 1 if name.endswith("out_mlp_F.out_mlp.0.linear.weight") else 1

    def _starts(self) -> list[int]:
        """Return where in a row each set of channels begins; other inputs come first."""
        first = self.weight.shape[1] - self._parts * self._channels
        return [first + i * self._channels for i in range(self._parts)]

    def scores(self, gram: Tensor) -> tuple[str, Tensor]:
        """Return the name of the inputs' channels and what share of the output's energy each brings, [channels]."""
        energy = gram.diagonal() * self.weight.double().square().sum(0)
        summed = energy[self._starts()[0] :].view(self._parts, -1).sum(0)
        return self.columns, summed / summed.sum().clamp_min(torch.finfo(summed.dtype).tiny)

    def narrowed(self, kept: Mapping[str, Tensor], sums: Mapping[Tensor, Tensor]) -> Tensor:
        """Return the smaller tensor, corrected for the inputs it lost."""
        value = self.weight.detach()
        if self.loses_inputs:
            starts, chosen = self._starts(), kept[self.columns]
            stay = torch.ones(value.shape[1], dtype=torch.bool, device=value.device)
            stay[starts[0] :] = False
            for start in starts:
                stay[start + chosen] = True
            gram, weight = sums[self.weight], value.double()
            moment = gram[stay][:, ~stay] @ weight[:, ~stay].T
            found = solve(gram[stay][:, stay], moment, RIDGE)
            assert found is not None  # a positive definite matrix, by the ridge
            value = (weight[:, stay] + found.T).to(value.dtype)
        return value[kept[self.rows]] if self.loses_outputs else value.clone()


def _spaces(name: str) -> tuple[str, str]:
    """Return which set of channels the rows, and which the columns of a tensor are of, if they are the edges'."""
    if match := re.match(r"(output\.out_forces\.\d+)\.(\d+)\.", name):  # linear maps, every other one an activation
        layer = int(match[2])
        return f"{match[1]}.{layer}", f"{match[1]}.{layer - 2}" if layer else FINAL
    stream = FINAL if "out_mlp_F" in name else STREAM
    if match := re.match(r"(.*\.dense_mlp)\.([01])\.", name):
        return (match[1], stream) if match[2] == "0" else (stream, match[1])
    if match := re.match(r"(.*_interaction)\.(dense_ba|dense_db|mlp_rbf|down_projection)\.", name):
        return match[1], match[1] if match[2] == "down_projection" else STREAM
    return stream, STREAM  # the final MLP's first layer reads the stream


@contextmanager
def _watched(layers: Iterable[nn.Module], see: Callable[[nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `see(layer, input, output)` whenever a layer has run."""

    def hook(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        see(layer, args[0], out)

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: JMP, graphs: Iterable[AtomGraph]) -> None:
    """Run a model on graphs, module by module."""
    plain, count = model.on(backend="reference", precision="fp32"), 0
    for graph in graphs:
        plain.forward(graph)
        count += 1
    if not count:
        raise ValueError("prune: expected graphs to measure activations on, got none")


def _sums(model: JMP, weights: set[Tensor], graphs: Iterable[AtomGraph]) -> dict[Tensor, Tensor]:
    """Return the sum of x x^T over the inputs x of each linear map, [in, in] float64, by its weights."""
    sums: dict[Tensor, Tensor] = {}

    def see(layer: nn.Module, x: Tensor, _: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        rows = x.flatten(0, -2).double()
        if not rows.isfinite().all():
            raise ValueError("prune: a feature is not finite")
        found = rows.T @ rows
        sums[layer.weight] = sums[layer.weight] + found if layer.weight in sums else found

    wanted = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.weight in weights]
    with _watched(wanted, see):
        _run(model, graphs)
    return sums


@torch.no_grad()
def drop_residuals(model: JMP, numbers: Mapping[str, int], graphs: Iterable[AtomGraph]) -> JMP:
    """Return a copy of a model with fewer residual layers of edges in each block.

    Those that change their input least are left out, of each block its own: by the sum of |y - x|^2 over that of
    |y|^2, with x their input and y their output. What follows reads x instead.

    Args:
        model: model to make smaller, which is not changed.
        numbers: layers to keep in each block, by the name of a place in it: "before_skip", "after_skip" or "concat".
        graphs: graphs such as the model will see; no labels are needed.

    Raises:
        ValueError: for another name, or a number beyond what there is.
    """
    for place, number in numbers.items():
        have = getattr(model.config, f"num_{place}") if place in RESIDUALS else 0
        if place not in RESIDUALS:
            raise ValueError(f"residuals: expected some of {', '.join(RESIDUALS)}, got {place!r}")
        if not 0 <= number <= have:
            raise ValueError(f"residuals: {place}: expected 0 to {have}, got {number}")
    changes: dict[nn.Module, _Change] = defaultdict(_Change)

    def see(layer: nn.Module, x: Tensor, y: Tensor) -> None:
        changes[layer].moved += (y - x).double().square().sum().item()
        changes[layer].size += y.double().square().sum().item()

    every = (layer for block in model.backbone.int_blocks for layer in block.modules())
    with _watched((layer for layer in every if isinstance(layer, Residual)), see):
        _run(model, graphs)
    sizes = {f"num_{place}": number for place, number in numbers.items()}
    config = dataclasses.replace(model.config, **sizes, depths=None, bf16_layers=())
    with torch.device("meta"):
        small = JMP(config, model.requested_backend, model.precision, tasks=model.tasks)
    state = model.state_dict()
    for i, block in enumerate(model.backbone.int_blocks):
        for place, number in numbers.items():
            name = RESIDUALS[place]
            layers = list(block.get_submodule(name).children())
            kept = sorted(sorted(range(len(layers)), key=lambda j: changes[layers[j]].share)[len(layers) - number :])
            prefix = f"backbone.int_blocks.{i}.{name}."
            moved = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
            for new, old in enumerate(kept):
                for key, value in moved.items():
                    if key.startswith(f"{prefix}{old}."):
                        state[f"{prefix}{new}." + key.removeprefix(f"{prefix}{old}.")] = value
    small.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    return small.train(model.training)


@dataclass
class _Change:
    """How much a layer changes its input."""

    moved: float = 0.0
    """The sum of |y - x|^2."""
    size: float = 0.0
    """The sum of |y|^2."""

    @property
    def share(self) -> float:
        """The change over the size."""
        return self.moved / self.size if self.size else 0.0


def shared_channels(student: JMPConfig, teacher: JMPConfig) -> list[int] | None:
    """Return which of a teacher's force channels a narrower student still has; None if it has all of them.

    Raises:
        ValueError: if the student has channels that the teacher does not have.
    """
    kept, have = student.kept_force_channels, teacher.kept_force_channels
    if kept is None or kept == have:
        return None
    places = {channel: place for place, channel in enumerate(have or range(teacher.emb_size_edge))}
    if not set(kept) <= places.keys():
        raise ValueError("student: its force channels (kept_force_channels) are not some of the teacher's")
    return [places[channel] for channel in kept]
