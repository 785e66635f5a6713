"""The flags by which every command that reads a source is told what its arrays are; needs no torch."""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Literal, Self

from ejmp.data.readers.options import ReadOptions
from ejmp.data.readers.units import ENERGY_UNITS, LENGTH_UNITS
from ejmp.limits import Limits, limiting, parse_limits


@dataclass(frozen=True, kw_only=True)
class SourceRequest:
    """What a command is told about a source."""

    options: ReadOptions
    """Which arrays are labels, their units, what tags mean, and what becomes of what cannot be read."""
    allow_close: bool
    """Whether atoms may be on top of each other."""
    occupancy: Literal["refuse", "ignore"]
    """What becomes of a CIF with partly occupied or shared sites."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """Limits on what the source may ask for, by their names in `ejmp.limits.Limits`."""

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> Self:
        """Return what the parsed flags state.

        Raises:
            ValueError: naming the flag that is impossible.
        """
        given = getattr(flags, "target_keys", [])
        pairs = [text.rpartition("=") if "=" in text else (text, "", text) for text in given]
        targets = {key: name for key, _, name in pairs}
        if len(targets) < len(pairs):
            raise ValueError(f"--target: expected each KEY once, got {given}")
        names = ("energy_key", "forces_key", "unit_energy", "unit_length", "tags", "on_error")
        options = ReadOptions(targets=targets, **{name: getattr(flags, name) for name in names})
        limits = parse_limits(flags.limit)
        return cls(options=options, allow_close=flags.allow_close, occupancy=flags.occupancy, limits=limits)

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Check what is read in the `with` block as the flags say."""
        from ejmp.data.readers.validation import checking  # noqa: PLC0415 - it needs torch

        strictly = checking(allow_close=self.allow_close, occupancy=self.occupancy, on_error=self.options.on_error)
        with strictly, limiting(**self.limits):
            yield


def add_source_flags(parser: argparse.ArgumentParser, title: str, *, targets: bool = True) -> None:
    """Add the flags that choose labels, units and tags, and what becomes of structures that are refused.

    Args:
        parser: the parser of a command.
        title: title of the group of flags.
        targets: whether `--target` chooses labels of the whole structure; a command may have that flag for something
            else, and all single numbers are read.
    """
    add = parser.add_argument_group(title).add_argument
    add("--energy-key", metavar="KEY", help="Array KEY is the total energy; none leaves energies out.")
    add(
        "--forces-key",
        metavar="KEY",
        help="Array KEY of shape [n, 3] is the forces, or its columns are, as fx,fy,fz; none leaves forces out.",
    )
    if targets:
        add(
            "--target",
            dest="target_keys",
            metavar="KEY[=NAME]",
            nargs="+",
            default=[],
            help="Each KEY is a label of the whole structure, called NAME; without this flag all single numbers are.",
        )
    add(
        "--unit-energy",
        choices=ENERGY_UNITS,
        help="The energy is in this unit, and forces are in it per length (default: as the file or the format says).",
    )
    add(
        "--unit-length",
        choices=LENGTH_UNITS,
        help="Positions and cell are in this unit (default: as the file or the format says).",
    )
    add(
        "--tags",
        choices=("oc20", "none", "infer"),
        help="Tags are OC20's 0 bulk, 1 surface, 2 adsorbate; or are left out; or are inferred from which atoms are "
        "held and from their elements (default: oc20 for the formats of OC20 and OC22, none for all others).",
    )
    add(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="An unreadable file of a folder, or a structure that cannot be, ends the command; or it is left out and "
        "listed (default: raise).",
    )
    add_allow_close(parser)
    add(
        "--occupancy",
        choices=("refuse", "ignore"),
        default="refuse",
        help="Of a CIF with partly occupied or shared sites: refuse it, or take each site's main species as whole.",
    )
    add_limit(parser)


def add_allow_close(parser: argparse.ArgumentParser) -> None:
    """Add the flag that lets atoms be on top of each other."""
    text = "let atoms be on top of each other: nearer than a quarter of the sum of their covalent radii, or than 0.31 A"
    parser.add_argument("--allow-close", action="store_true", help=text)


def add_limit(parser: argparse.ArgumentParser) -> None:
    """Add the flag that raises limits on what a file may ask for."""
    names = ", ".join(field.name for field in fields(Limits))
    text = (
        f"raise a limit on what files may ask for, which an error names; the limits are {names} (see docs/security.md)"
    )
    parser.add_argument("--limit", metavar="NAME=VALUE", nargs="+", default=[], help=text)
