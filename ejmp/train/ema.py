"""Exponential moving averages of a model's parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """Averages of parameters over the steps: average = decay * average + (1 - decay) * parameter after each.

    They begin as copies of the parameters. Averages of half-precision parameters are kept in float32.

    Args:
        parameters: parameters by name: `dict(model.named_parameters())`, which names tied weights once.
        decay: weight of the old average, from 0 to below 1.

    Raises:
        ValueError: for a decay out of range.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected 0 or more and less than 1, got {decay}")
        self.decay = decay
        self._parameters = dict(parameters)
        self.averages = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters; to be called after each step that was not skipped."""
        averages = list(self.averages.values())
        current = [p.to(a.dtype) for p, a in zip(self._parameters.values(), averages, strict=True)]
        torch._foreach_lerp_(averages, current, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the averages into the parameters while the body of the `with` statement runs."""
        before = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:
            self._copy(self.averages)
            yield
        finally:
            self._copy(before)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self._parameters.items():
            p.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name (not copies)."""
        return dict(self.averages)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the averages by those that `state_dict` returned.

        Raises:
            ValueError: if names or shapes are not those of the parameters.
        """
        if set(state) != set(self.averages):
            differing = sorted(set(state) ^ set(self.averages))
            raise ValueError(f"state: averages and parameters have different names, such as {differing[0]}")
        for name, average in self.averages.items():
            if state[name].shape != average.shape:
                raise ValueError(f"state: {name}: expected {[*average.shape]}, got {[*state[name].shape]}")
        for name, average in self.averages.items():
            average.copy_(state[name])
