"""Calibration for 8 bits: how much each layer's rounding changes what a model says, to leave some in 16."""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ejmp.graph.graph import AtomGraph
from ejmp.model.jmp import JMP
from ejmp.model.quantized_executor import QuantizedExecutor, check_layers


class _Asked(list[nn.Module]):
    """No layer is exact, and each that is asked about is noted."""

    def __contains__(self, layer: object) -> bool:
        if isinstance(layer, nn.Module) and not any(layer is known for known in self):
            self.append(layer)
        return False


class _AllBut(tuple[nn.Module, ...]):
    """All layers are exact but these."""

    __slots__ = ()

    def __contains__(self, layer: object) -> bool:
        return not any(layer is one for one in self)


@torch.no_grad()
def layer_errors(model: JMP, graphs: Sequence[AtomGraph]) -> dict[str, float]:
    """Return by how much each layer alone, with its product in 8-bit integers, changes a model's outputs.

    Args:
        model: in float32, on a CPU with VNNI; its precision does not matter.
        graphs: some structures such as the model will see. Each is run once per layer.

    Returns:
        By the layer's name, as in `JMPConfig.bf16_layers`, the largest first: the norm of the change over the norm of
        what the model gives in float32, of energies and of direct forces together: the root of the sum of both squares.

    Raises:
        ValueError: if there are no graphs, or the processor has no 8-bit products.
    """
    if not graphs:
        raise ValueError("graphs: expected some structures, got none")
    eight = model.on(backend="native", precision="int8")
    names = {module: name for name, module in model.named_modules()}
    asked = _Asked()
    for graph in graphs:
        eight.check_graph(graph)
        _outputs(eight, QuantizedExecutor(graph, asked))
    totals, changes = _squares([]), {layer: _squares([]) for layer in asked}
    for graph in graphs:
        exact = _outputs(eight, QuantizedExecutor(graph, _AllBut(), low=None))
        totals += _squares(exact)
        for layer in asked:
            found = _outputs(eight, QuantizedExecutor(graph, _AllBut((layer,)), low=None))
            changes[layer] += _squares([x - y for x, y in zip(found, exact, strict=True)])
    relative = {names[layer]: (change / totals.clamp_min(1e-300)).sum().sqrt() for layer, change in changes.items()}
    return dict(sorted(((name, error.item()) for name, error in relative.items()), key=lambda item: -item[1]))


def keep_in_bf16(model: JMP, layers: Iterable[str]) -> JMP:
    """Return a model with some layers in bfloat16 where others are in 8 bits; it shares all parameters.

    Raises:
        ValueError: for a name that is not that of a linear layer.
    """
    config = dataclasses.replace(model.config, bf16_layers=tuple(layers))
    check_layers(config.bf16_layers, model)
    other = model.on()
    other.config = config
    return other


def _outputs(model: JMP, executor: QuantizedExecutor) -> list[Tensor]:
    """Return the model's raw energies, and its direct forces if it has them."""
    out = model.heads(model.run(executor), executor.graph)
    return [out.energy] if out.forces is None else [out.energy, out.forces]


def _squares(outputs: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of each, [2]."""
    found = torch.zeros(2, dtype=torch.float64)
    for i, x in enumerate(outputs):
        found[i] = x.double().square().sum()
    return found
