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
        By the layer's name, as in `JMPConfig.bf16_layers`, the largest first: the norm of the change of direct forces,
        or where there are none of energies, over the norm of what the model gives in float32.

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
    changes = dict.fromkeys(asked, 0.0)
    total = 0.0
    for graph in graphs:
        exact = _outputs(eight, QuantizedExecutor(graph, _AllBut(), low=None))
        total += exact.double().square().sum().item()
        for layer in asked:
            found = _outputs(eight, QuantizedExecutor(graph, _AllBut((layer,)), low=None))
            changes[layer] += (found - exact).double().square().sum().item()
    errors = {names[layer]: (change / max(total, 1e-300)) ** 0.5 for layer, change in changes.items()}
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


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


def _outputs(model: JMP, executor: QuantizedExecutor) -> Tensor:
    """Return the model's direct forces, or where it has none its energies."""
    out = model.heads(model.run(executor), executor.graph)
    return out.energy if out.forces is None else out.forces
