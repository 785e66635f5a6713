"""The heads: what turns the last features of atoms and edges into the energies and direct forces of each task."""

import copy
from typing import TYPE_CHECKING, cast

from torch import nn

from ejmp.model.config import JMPConfig
from ejmp.model.layers import ScaledSiLU

if TYPE_CHECKING:
    from collections.abc import Sequence


def _head(size: int, kind: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    if kind == "linear":
        return nn.Sequential(nn.Linear(size, 1, bias=False))
    for _ in range(4):
        layers += [nn.Linear(size, size, bias=kind == "mlp"), ScaledSiLU()]
    return nn.Sequential(*layers, nn.Linear(size, 1, bias=False))


class Heads(nn.Module):
    """The heads: for each task one on atoms for energies and, with direct forces, one on edges."""

    def __init__(self, config: JMPConfig) -> None:
        super().__init__()
        energy = nn.ModuleList(_head(config.emb_size_atom, config.head) for _ in range(config.num_tasks))
        self.out_energy = cast("Sequence[nn.Sequential]", energy)
        if config.direct_forces:
            forces = nn.ModuleList(_head(config.emb_size_edge, config.head) for _ in range(config.num_tasks))
            self.out_forces = cast("Sequence[nn.Sequential]", forces)

    def alone(self, number: int) -> "Heads":
        """Return the heads of one task, which share their parameters with these."""
        other = copy.copy(self)
        lists: dict[str, nn.Module | None] = {}
        for name, heads in self.named_children():
            lists[name] = nn.ModuleList([list(heads.children())[number]])
        other._modules = lists  # noqa: SLF001 - which a shallow copy would share
        return other
