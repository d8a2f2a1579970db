"""A file of multiple-choice questions and a student flow in, how often its likeliest choice is the right one flows out.

A choice is scored by the log-probability of its words as the assistant's answer, under the chat template of the student
as ``data.chat`` finds the words of a turn. ``B`` sequences, ``S`` padded length, ``N`` scored tokens.
"""

import json
import math
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data.chat import ChatTemplate
from distill.data.columns import RowError
from distill.data.formats import RawRow, reader_of
from distill.errors import DataError, UsageError
from distill.student.losses.ce import cross_entropy
from distill.student.losses.fused import chunks_of_logits
from distill.student.model import Student, causal_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceQuestion:
    """A question, its choices, and the number of the right one."""

    question: str
    choices: tuple[str, ...]  # 2 at least
    answer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceFigures:
    """Shares in [0, 1]. Classes are the places A, B, C …; the means over them leave out those never right nor chosen.

    Precision of a class: the part of its predictions that is right; recall: the part of its questions that is found;
    F1 = 2 right / (predictions + questions); 0 where there is nothing to divide by.
    """

    num_questions: int
    accuracy: float
    precision: float
    recall: float
    f1: float

    @staticmethod
    def of(answers: Sequence[int], chosen: Sequence[int]) -> "ChoiceFigures":
        """Figures of what was chosen where ``answers`` are right; one question at least."""
        right_N, chosen_N = np.asarray(answers), np.asarray(chosen)
        classes = np.unique([right_N, chosen_N])
        hits = np.array([((right_N == c) & (chosen_N == c)).sum() for c in classes])
        asked = np.array([(right_N == c).sum() for c in classes])
        said = np.array([(chosen_N == c).sum() for c in classes])
        return ChoiceFigures(
            num_questions=len(right_N),
            accuracy=float((right_N == chosen_N).mean()),
            precision=float((hits / np.maximum(said, 1)).mean()),
            recall=float((hits / np.maximum(asked, 1)).mean()),
            f1=float((2 * hits / (asked + said)).mean()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceResult:
    """``plain`` chooses by the log-probability of a choice, ``normalised`` by that for each of its characters."""

    plain: ChoiceFigures
    normalised: ChoiceFigures


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A sequence and its targets whose log-probabilities count: target t is the token t + 1."""

    input_ids: tuple[int, ...]
    targets: tuple[int, ...]


def read_questions(path: Path) -> list[ChoiceQuestion]:
    """The questions of a .jsonl, .csv or .parquet file, compressed or not.

    Columns: ``question``; ``choices`` (a list), or ``A``, ``B``, ``C`` … in its place; ``answer``, a letter or a number
    from 0. Raises UsageError for a file of another kind, DataError, with the row, for anything that is no question.
    """
    reader = reader_of(path)
    if reader is None or not path.is_file():
        raise UsageError(f"--choices {path} must be a .jsonl, .csv or .parquet file that exists. Check the path.")
    questions = [_question(row, path) for row in reader(path)]
    if not questions:
        raise DataError(f"{path} holds no question. Check how it was made.")
    return questions


def _question(row: RawRow, path: Path) -> ChoiceQuestion:
    try:
        if row.fields is None:
            raise RowError(row.problem)
        question, choices = row.fields.get("question"), _choices(row.fields)
        if not isinstance(question, str) or not question.strip():
            raise RowError("it has no 'question'")
        return ChoiceQuestion(
            question=question, choices=choices, answer=_answer(row.fields.get("answer"), len(choices))
        )
    except RowError as error:
        raise DataError(
            f"{path}, row {row.row}: {error}. A question has the columns question, choices (a list) or A, B, C …, and "
            "answer (a letter, or a number from 0)."
        ) from error


def _choices(fields: dict[str, Any]) -> tuple[str, ...]:
    listed = fields.get("choices")
    if listed is None:
        listed = [fields[letter] for letter in string.ascii_uppercase if fields.get(letter) not in (None, "")]
        gaps = [letter for letter in string.ascii_uppercase[: len(listed)] if fields.get(letter) in (None, "")]
        if gaps:
            raise RowError(f"its choice {gaps[0]} is missing")
    if not isinstance(listed, list) or len(listed) < 2:
        raise RowError("it has fewer than two choices")
    choices = tuple(_words(choice) for choice in listed)
    if not all(choice.strip() for choice in choices):
        raise RowError("one of its choices is empty")
    return choices


def _words(choice: Any) -> str:
    """Text and finite numbers as they are written; how a null, true or false would be said, nobody wrote down."""
    finite = not isinstance(choice, float) or math.isfinite(choice)
    if isinstance(choice, bool) or not isinstance(choice, str | int | float) or not finite:
        shown = json.dumps(choice, ensure_ascii=False, default=str)
        raise RowError(f"one of its choices is {shown[:80]}, which is neither text nor a number")
    return str(choice)


def _answer(given: Any, num_choices: int) -> int:
    text = str(given).strip().upper()
    number = string.ascii_uppercase.find(text) if len(text) == 1 and text.isalpha() else -1
    if text.isdecimal():
        number = int(text)
    if not 0 <= number < num_choices:
        raise RowError(f"its answer {given!r} names none of its {num_choices} choices")
    return number


def score_choices(
    student: Student, tokenizer: Any, questions: Sequence[ChoiceQuestion], *, token_budget: int, head_chunk: int
) -> ChoiceResult:
    """Ask ``student`` all ``questions``. Raises DataError for what the chat template cannot put into words."""
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
    sequences = [
        scored_choice(question.question, choice, tokenizer, template)
        for question in questions
        for choice in question.choices
    ]
    sums = iter(sums_of_logprobs(student, sequences, token_budget=token_budget, head_chunk=head_chunk))
    plain, normalised = [], []
    for question in questions:
        sums_C = np.array([next(sums) for _ in question.choices])
        plain.append(int(sums_C.argmax()))
        normalised.append(int((sums_C / [len(choice) for choice in question.choices]).argmax()))
    answers = [question.answer for question in questions]
    return ChoiceResult(plain=ChoiceFigures.of(answers, plain), normalised=ChoiceFigures.of(answers, normalised))


def scored_choice(question: str, choice: str, tokenizer: Any, template: ChatTemplate | None) -> Scored:
    """A question with one choice as the answer; without a template, the two with a space between them."""
    if template is None:
        text = f"{question} {choice}"
        start, stop = len(question), len(text)
    else:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": choice}]
        try:
            text, (span,) = template.render(messages)
        except RowError as error:
            raise DataError(
                f"cannot ask '{question[:80]}' with the choice '{choice[:80]}': {error}. Leave the question out, or "
                "evaluate a student whose chat template takes it."
            ) from error
        start, stop = span.start, span.words_end
    encoded = tokenizer(text, add_special_tokens=template is None, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    targets = tuple(index - 1 for index, (first, last) in enumerate(offsets) if index and first < stop and last > start)
    if not targets:
        raise DataError(
            f"no token of '{choice[:80]}' is left to score as the answer to '{question[:80]}'. Leave the question out."
        )
    return Scored(input_ids=tuple(encoded["input_ids"]), targets=targets)


@torch.no_grad()
def sums_of_logprobs(
    student: Student, sequences: Sequence[Scored], *, token_budget: int, head_chunk: int
) -> list[float]:
    """Σ log p of the targets of each sequence, in nats, normalised over the real vocabulary."""
    student.model.eval()
    decoder, head = causal_of(student.model).base_model, student.head()
    matrix_VD = head.matrix()
    sums = np.zeros(len(sequences))
    for numbers in _batches(sequences, token_budget):
        chosen = [sequences[number] for number in numbers]
        ids_BS, mask_BS = (values.to(student.precision.device) for values in _padded(chosen))
        with student.precision.context():
            states_BSD = decoder(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False).last_hidden_state
        rows_N = torch.tensor([row for row, item in enumerate(chosen) for _ in item.targets], device=ids_BS.device)
        targets_N = torch.tensor([target for item in chosen for target in item.targets], device=ids_BS.device)
        states_ND, labels_N = states_BSD[rows_N, targets_N], ids_BS[rows_N, targets_N + 1]
        for start, stop, raw_NV in chunks_of_logits(states_ND, head, matrix_VD, chunk=head_chunk):
            ce_N = cross_entropy(head.finish(raw_NV), labels_N[start:stop]).double().cpu().numpy()
            np.add.at(sums, np.array(numbers)[rows_N[start:stop].cpu().numpy()], -ce_N)
    return [float(value) for value in sums]


def _batches(sequences: Sequence[Scored], token_budget: int) -> Iterator[list[int]]:
    """Numbers of sequences of similar length, padded tokens within the budget, the longest first."""
    batch: list[int] = []
    for number in sorted(range(len(sequences)), key=lambda number: -len(sequences[number].input_ids)):
        if batch and (len(batch) + 1) * len(sequences[batch[0]].input_ids) > token_budget:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _padded(sequences: Sequence[Scored]) -> tuple[Tensor, Tensor]:
    """Ids and mask, [B, S] int64, padded on the right."""
    length = max(len(item.input_ids) for item in sequences)
    ids_BS = torch.zeros(len(sequences), length, dtype=torch.int64)
    mask_BS = torch.zeros_like(ids_BS)
    for row, item in enumerate(sequences):
        ids_BS[row, : len(item.input_ids)] = torch.tensor(item.input_ids)
        mask_BS[row, : len(item.input_ids)] = 1
    return ids_BS, mask_BS
