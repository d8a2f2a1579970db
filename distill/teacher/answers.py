"""Questions flow in, sequences with the teacher's own answers and their targets flow out: ``cache-teacher --generate``.

The targets are taken while the answer is written; no second pass reads it. The same way held-out prompts become
``samples.parquet``.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from distill.cache.samples import Sample
from distill.config import CacheConfig
from distill.data.prompts import PromptMaker, prompts_of
from distill.data.sources import Source
from distill.errors import UsageError
from distill.records import Prompt, Question, SequenceTargets, Targets
from distill.teacher.engine import Engine, Writing

_SCANNED = 4096  # rows of a source that are looked at for held-out prompts
_AT_ONCE = 64  # questions that calibration asks together


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """A teacher that answers: to ``distill.teacher.fill`` an engine whose questions come back as whole rows."""

    engine: Engine
    writing: Writing
    maker: PromptMaker

    def capture(self, items: Iterable[Prompt | Question]) -> Iterator[tuple[int, Targets | SequenceTargets]]:
        """(ordinal, targets of a prompt or row of a question), in any order."""
        asked: dict[int, Question] = {}
        for ordinal, answer, targets in self.engine.answer(_noted(items, asked), self.writing):
            question = asked.pop(ordinal, None)
            if question is None:
                yield ordinal, targets
            else:
                yield ordinal, SequenceTargets(prompt=self.maker.answered(question, answer), targets=targets)

    def sequences(self, questions: Iterable[Question], *, wanted: int) -> list[Prompt]:
        """Answered questions, until they hold ``wanted`` trained targets or there are no more."""
        answered: list[Prompt] = []
        source = iter(questions)
        while sum(int(p.loss_mask.sum()) for p in answered) < wanted and (asked := list(islice(source, _AT_ONCE))):
            rows = sorted(self.capture(asked), key=lambda row: row[0])
            answered += [row.prompt for _, row in rows if isinstance(row, SequenceTargets)]
        return answered


def _noted(items: Iterable[Prompt | Question], asked: dict[int, Question]) -> Iterator[Prompt | Question]:
    for ordinal, item in enumerate(items):
        if isinstance(item, Question):
            asked[ordinal] = item
        yield item


def stop_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's, and those of the teacher's ``generation_config.json``.

    Raises UsageError when that file is damaged.
    """
    path = folder / "generation_config.json"
    try:
        ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        found = {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None}
        return tuple(sorted(int(number) for number in found))
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"cannot read {path}: {error}. Download the teacher again, whole.") from error


def write_samples(
    engine: Engine, sources: Sequence[Source], *, config: CacheConfig, maker: PromptMaker, stops: tuple[int, ...]
) -> list[Sample]:
    """The teacher's greedy answers to the first held-out prompts of each domain."""
    questions = [
        question
        for domain in dict.fromkeys(source.domain for source in sources)
        for question in islice(_held_out([s for s in sources if s.domain == domain], maker), config.samples.num)
    ]
    writing = Writing(
        temperature=0.0,
        top_p=1.0,
        max_tokens=config.samples.max_tokens,
        max_length=config.max_length,
        stop_ids=stops,
        seed=config.seed,
    )
    answers = {ordinal: answer for ordinal, answer, _ in engine.answer(questions, writing)}
    return [
        Sample(
            prompt_id=question.prompt_id,
            domain=question.domain,
            prompt=question.prompt,
            input_ids=tuple(question.input_ids.tolist()),
            response=maker.words(answers[ordinal]),
            response_ids=tuple(answers[ordinal].tolist()),
        )
        for ordinal, question in enumerate(questions)
    ]


def _held_out(sources: Sequence[Source], maker: PromptMaker) -> Iterator[Question]:
    """Different held-out prompts in the order of the data."""
    seen: set[str] = set()
    for source in sources:
        for item in prompts_of(source, start=0, stop=min(len(source), _SCANNED), maker=maker):
            question = maker.question(item) if isinstance(item, Prompt) else item
            if isinstance(question, Question) and question.split == "eval" and question.prompt_id not in seen:
                seen.add(question.prompt_id)
                yield question
