"""The formats by name, and `read`, which yields the structures of a source in any of them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ejmp.data.readers.ase_files import ASE
from ejmp.data.readers.files import SourceError, unchanged, versions
from ejmp.data.readers.format import Format, Part
from ejmp.data.readers.hdf5 import ANI1X, SPICE, TRANSITION1X
from ejmp.data.readers.md import MD22, RMD17
from ejmp.data.readers.oc import OC20, OC22
from ejmp.data.readers.oc_text import OC20_TEXT
from ejmp.data.readers.options import ReadOptions, Survey
from ejmp.data.readers.qm9 import QM9
from ejmp.data.readers.qmof import QMOF
from ejmp.data.readers.recognise import recognise
from ejmp.data.readers.tags import infer_tags
from ejmp.data.readers.validation import Refused, validate
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


def configured(found: Format, name: str, options: ReadOptions, survey: Survey) -> Format:
    """Return a format as options want it.

    Args:
        found: the format.
        name: its name, for messages.
        options: which arrays are labels, their units, what tags mean.
        survey: where it is reported what became of each array.

    Raises:
        ValueError: if options choose labels or units of a format whose labels are fixed.
    """
    if found.configure is not None:
        return found.configure(options, survey)
    if options.named_labels:
        able = ", ".join(name for name, other in FORMATS.items() if other.configure is not None)
        flag = "--" + options.named_labels[0].replace("targets", "target").replace("_", "-")
        raise ValueError(f"{flag}: the format {name} has labels and units of its own; those that take it are {able}")
    if options.tags in (None, "oc20"):
        return found

    def retagged(path: Path, part: Part) -> Iterator[Structure]:
        for structure in found.read(path, part):
            try:
                tags = infer_tags(structure.numbers, structure.fixed) if options.tags == "infer" else None
            except ValueError as error:
                raise SourceError(path, structure.id, str(error)) from error
            yield replace(structure, tags=tags)

    return replace(found, read=retagged)


def checked(found: Format) -> Format:
    """Return a format of somebody's own with the checks that the structures of every format of ejmp pass."""

    def read(path: Path, part: Part) -> Iterator[Structure]:
        for number, structure in enumerate(found.read(path, part)):
            yield validate(structure, path, f"{part.name}, structure {number} ({structure.id})")

    return replace(found, read=read)


def recognised(source: Path, survey: Survey) -> str:
    """Return the name of a source's format by its contents, and say which it is."""
    found = recognise(source)
    survey.say(f"{source}: taken for {found.format}: {found.reason}")
    return found.format


def read(
    path: str | Path,
    *,
    format: str | None = None,  # noqa: A002, the word that convert has for it
    options: ReadOptions | None = None,
) -> Iterator[Structure]:
    """Yield the structures of a dataset in its original form, in eV and A, with ids unique in it.

    Args:
        path: a file or a folder, as the format's module in ejmp.data.readers says.
        format: a name of `read.FORMATS`; None: as the contents say, which is said on stderr.
        options: which arrays are its labels, their units, what tags mean; None: as the format's reader knows.

    Raises:
        ValueError: if there is no such format, or the source is damaged or not of that format; it names the file.
        FileNotFoundError: if there is nothing at the path.
    """
    source, survey = Path(path), Survey()
    found = None if format is None else find_format(format)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if found is None:
        format = recognised(source, survey)  # noqa: A001
        found = find_format(format)
    chosen = configured(found, str(format), options or ReadOptions(), survey)
    every = (structure for part in chosen.parts(source) for structure in chosen.read(source, part))
    return (structure for structure in unchanged(versions(source), every) if not isinstance(structure, Refused))


read.FORMATS = FORMATS  # pyright: ignore[reportFunctionMemberAccess]
