"""Sequences with what was expected at each token flow in; a strip of tokens to choose from, and its data, flow out.

All words of a distribution are made here; ``tokens.js`` only puts them beside the token that was chosen.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distill.cache.views import Expected, SequenceView, TokenView

_SYMBOLS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
_HINT = (
    "Choose a token, by mouse or by Tab and the arrow keys, to see what was expected in its place by those who had "
    "read all before it. "
)
_NO_SCRIPT = "This part needs scripts, which are switched off here; the charts and tables do not."


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Sequences under one title, folded unless ``is_open``."""

    title: str
    caption: str
    sequences: tuple[SequenceView, ...]
    is_open: bool = True


def views_html(views: Sequence[View]) -> str:
    """The strips of all views; empty without one."""
    if not views:
        return ""
    number = 0
    parts = []
    for view in views:
        strips = [_strip(sequence, number + offset) for offset, sequence in enumerate(view.sequences)]
        number += len(strips)
        state = " open" if view.is_open else ""
        words = f'<p class="quiet">{_text(view.caption)}</p>'
        parts.append(f"<details{state}><summary>{_text(view.title)}</summary>{words}{''.join(strips)}</details>")
    legend = '<p class="quiet">' + _text(_HINT) + _legend(views) + "</p>"
    views_joined = "\n".join(parts)
    return (
        f'<h2>Token by token</h2>\n<div class="views">{legend}<noscript>{_NO_SCRIPT}</noscript>\n{views_joined}</div>'
    )


def payload(views: Sequence[View]) -> list[Any]:
    """For each sequence, in order of strips, for each token: its text and, for each party, the rows to show."""
    return [[_token(token) for token in sequence.tokens] for view in views for sequence in view.sequences]


def _token(token: TokenView) -> dict[str, Any]:
    state = "trains" if token.trained else "does not train"
    parties = {"Teacher": token.teacher, "Student": token.student}
    tables = {name: _rows(token, expected) for name, expected in parties.items() if expected is not None}
    return {"text": _label(token.text), "state": state, "tables": tables}


def _rows(token: TokenView, expected: Expected) -> list[tuple[str, float, str]]:
    """Label, probability and what it is: the token that ``came``, another one (""), or the ``rest`` of them."""
    rows = [(_label(text), value, "came" if token_id == token.id else "") for token_id, text, value in expected.choices]
    if expected.tail is None:
        return [*rows, ("all other tokens", expected.rest, "rest")]
    between = round(expected.rest - expected.tail, 6)
    kept = [("others in the top-k", between, "rest")] if between > 0 else []
    return [*rows, *kept, ("outside the top-k", expected.tail, "rest")]


def _strip(sequence: SequenceView, number: int) -> str:
    name = f"{sequence.domain} · {sequence.source}"
    before = f'<span class="quiet">({sequence.before:,} tokens before) </span>' if sequence.before else ""
    tokens = "".join(_button(token, place) for place, token in enumerate(sequence.tokens))
    return (
        f'<section class="sequence" data-number="{number}"><h3>{_text(name)}</h3>'
        f'<div class="strip" role="toolbar" aria-label="Tokens of {_text(name)}">{before}{tokens}</div>'
        '<div class="panel" aria-live="polite"></div></section>'
    )


def _button(token: TokenView, place: int) -> str:
    text = _text(_spaced(token.text))
    if token.teacher is None:
        return f'<span class="token">{text}</span>'
    differs = _first(token.student) not in (None, _first(token.teacher))
    kinds = ["token", *(["trained"] if token.trained else []), *(["differs"] if differs else [])]
    mark = ' title="student and teacher differ"' if differs else ""
    return f'<button type="button" class="{" ".join(kinds)}" data-place="{place}"{mark}>{text}</button>'


def _first(expected: Expected | None) -> int | None:
    return expected.choices[0][0] if expected is not None and expected.choices else None


def _legend(views: Sequence[View]) -> str:
    marks = '<span class="token trained">Underlined</span> tokens train.'
    if any(token.student is not None for view in views for item in view.sequences for token in item.tokens):
        marks += " <span class=\"token differs\">Dashed</span>: the student's first choice is not the teacher's."
    return marks


def _label(text: str) -> str:
    """A token in a table: spaces at its ends are seen."""
    inner = text.strip(" ")
    ends = text.partition(inner) if inner else (text, "", "")
    return _spaced("␣" * len(ends[0]) + inner + "␣" * len(ends[2])) or "(empty)"


def _spaced(text: str) -> str:
    """A token in a row of others; what has no glyph gets one."""
    return "".join(_SYMBOLS.get(sign, sign if sign.isprintable() else "�") for sign in text) or "∅"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
