"""Words, tables and charts flow in, one HTML page that needs nothing else flows out.

The page holds no script, and its policy forbids a browser to load anything: what a cache says is text and stays text.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from distill.report.charts import Chart

_NUMBER = re.compile(r"[-\d.,e+]+%?|nan")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """``pairs``: two columns of names and values, without a header."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    header: tuple[str, ...] = ()
    pairs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a report says, in order. ``facts`` are (number, what it counts)."""

    title: str
    subtitle: str
    facts: tuple[tuple[str, str], ...]
    charts: tuple[Chart, ...]
    tables: tuple[Table, ...]
    foot: str


def to_html(page: Page) -> str:
    """The whole document."""
    css = files("distill.report").joinpath("page.css").read_text(encoding="utf-8")
    facts = "".join(f"<div><b>{_text(number)}</b><span>{_text(what)}</span></div>" for number, what in page.facts)
    charts = "\n".join(_figure(chart) for chart in page.charts)
    tables = "\n".join(
        f'<h2>{_text(table.title)}</h2><div class="scroll">{_table(table.header, table.rows, pairs=table.pairs)}</div>'
        for table in page.tables
        if table.rows
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{_text(page.title)}</title>
<link rel="icon" href="data:,">
<style>
{css}</style>
</head>
<body>
<header><h1>{_text(page.title)}</h1><p class="quiet">{_text(page.subtitle)}</p></header>
<div class="facts">{facts}</div>
<h2>Charts</h2>
<div class="charts">
{charts}
</div>
{tables}
<footer>{_text(page.foot)}</footer>
</body>
</html>
"""


def _figure(chart: Chart) -> str:
    label = html.escape(chart.title, quote=True)
    drawing = chart.svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    numbers = ""
    if chart.rows:
        numbers = (
            f'<details><summary>Numbers</summary><div class="scroll">{_table(chart.header, chart.rows)}</div></details>'
        )
    words = f"<figcaption><b>{_text(chart.title)}</b><p>{_text(chart.caption)}</p></figcaption>"
    return f"<figure>{words}\n{drawing}\n{numbers}</figure>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, pairs: bool = False) -> str:
    columns = zip(*rows, strict=True)
    kinds = [_kind(next((cell for cell in column if cell), "")) for column in columns]
    names = "".join(f"<th{kind}>{_text(name)}</th>" for name, kind in zip(header, kinds, strict=False))
    head = f"<tr>{names}</tr>" if header else ""
    body = "".join("<tr>" + "".join(f"<td{_kind(cell)}>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="pairs"' if pairs else ""
    return f"<table{kind}>{head}{body}</table>"


def _kind(cell: str) -> str:
    return ' class="number"' if _NUMBER.fullmatch(cell) else ""


def _text(value: str) -> str:
    return html.escape(value, quote=True)
