"""A cached row flows in, what the teacher expected at each of its tokens flows out, in words for people.

A trained student's expectations may stand beside it, see ``student.spotlight``; ``report.tokens`` puts both on a page.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from distill.cache.reader import CacheReader
from distill.records import SequenceTargets, Targets

NUM_CHOICES = 10
_LEAD = 4  # a window begins with at most this part of tokens that do not train, 1 / _LEAD
_STRICT = ConfigDict(extra="forbid")
Decode = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Expected:
    """A distribution of the next token at T=1: its likeliest tokens, the likeliest first, and the mass of all others.

    ``tail`` is the part of ``rest`` whose ids the cache does not name: what lies outside the teacher's top-k.
    """

    choices: tuple[tuple[int, str, float], ...]  # id, text, probability
    rest: float
    tail: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class TokenView:
    """A token, and what was expected in its place by those who had read all before it."""

    id: int
    text: str
    trained: bool
    teacher: Expected | None = None  # None: nothing stands before it
    student: Expected | None = None


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class SequenceView:
    """Some tokens in a row of a cached sequence; ``before`` counts those that stand in front of them."""

    domain: str
    source: str
    before: int
    tokens: tuple[TokenView, ...]


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Record:
    """``RUN/stage<N>/tokens.json``: views with both expectations, after some optimizer step of the stage."""

    step: int
    sequences: tuple[SequenceView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Tokens ``start`` to ``stop`` of a sequence, the latter not included."""

    start: int
    stop: int

    @property
    def positions(self) -> NDArray[np.int64]:
        """The targets that describe these tokens; the sequence's first token has none."""
        return np.arange(max(self.start - 1, 0), self.stop - 1)


def held_out_rows(reader: CacheReader, domain: str) -> Iterator[SequenceTargets]:
    """The held-out rows of a domain that have a trained token, in the cache's order."""
    for commit in reader.units(domain):
        if commit.num_rows.eval:
            yield from (row for row in reader.sequences(commit, "eval") if row.prompt.loss_mask.any())


def window_of(row: SequenceTargets, *, num_tokens: int, max_length: int | None = None) -> Window:
    """At most ``num_tokens`` tokens around the first trained one, within the first ``max_length`` of the sequence."""
    length = len(row.prompt.input_ids[:max_length])
    trained = np.flatnonzero(row.prompt.loss_mask[: length - 1])
    first = int(trained[0]) + 1 if len(trained) else 1
    start = max(0, min(first - num_tokens // _LEAD, length - num_tokens))
    return Window(start=start, stop=min(length, start + num_tokens))


def view_of(row: SequenceTargets, window: Window, decode: Decode) -> SequenceView:
    """What the teacher expected at the tokens of a window; ``decode`` turns ids into text."""
    prompt, targets = row.prompt, row.targets
    tokens = [
        TokenView(
            id=int(prompt.input_ids[place]),
            text=decode([int(prompt.input_ids[place])]),
            trained=place > 0 and bool(prompt.loss_mask[place - 1]),
            teacher=_teacher(targets, place - 1, decode) if place else None,
        )
        for place in range(window.start, window.stop)
    ]
    return SequenceView(domain=prompt.domain, source=prompt.source, before=window.start, tokens=tuple(tokens))


def with_student(view: SequenceView, expected: list[Expected]) -> SequenceView:
    """The view with a student's expectations, one for each token but a sequence's first."""
    own = iter(expected)
    tokens = (token if token.teacher is None else replace(token, student=next(own)) for token in view.tokens)
    return replace(view, tokens=tuple(tokens))


def expected_of(ids: Any, probabilities: Any, decode: Decode, *, tail: float | None = None) -> Expected:
    """A distribution for people, in four digits, by its likeliest ids; what they lack of 1 is the rest."""
    choices = tuple(
        (int(token_id), decode([int(token_id)]), _rounded(float(probability)))
        for token_id, probability in zip(ids, probabilities, strict=True)
    )
    rest = _rounded(max(0.0, 1.0 - float(np.sum(probabilities))))
    return Expected(choices=choices, rest=rest, tail=None if tail is None else min(_rounded(tail), rest))


def _teacher(targets: Targets, position: int, decode: Decode) -> Expected:
    probabilities_K = np.exp(targets.topk_logprobs[position].astype(np.float64))
    tail = max(0.0, 1.0 - float(probabilities_K.sum()))
    return expected_of(targets.topk_ids[position, :NUM_CHOICES], probabilities_K[:NUM_CHOICES], decode, tail=tail)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
