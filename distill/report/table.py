"""Rows flow in, a table for the terminal flows out, with nothing in it but text."""

import os
import re
import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNCUT = 400  # columns of a file or a pipe
_NUMBER = re.compile(r"[-–\d.,]+(e[-+]\d+)?[%*]?( [kMGT]?B)?")


def terminal() -> Console:
    """Standard output; where it is a file or a pipe, so wide that nothing is cut, unless COLUMNS says how wide."""
    fixed = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if fixed else _UNCUT)


def plain_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Cells are plain text: what a cache holds is neither read as markup nor sent to the terminal as commands.

    Columns of numbers stand at the right.
    """
    cells = [[_printable(str(cell)) for cell in row] for row in rows]
    table = Table(
        title=Text(_printable(title), style="bold") if title else None,
        title_justify="left",
        show_header=any(header),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name, column in zip(header, zip(*cells, strict=True) if cells else [()] * len(header), strict=True):
        numbers = any(column) and all(_NUMBER.fullmatch(cell) for cell in column if cell)
        table.add_column(Text(name), justify="right" if numbers else "left")
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() or character == "\n" else "�" for character in text)
