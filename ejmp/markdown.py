"""Tables in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Columns = Sequence[tuple[str, str]]
"""Columns as pairs of a title and a format of the cell, in the fields of a row, such as "{ms[median]:.0f}"."""


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """Return a table.

    Args:
        titles: titles of the columns.
        rows: cells of each row, as many as there are titles.
        numbers: whether all columns but the first are aligned to the right.
    """
    rule = ["---", *["---:" if numbers else "---"] * (len(titles) - 1)]
    return "\n".join(
        "|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in (titles, rule, *rows)
    )


def format_rows(columns: Columns, rows: Iterable[Mapping[str, Any]], *, numbers: bool = False) -> str:
    """Return a table of rows that have fields; other arguments as for `markdown_table`."""
    cells = ([cell.format(**row) for _, cell in columns] for row in rows)
    return markdown_table([title for title, _ in columns], cells, numbers=numbers)
