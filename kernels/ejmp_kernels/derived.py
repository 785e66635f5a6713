"""What is made of a parameter and held until it changes: copies in 16 bits, layouts for 8-bit products.

A change is noticed by the parameter's version and place in memory. An optimizer that writes through another view of the
same memory, as DeepSpeed's do, changes neither; so what is held must be dropped between training and evaluation
(`forget`), which `JMP.train` and `JMP.eval` do.
"""

from collections.abc import Callable, Hashable, Iterable, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")

_held: MutableMapping[Tensor, tuple[tuple[int, int], dict[Hashable, Any]]] = WeakTensorKeyDictionary()
"""By parameter: its version and place in memory, and by key what was made of it."""


def derived(parameter: Tensor, key: Hashable, make: Callable[[], Made]) -> Made:
    """Return what `make` makes of a parameter, which is called again only when the parameter has changed.

    Args:
        parameter: what it is made of; what was made is dropped with it. Of tensors made in inference mode no change of
            their values is noticed, because they do not count them.
        key: tells what is made of one parameter apart.
        make: makes it; its result must not be part of a graph of derivatives.
    """
    version = 0 if parameter.is_inference() else parameter._version  # noqa: SLF001 - there is no public name
    state = (version, parameter.data_ptr())
    held = _held.get(parameter)
    if held is None or held[0] != state:
        held = _held[parameter] = (state, {})
    if key not in held[1]:
        held[1][key] = make()
    return held[1][key]


def forget(parameters: Iterable[Tensor]) -> None:
    """Drop what is held of parameters."""
    for parameter in parameters:
        _held.pop(parameter, None)


def lowered(parameter: Tensor, dtype: torch.dtype, first: int = 0) -> Tensor:
    """Return a weight's columns from `first` on in a low type, as a copy that is held unless derivatives are recorded.

    A model in 16 bits thus needs half as much memory again for its weights, and saves to cast each of them in each
    pass. Where gradients go to the weight, in `torch.compile` and in the capture of a CUDA graph, it is cast anew.

    Args:
        parameter: [out, in].
        dtype: float16 or bfloat16.
        first: number of columns to leave out.

    Returns:
        [out, in - first].
    """
    recorded = torch.is_grad_enabled() and parameter.requires_grad
    traced = torch.compiler.is_compiling() or (parameter.is_cuda and torch.cuda.is_current_stream_capturing())
    if recorded and not traced:
        forget([parameter])  # somebody trains it
    if recorded or traced:
        return parameter[:, first:].to(dtype)

    def make() -> Tensor:
        with torch.inference_mode(mode=False):  # it may be used later where derivatives are recorded
            return parameter.detach()[:, first:].to(dtype)

    return derived(parameter, (dtype, first), make)
