"""The formats by name, and `read`, which yields the structures of a source in any of them."""

from collections.abc import Iterator
from pathlib import Path

from ejmp.data.readers.ase_files import ASE
from ejmp.data.readers.format import Format
from ejmp.data.readers.hdf5 import ANI1X, SPICE, TRANSITION1X
from ejmp.data.readers.md import MD22, RMD17
from ejmp.data.readers.oc import OC20, OC22
from ejmp.data.readers.oc_text import OC20_TEXT
from ejmp.data.readers.qm9 import QM9
from ejmp.data.readers.qmof import QMOF
from ejmp.data.readers.validation import Refused
from ejmp.graph.structure import Structure

FORMATS: dict[str, Format] = {
    "oc20": OC20,
    "oc22": OC22,
    "oc20_text": OC20_TEXT,
    "ani1x": ANI1X,
    "transition1x": TRANSITION1X,
    "spice": SPICE,
    "rmd17": RMD17,
    "md22": MD22,
    "qm9": QM9,
    "qmof": QMOF,
    "ase": ASE,
}
"""Every format ejmp reads, by its name; `ejmp.data.read.FORMATS` is the same mapping."""


def find_format(name: str) -> Format:
    """Return the format of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def read(path: str | Path, *, format: str) -> Iterator[Structure]:  # noqa: A002, the word that convert has for it
    """Yield the structures of a dataset in its original form, in eV and A, with ids unique in it.

    Args:
        path: a file or a folder, as the format's module in ejmp.data.readers says.
        format: a name of `read.FORMATS`.

    Raises:
        ValueError: if there is no such format, or the source is damaged or not of that format; it names the file.
        FileNotFoundError: if there is nothing at the path.
    """
    chosen = find_format(format)
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    every = (structure for part in chosen.parts(source) for structure in chosen.read(source, part))
    return (structure for structure in every if not isinstance(structure, Refused))


read.FORMATS = FORMATS  # pyright: ignore[reportFunctionMemberAccess]
