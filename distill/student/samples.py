"""Prompts of a cache flow in, a student's greedy answers beside the teacher's flow out, for people to read.

    samples.parquet, or held-out rows -> Question -> the student's own words -> Answer

The teacher is not needed: its answers are in the cache. Nothing is drawn at random, so training is not disturbed.
``S`` tokens of a prompt, ``D`` the student's hidden size, ``V`` real vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from distill.cache.reader import CacheReader
from distill.cache.samples import Sample, read_samples
from distill.cache.views import held_out_rows
from distill.config import TrainConfig
from distill.records import SequenceTargets
from distill.student.losses.fused import chunks_of_logits
from distill.student.model import Student, causal_of

Author = Literal["teacher", "data"]
_TEXT_PROMPT = 32  # tokens of a plain text that stand in as its prompt
_SHOWN = 160  # characters of a cell on the console


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt with its reference answer, which the teacher wrote or the data brought."""

    sample: Sample
    author: Author


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a student says to a prompt, and the reference. ``num_same`` of its first tokens are those of the latter."""

    domain: str
    prompt_id: str
    prompt: str
    student: str
    reference: str
    author: Author  # of the reference
    num_tokens: int
    num_same: int


class Interview:
    """Asks a student the same few questions each time."""

    def __init__(self, student: Student, tokenizer: Any, questions: Sequence[Question], *, num_tokens: int) -> None:
        self._student, self._tokenizer, self._questions = student, tokenizer, questions
        self._num_tokens = num_tokens

    @staticmethod
    def of(
        config: TrainConfig, student: Student, tokenizer: Any, *, reader: CacheReader, domains: Sequence[str]
    ) -> "Interview":
        """``config.samples`` questions of each domain."""
        questions = questions_of(reader, domains, num=config.samples, tokenizer=tokenizer)
        return Interview(student, tokenizer, questions, num_tokens=config.sample_tokens)

    def __call__(self) -> list[Answer]:
        """The student's answers now. Where its weights are spread over processes, each of these must ask."""
        model = self._student.model
        was_training = model.training
        model.eval()
        stops = _stop_ids(model, self._tokenizer)
        answers = []
        for question in self._questions:
            ids = greedy(self._student, question.sample.input_ids, num_tokens=self._num_tokens, stop_ids=stops)
            answers.append(self._answer(question, ids))
        model.train(was_training)
        return answers

    def _answer(self, question: Question, ids: Sequence[int]) -> Answer:
        sample = question.sample
        pairs = zip(ids, sample.response_ids, strict=False)
        return Answer(
            domain=sample.domain,
            prompt_id=sample.prompt_id,
            prompt=sample.prompt,
            student=str(self._tokenizer.decode(ids, skip_special_tokens=True)),
            reference=sample.response,
            author=question.author,
            num_tokens=len(ids),
            num_same=sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)),
        )


def questions_of(reader: CacheReader, domains: Sequence[str], *, num: int, tokenizer: Any) -> list[Question]:
    """The first ``num`` samples of each domain; of one without samples, its first held-out rows."""
    if num == 0:
        return []
    questions: list[Question] = []
    samples = read_samples(reader)
    author: Author = "data" if reader.identity.generation is None else "teacher"
    for domain in domains:
        own = [Question(sample=sample, author="teacher") for sample in samples if sample.domain == domain]
        if not own:
            rows = islice(held_out_rows(reader, domain), num)
            own = [Question(sample=sample_of(row, tokenizer), author=author) for row in rows]
        questions += own[:num]
    return questions


def sample_of(row: SequenceTargets, tokenizer: Any) -> Sample:
    """A cached row as a prompt and its last answer; a plain text is cut in two."""
    prompt = row.prompt
    trained = np.flatnonzero(prompt.loss_mask)
    gaps = np.flatnonzero(np.diff(trained) > 1)
    first = int(trained[gaps[-1] + 1 if len(gaps) else 0]) + 1  # target t is the token t + 1
    if first == 1:
        first = max(1, min(_TEXT_PROMPT, len(prompt.input_ids) // 2))
    input_ids = tuple(prompt.input_ids[:first].tolist())
    response_ids = tuple(prompt.input_ids[first : int(trained[-1]) + 2].tolist())
    is_text = not prompt.prompt
    return Sample(
        prompt_id=prompt.prompt_id,
        domain=prompt.domain,
        prompt=str(tokenizer.decode(input_ids, skip_special_tokens=True)) if is_text else prompt.prompt,
        input_ids=input_ids,
        response=str(tokenizer.decode(response_ids, skip_special_tokens=True)) if is_text else prompt.response,
        response_ids=response_ids,
    )


@torch.no_grad()
def greedy(
    student: Student, input_ids: Sequence[int], *, num_tokens: int, stop_ids: Collection[int]
) -> tuple[int, ...]:
    """The likeliest next token, again and again, up to ``num_tokens`` or one of ``stop_ids``, which comes too.

    Through the decoder and the head as in training, so that padded rows of the head are never chosen, and nothing that
    a model folder says about generation (penalties, sampling) applies.
    """
    head, decoder = student.head(), causal_of(student.model).base_model
    matrix_VD = head.matrix()
    answer: list[int] = []
    past = None
    ids_1S = torch.tensor([list(input_ids)], device=student.precision.device)
    while len(answer) < num_tokens:
        with student.precision.context():
            output = decoder(input_ids=ids_1S, past_key_values=past, use_cache=True)
        past = output.past_key_values
        last_1D = output.last_hidden_state[0, -1:]
        ((_, _, raw_1V),) = chunks_of_logits(last_1D, head, matrix_VD, chunk=1)
        answer.append(int(head.finish(raw_1V).argmax()))
        if answer[-1] in stop_ids:
            break
        ids_1S = torch.tensor([answer[-1:]], device=student.precision.device)
    return tuple(answer)


def answers_table(answers: Sequence[Answer], title: str) -> Table:
    """Answers for the terminal, each on a few lines and as plain text."""
    table = Table(title=title, title_justify="left", show_lines=True)
    for name in ("domain", "prompt", "student", "reference"):
        table.add_column(name)
    for answer in answers:
        cells = (answer.domain, answer.prompt, answer.student, f"({answer.author}) {answer.reference}")
        table.add_row(*(Text(_short(cell)) for cell in cells))
    return table


def _short(text: str) -> str:
    words = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return words if len(words) <= _SHOWN else words[: _SHOWN - 1] + "…"


def _stop_ids(model: Any, tokenizer: Any) -> set[int]:
    configured = getattr(causal_of(model).generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {number for number in [*listed, tokenizer.eos_token_id] if number is not None}
