"""Raw rows flow in, tokenised sequences with loss masks, or questions for the teacher, or rejects, flow out.

A row is rendered to one text and that text is tokenised once, so its tokens are exactly what the teacher sees; which
of them train follows from the characters they cover. Target t trains when token t+1 is one of the assistant's words
or ends the assistant's turn. Plain text is trained whole.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.config import CacheConfig, GenerateConfig
from distill.data.chat import ChatTemplate
from distill.data.columns import Example, RowError, read_example, read_question
from distill.data.formats import RawRow
from distill.data.sources import Source
from distill.records import Prompt, Question, Reject, Split

_ID_LENGTH = 32  # hexadecimal characters of a SHA-256: 128 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """A tokenised row of L tokens: ``trained`` [L], the characters ``offsets`` [L, 2] of ``text`` that they cover."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    text: str
    words_end: int  # where the last trained words end in text
    prompt_id: str


class PromptMaker:
    """Turns raw rows into ``Prompt`` records with the teacher's tokenizer and chat template."""

    def __init__(self, tokenizer: Any, *, config: CacheConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._template: ChatTemplate | None = None

    def check(self, source: Source) -> None:
        """Raises DataError when the source needs a chat template and the tokenizer has none that works."""
        if source.layout.is_chat and self._template is None:
            self._template = ChatTemplate(self._tokenizer)

    def make(self, row: RawRow, *, source: Source) -> Sequence[Prompt | Question | Reject]:
        """The sequences of one row: one, several where a long row is split, or one Reject. Never empty.

        Where the teacher is to answer by itself, the questions of the row, one for each answer, or one Reject. Raises
        DataError as ``check`` does.
        """
        self.check(source)
        label = f"{source.name}:{row.row}"
        try:
            if row.fields is None:
                raise RowError(row.problem)
            if self._config.generate is not None:
                example = read_question(row.fields, source.layout)
                return self._questions(example, self._config.generate, source=source, label=label)
            example = read_example(row.fields, source.layout)
            tokens = self._tokenise(example)
            pieces = self._pieces(len(tokens.ids))
        except RowError as error:
            return [Reject(domain=source.domain, source=label, reason=str(error))]
        is_split = self._config.overlong == "split" and len(pieces) > 1
        labels = (f"{label}#{number}" for number in count(1)) if is_split else iter([label])
        return [
            self._sequence(tokens, start, stop, example=example, source=source, label=piece_label)
            for (start, stop), piece_label in zip(pieces, labels, strict=False)
        ]

    def question(self, prompt: Prompt) -> Question | None:
        """What the teacher is asked in ``prompt``: its tokens before the first trained one; None for plain text."""
        num_asked = int(prompt.loss_mask.argmax()) + 1
        if num_asked < 2:
            return None
        return Question(
            prompt_id=prompt.prompt_id,
            domain=prompt.domain,
            split=prompt.split,
            source=prompt.source,
            metadata=prompt.metadata,
            prompt=prompt.prompt,
            input_ids=prompt.input_ids[:num_asked],
        )

    def answered(self, question: Question, answer: NDArray[np.int32]) -> Prompt:
        """The sequence of a question [P] and the teacher's answer [G >= 1], whose tokens train: L = P + G."""
        ids = np.concatenate([question.input_ids, answer]).astype(np.int32)
        mask = np.arange(1, len(ids)) >= len(question.input_ids)
        return Prompt(
            sequence_id=_digest(ids, mask),
            prompt_id=question.prompt_id,
            domain=question.domain,
            split=question.split,
            source=question.source,
            metadata=question.metadata,
            prompt=question.prompt,
            response=self.words(answer),
            input_ids=ids,
            loss_mask=mask,
        )

    def words(self, answer: NDArray[np.int32]) -> str:
        """The text of generated tokens, without special ones."""
        return str(self._tokenizer.decode(answer.tolist(), skip_special_tokens=True))

    def _questions(
        self, example: Example, generate: GenerateConfig, *, source: Source, label: str
    ) -> Sequence[Question | Reject]:
        assert self._template is not None
        assert example.messages is not None
        text = self._template.opening(example.messages, thinking=generate.thinking)
        ids, _ = self._encode(text, add_special_tokens=False)
        if len(ids) >= self._config.max_length:
            raise RowError(f"no room for an answer within the {self._config.max_length} tokens of --max-length")
        prompt_id = _digest(ids)
        return [
            Question(
                prompt_id=prompt_id,
                domain=source.domain,
                split=self._split(prompt_id, source),
                source=label if generate.num == 1 else f"{label}#{number + 1}",
                metadata=example.metadata,
                prompt=_transcript(example.messages),
                input_ids=ids,
                number=number,
            )
            for number in range(generate.num)
        ]

    def _tokenise(self, example: Example) -> _Tokens:
        if example.messages is None:
            assert example.text is not None
            return self._tokenise_text(example.text)
        assert self._template is not None
        text, spans = self._template.render(example.messages)
        ids, offsets = self._encode(text, add_special_tokens=False)
        trained = np.zeros(len(ids), dtype=np.bool_)
        for span in spans:
            trained |= (offsets[:, 0] < span.end) & (offsets[:, 1] > span.start)
        if not trained.any():
            raise RowError("no token belongs to the assistant")
        prompt_id = _digest(ids[: int(trained.argmax())])
        words_end = spans[-1].words_end
        return _Tokens(ids=ids, trained=trained, offsets=offsets, text=text, words_end=words_end, prompt_id=prompt_id)

    def _tokenise_text(self, text: str) -> _Tokens:
        ids, offsets = self._encode(text, add_special_tokens=True)
        eos = self._tokenizer.eos_token_id
        if eos is not None and (len(ids) == 0 or ids[-1] != eos):
            ids = np.append(ids, np.int32(eos))
            offsets = np.append(offsets, [[len(text)] * 2], axis=0)
        if len(ids) < 2:
            raise RowError("fewer than 2 tokens")
        trained = np.ones(len(ids), dtype=np.bool_)
        # A text has no prompt. All of it stands in, else all texts that start alike would be held out together.
        return _Tokens(
            ids=ids, trained=trained, offsets=offsets, text=text, words_end=len(text), prompt_id=_digest(ids)
        )

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        encoded = self._tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            truncation=False,
            padding=False,
            verbose=False,
        )
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        return ids, np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)

    def _pieces(self, length: int) -> list[tuple[int, int]]:
        limit = self._config.max_length
        if length <= limit:
            return [(0, length)]
        if self._config.overlong == "reject":
            raise RowError(f"longer than the {limit} tokens of --max-length: {length}")
        if self._config.overlong == "truncate":
            return [(0, limit)]
        # Pieces share one token: the last of a piece is the first of the next, so that no target is lost between.
        return [(start, min(start + limit, length)) for start in range(0, length - 1, limit - 1)]

    def _sequence(
        self, tokens: _Tokens, start: int, stop: int, *, example: Example, source: Source, label: str
    ) -> Prompt | Reject:
        ids, mask = tokens.ids[start:stop], tokens.trained[start + 1 : stop]
        if not mask.any():
            limit = self._config.max_length
            reason = f"none of the assistant's words is within the {limit} tokens of --max-length"
            return Reject(domain=source.domain, source=label, reason=reason)
        prompt, response = _readable(example)
        if stop - start < len(tokens.ids):
            first = start + 1 + int(mask.argmax())
            response = tokens.text[tokens.offsets[first, 0] : min(tokens.offsets[stop - 1, 1], tokens.words_end)]
        return Prompt(
            sequence_id=_digest(ids, mask),
            prompt_id=tokens.prompt_id,
            domain=source.domain,
            split=self._split(tokens.prompt_id, source),
            source=label,
            metadata=example.metadata,
            prompt=prompt if start == 0 else "",
            response=response,
            input_ids=ids,
            loss_mask=mask,
        )

    def _split(self, prompt_id: str, source: Source) -> Split:
        if source.split is not None:
            return source.split
        # A function of the prompt alone: equal prompts share a side, and a larger fraction keeps what a smaller held.
        return "eval" if int(prompt_id[:16], 16) < self._config.eval_fraction * 2**64 else "train"


def prompts_of(source: Source, *, start: int, stop: int, maker: PromptMaker) -> Iterator[Prompt | Question | Reject]:
    """What rows ``start`` to ``stop`` of a source are, in order; every row yields at least one item."""
    for row in source.rows(start, stop):
        yield from maker.make(row, source=source)


def _digest(ids: NDArray[np.int32], mask: NDArray[np.bool_] | None = None) -> str:
    digest = hashlib.sha256(ids.astype("<i4").tobytes())
    if mask is not None:
        digest.update(mask.tobytes())
    return digest.hexdigest()[:_ID_LENGTH]


def _readable(example: Example) -> tuple[str, str]:
    """Prompt and response for people: the last answer, and what was said before it."""
    if example.messages is None:
        return "", example.text or ""
    last = max(index for index, message in enumerate(example.messages) if message["role"] == "assistant")
    return _transcript(example.messages[:last]), _said(example.messages[last])


def _transcript(messages: list[dict[str, Any]]) -> str:
    """What was said, for people."""
    if len(messages) == 1:
        return _said(messages[0])
    return "\n\n".join(f"{message['role']}: {_said(message)}" for message in messages)


def _said(message: dict[str, Any]) -> str:
    """A message's words, or the tool calls that it has instead."""
    calls = message.get("tool_calls")
    return str(message["content"]) or (json.dumps(calls, ensure_ascii=False) if calls else "")
