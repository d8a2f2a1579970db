"""Words, tables and charts flow in, one HTML page that needs nothing else flows out.

The page's policy forbids a browser to load anything and to run anything but the one script of the project's own, named
by its hash, which a page has that shows tokens: what a cache says is text and stays text.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from distill.report.charts import Chart
from distill.report.viewer import View, payload, views_html

_NUMBER = re.compile(r"[-\d.,e+]+%?|nan")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_SCRIPT_SAFE = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}  # nothing in JSON ends its element


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """``pairs``: two columns of names and values, without a header; ``texts``: cells of many words."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    header: tuple[str, ...] = ()
    pairs: bool = False
    texts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a report says, in order. ``facts`` are (number, what it counts), ``groups`` charts under their headings."""

    title: str
    subtitle: str
    facts: tuple[tuple[str, str], ...]
    summary: Table
    groups: tuple[tuple[str, tuple[Chart, ...]], ...]
    views: tuple[View, ...] = ()
    tables: tuple[Table, ...]
    foot: str

    @property
    def charts(self) -> tuple[Chart, ...]:
        """Those of all groups."""
        return tuple(chart for _, charts in self.groups for chart in charts)


def to_html(page: Page) -> str:
    """The whole document."""
    css = _packaged("page.css")
    policy, scripts = _scripts(page)
    facts = "".join(f"<div><b>{_text(number)}</b><span>{_text(what)}</span></div>" for number, what in page.facts)
    groups = "\n".join(
        f'<h2>{_text(title)}</h2>\n<div class="charts">\n{"".join(map(_figure, charts))}</div>'
        for title, charts in page.groups
        if charts
    )
    tables = "\n".join(map(_section, page.tables))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{_text(page.title)}</title>
<link rel="icon" href="data:,">
<style>
{css}</style>
</head>
<body>
<header><h1>{_text(page.title)}</h1><p class="quiet">{_text(page.subtitle)}</p></header>
<div class="facts">{facts}</div>
{_section(page.summary)}
{groups}
{views_html(page.views)}
{tables}
<footer>{_text(page.foot)}</footer>
{scripts}</body>
</html>
"""


def _scripts(page: Page) -> tuple[str, str]:
    """The policy and the scripts of a page: none where it shows no tokens."""
    if not page.views:
        return _POLICY, ""
    script = _packaged("tokens.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(payload(page.views), separators=(",", ":")).translate(_SCRIPT_SAFE)
    elements = f'<script type="application/json" id="token-data">{data}</script>\n<script>{script}</script>\n'
    return f"{_POLICY}; script-src 'sha256-{digest}'", elements


def _packaged(name: str) -> str:
    return files("distill.report").joinpath(name).read_text(encoding="utf-8")


def _figure(chart: Chart) -> str:
    label = html.escape(chart.title, quote=True)
    drawing = chart.drawing.svg().replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    numbers = ""
    if chart.rows:
        numbers = (
            f'<details><summary>Numbers</summary><div class="scroll">{_table(chart.header, chart.rows)}</div></details>'
        )
    words = f"<figcaption><b>{_text(chart.title)}</b><p>{_text(chart.caption)}</p></figcaption>"
    return f"<figure>{words}\n{drawing}\n{numbers}</figure>\n"


def _section(table: Table) -> str:
    if not table.rows:
        return ""
    name = "pairs" if table.pairs else "texts" if table.texts else ""
    rows = _table(table.header, table.rows, kind=f' class="{name}"' if name else "")
    return f'<h2>{_text(table.title)}</h2><div class="scroll">{rows}</div>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "") -> str:
    columns = zip(*rows, strict=True)
    kinds = [_kind(next((cell for cell in column if cell), "")) for column in columns]
    names = "".join(f"<th{kind}>{_text(name)}</th>" for name, kind in zip(header, kinds, strict=False))
    head = f"<tr>{names}</tr>" if header else ""
    body = "".join("<tr>" + "".join(f"<td{_kind(cell)}>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table{kind}>{head}{body}</table>"


def _kind(cell: str) -> str:
    return ' class="number"' if _NUMBER.fullmatch(cell) else ""


def _text(value: str) -> str:
    return html.escape(value, quote=True)
