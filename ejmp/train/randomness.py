"""The state of all random number generators a process uses, ready for JSON."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the state of the generators of Python, numpy and torch, on the CPU and the current CUDA device."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - other libraries draw from it
    state = {
        "python": [version, np.array(words, "<u4").tobytes().hex(), gauss],
        "numpy": [kind, np.asarray(keys, "<u4").tobytes().hex(), position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set all generators to the state that `random_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(np.frombuffer(bytes.fromhex(words), "<u4").tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.frombuffer(bytes.fromhex(keys), "<u4"), *rest))  # noqa: NPY002
    torch.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(digits: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8)


def seed_all(*numbers: int) -> None:
    """Seed all generators from a sequence of numbers; another sequence gives unrelated random numbers."""
    seeds = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]))  # noqa: NPY002
    torch.manual_seed(int(seeds[2]))
