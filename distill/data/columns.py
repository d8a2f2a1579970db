"""A raw row's fields flow in, what will be tokenised flows out: a conversation or plain text, and metadata.

Which columns hold them is decided once per file (``find_layout``), then applied to each row (``read_example``).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from distill.config import ColumnsConfig
from distill.errors import DataError

_USUAL_NAMES = {
    "prompt": ("ask", "question", "instruction", "prompt"),
    "input": ("input",),
    "response": ("answer", "output", "response"),
    "messages": ("messages",),
    "text": ("text",),
}
_LAYOUTS = (("messages",), ("prompt", "response"), ("text",))
_QUESTIONS = (("messages",), ("prompt",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The columns of a file that are tokenised: messages, or prompt (+ input) and response, or text."""

    prompt: str | None = None
    input: str | None = None
    response: str | None = None
    messages: str | None = None
    text: str | None = None

    @property
    def is_chat(self) -> bool:
        """Whether rows go through the teacher's chat template."""
        return self.text is None

    @property
    def columns(self) -> frozenset[str]:
        """The tokenised columns; all others are metadata."""
        named = (self.prompt, self.input, self.response, self.messages, self.text)
        return frozenset(name for name in named if name is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A row ready for the tokenizer: either ``messages`` (role, content and what else the data gives) or ``text``."""

    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    metadata: dict[str, str]


class RowError(ValueError):
    """This row cannot become a sequence; the message is the reason of its Reject."""


def find_layout(found: Iterable[str], *, columns: ColumnsConfig, where: str, answers: bool = True) -> Layout:
    """The layout of a file with the columns ``found``, with ``answers`` or for the teacher to answer.

    Names given in ``columns`` win over the usual ones, messages over prompt and response, these over text (Alpaca
    files repeat prompt and response in a ``text`` column). Raises DataError when no layout fits.
    """
    names = list(found)
    given = {key: name for key in _USUAL_NAMES if (name := getattr(columns, key)) is not None and name in names}
    free = {name.strip().lower(): name for name in reversed(names) if name not in given.values()}
    usual = {
        key: free[name] for key, candidates in _USUAL_NAMES.items() for name in reversed(candidates) if name in free
    }
    known = {**usual, **given}
    by_preference = sorted(
        _LAYOUTS if answers else _QUESTIONS, key=lambda layout: not any(key in given for key in layout)
    )
    for layout in by_preference:
        if all(key in known for key in layout):
            keys = (*layout, "input") if "prompt" in layout else layout
            return Layout(**{key: known[key] for key in keys if key in known})
    if not answers:
        raise DataError(
            f"{where}: no prompts that the teacher could answer. Needed is a prompt "
            f"({', '.join(_USUAL_NAMES['prompt'])}) or messages; found are {', '.join(names) or 'none'}. Name the "
            "column with --column prompt=NAME or --column messages=NAME, or leave out --generate."
        )
    raise DataError(
        f"{where}: no columns to learn from. Needed are a prompt ({', '.join(_USUAL_NAMES['prompt'])}) and a response "
        f"({', '.join(_USUAL_NAMES['response'])}), or messages, or text; found are {', '.join(names) or 'none'}. "
        "Name the columns with --column prompt=NAME --column response=NAME, --column messages=NAME "
        "or --column text=NAME."
    )


def read_example(fields: dict[str, Any], layout: Layout) -> Example:
    """The conversation or text of a row and its other columns. Raises RowError with the reason where there is none."""
    metadata = _metadata(fields, layout)
    if layout.text is not None:
        return Example(text=_words(fields, layout.text), metadata=metadata)
    if layout.messages is not None:
        messages = _messages(fields.get(layout.messages), layout.messages)
        if not any(message["role"] == "assistant" for message in messages):
            raise RowError("no message is the assistant's")
        return Example(messages=messages, metadata=metadata)
    assert layout.response is not None
    answer = {"role": "assistant", "content": _words(fields, layout.response)}
    return Example(messages=[_question(fields, layout), answer], metadata=metadata)


def read_question(fields: dict[str, Any], layout: Layout) -> Example:
    """The conversation of a row up to where the assistant's last answer begins. Raises RowError."""
    metadata = _metadata(fields, layout)
    if layout.messages is None:
        return Example(messages=[_question(fields, layout)], metadata=metadata)
    messages = _messages(fields.get(layout.messages), layout.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise RowError("no message is left to answer")
    return Example(messages=messages, metadata=metadata)


def _question(fields: dict[str, Any], layout: Layout) -> dict[str, Any]:
    assert layout.prompt is not None
    prompt = _words(fields, layout.prompt)
    if layout.input is not None and fields.get(layout.input) not in (None, ""):
        prompt = f"{prompt}\n\n{_words(fields, layout.input)}"
    return {"role": "user", "content": prompt}


def _metadata(fields: dict[str, Any], layout: Layout) -> dict[str, str]:
    """A row's other columns as text."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in fields.items()
        if name not in layout.columns and value is not None
    }


def _words(fields: dict[str, Any], column: str) -> str:
    """The non-empty text of a column; a number counts as its digits."""
    value = fields.get(column)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = json.dumps(value)
    if value is None or value == "":
        raise RowError(f"column '{column}' is {'empty' if column in fields else 'missing'}")
    if not isinstance(value, str):
        raise RowError(f"column '{column}' holds a {type(value).__name__}, not text")
    if not value.strip():
        raise RowError(f"column '{column}' is empty")
    return value


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"column '{column}' is a text that is not JSON: {error}") from error
    if not isinstance(value, list) or not value:
        raise RowError(f"column '{column}' is not a list of messages")
    return [_message(item, number) for number, item in enumerate(value, start=1)]


def _message(item: Any, number: int) -> dict[str, Any]:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str):
        raise RowError(f"message {number} is not a mapping with 'role' and 'content'")
    # A key whose value is null is one that the message lacks, but templates would print it.
    message = {key: value for key, value in item.items() if value is not None}
    calls = message["role"] == "assistant" and bool(message.get("tool_calls"))
    if calls:
        message.setdefault("content", "")
    if not isinstance(message.get("content"), str):
        raise RowError(f"message {number}: its content is not text")
    if message["role"] == "assistant" and not message["content"].strip() and not calls:
        raise RowError(f"message {number}: the assistant's answer is empty")
    return message
