"""Rows flow in, a table for the terminal flows out, with nothing in it but text."""

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text


def plain_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Cells are plain text: what a cache holds is neither read as markup nor sent to the terminal as commands."""
    table = Table(title=Text(_printable(title)), title_justify="left", show_header=any(header))
    for name in header:
        table.add_column(Text(name))
    for row in rows:
        table.add_row(*(Text(_printable(str(cell))) for cell in row))
    return table


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() or character == "\n" else "�" for character in text)
