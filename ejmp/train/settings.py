"""A command-line flag for each field of `TrainConfig`; needs no torch, so that --help is quick."""

import argparse
import dataclasses
import typing
from types import UnionType
from typing import Any, Literal

from ejmp.train.config import ALTERNATIVES, TrainConfig


def add_settings(parser: argparse.ArgumentParser, defaults: TrainConfig, demo: TrainConfig) -> None:
    """Add a flag for each training setting, for `read_settings` to read.

    Args:
        parser: to add to.
        defaults: shown in the help.
        demo: defaults of a run on the demo data, shown where they differ.
    """
    group = parser.add_argument_group("settings", "ejmp.train.config.TrainConfig says what each is")
    for name, kind in typing.get_type_hints(TrainConfig).items():
        usual, small = getattr(defaults, name), getattr(demo, name)
        text = f"default: {usual}" if usual == small else f"default: {usual}; for the demo data {small}"
        group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **_options_of(kind))


def read_settings(options: argparse.Namespace, defaults: TrainConfig) -> TrainConfig:
    """Return the defaults changed by what was given on the command line.

    What was given in steps takes the place of a default in epochs or structures, and the other way round.

    Raises:
        ValueError: if a setting is out of range, or two that were given say the same in different units.
    """
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(options).items() if name in names}
    settings = defaults.to_dict()
    for alternatives in ALTERNATIVES:
        chosen = [name for name in alternatives if name in given]
        if len(chosen) > 1:
            flags = " and ".join(f"--{name.replace('_', '-')} {given[name]}" for name in chosen)
            raise ValueError(f"{flags} exclude each other; expected one of them")
        if chosen:
            settings |= dict.fromkeys(alternatives[1:])
    return TrainConfig.from_dict({**settings, **given})


def _options_of(kind: Any) -> dict[str, Any]:
    """Return argparse's options for a type: int, float, one of either or "none", a choice, a pair."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return {"choices": choices, "type": type(choices[0])}
    if typing.get_origin(kind) is tuple:
        return {"nargs": 2, "type": float, "metavar": ("B1", "B2")}
    if isinstance(kind, UnionType):
        number = next(t for t in typing.get_args(kind) if t is not type(None))
        return {"type": lambda text: None if text == "none" else number(text), "metavar": f"{number.__name__}|none"}
    return {"type": kind, "metavar": kind.__name__}
