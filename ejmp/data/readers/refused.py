"""A source without the structures that are refused: counted first, because a part's number of structures is fixed."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from ejmp.data.readers.files import SourceError
from ejmp.data.readers.format import Format, Part
from ejmp.data.readers.validation import Refused, current_checks, leaving_out
from ejmp.graph.structure import Structure

MOST_LISTED = 20
"""Most structures whose reasons are listed on stderr."""


def without_refused(reader: Format) -> Format:
    """Return a format that leaves out refused structures, and what follows a place where a part cannot be read.

    Listing its parts reads the whole source, and says on stderr what is left out.
    """

    def good(path: Path, part: Part) -> Iterator[Structure]:
        with leaving_out():
            for structure in reader.read(path, part):
                if not isinstance(structure, Refused):
                    yield structure

    def parts(path: Path) -> Sequence[Part]:
        listed = reader.parts(path)
        found = [replace(part, count=sum(1 for _ in good(path, part))) for part in listed]
        left_out = sum(part.count for part in listed) - sum(part.count for part in found)
        if current_checks().skipped:
            reasons = list(current_checks().skipped)
            more = f"and {len(reasons) - MOST_LISTED} more reasons\n" * (len(reasons) > MOST_LISTED)
            lines = "".join(f"left out: {reason}\n" for reason in reasons[:MOST_LISTED])
            sys.stderr.write(f"{lines}{more}{path}: {left_out} structures of its readable parts are left out\n")
        if not any(part.count for part in found):
            raise SourceError(path, "", "no structure of it can be read")
        return [part for part in found if part.count]

    def read(path: Path, part: Part) -> Iterator[Structure]:
        return islice(good(path, part), part.count)

    return Format(parts=parts, read=read)
