"""A conversation flows in, its text under the teacher's chat template and the spans of the assistant's words flow out.

Templates rarely mark what the assistant says, and rendering a prefix of a conversation need not give a prefix of its
rendering (Qwen3 drops the reasoning of earlier turns). So the words of a turn are found by what surrounds them:

- they *end* where the text that follows a marker put in their place begins in the whole rendering;
- they *start* where the generation prompt ends, if the whole rendering begins with it (so that all that a model has
  to write itself is learnt, reasoning included), else where the marker stands;
- the tokens that *end the turn* follow: what comes after the marker, tool calls included, through a special token, if
  it is the same with later turns and without them.

Each claim is checked against the whole rendering; a conversation for which one fails is rejected, never guessed.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from distill.data.columns import RowError
from distill.errors import DataError

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One assistant turn, in characters of the rendered text: ``[start, words_end)`` its words, then its end."""

    start: int
    words_end: int
    end: int


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises DataError when the tokenizer has no chat template, or one that cannot be read."""
        source = str(tokenizer.chat_template or "")
        if not source:
            raise DataError(
                "the teacher's tokenizer has no chat template, so prompts with responses and conversations cannot be "
                "put into words it knows. Use a teacher with a chat template, or data with one plain 'text' column "
                "(--column text=NAME)."
            )
        self._tokenizer = tokenizer
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._stops = re.compile("|".join(map(re.escape, special)) or r"(?!)")  # the latter matches nothing
        self._prompt_options = _prompt_options(source)
        try:
            self._text([{"role": "user", "content": "Hello"}])
        except RowError as error:
            raise DataError(f"the teacher's tokenizer has a chat template that cannot be used: {error}.") from error

    def render(self, messages: Messages) -> tuple[str, list[Span]]:
        """The text of a conversation and the spans of its assistant turns. Raises RowError."""
        text = self._text(messages)
        spans = [
            self._span(messages, index, text)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        for before, after in pairwise(spans):
            if before.end > after.start:
                raise RowError("the chat template mixes the words of two turns")
        return text, spans

    def opening(self, messages: Messages, *, thinking: bool) -> str:
        """The text up to where the assistant's next words begin. Raises RowError.

        ``thinking`` chooses the prompt after which a teacher that can reason does so, where its template knows both.
        """
        if not self._prompt_options:
            raise RowError("the chat template has no generation prompt, so no answer can be asked for")
        options = self._prompt_options[-1 if thinking else 0]
        return self._text(messages, add_generation_prompt=True, **options)

    def _span(self, messages: Messages, index: int, text: str) -> Span:
        marker = "\ue000answer\ue000"
        while marker in text:
            marker += "\ue000"
        marked = [*messages[:index], {**messages[index], "content": marker}, *messages[index + 1 :]]
        before, after = self._around(marker, marked)
        if not text.endswith(after):
            raise RowError(f"the chat template changes what follows message {index + 1}")
        is_last = index == len(messages) - 1
        after_alone = after if is_last else self._around(marker, marked[: index + 1])[1]
        words_end = len(text) - len(after)
        end = words_end + self._end_length(after, after_alone, calls=bool(messages[index].get("tool_calls")))
        if not messages[index]["content"].strip():
            words_end = end  # a call without words stands behind their place
        prompts = [*self._generation_prompts(messages[:index]), before]
        start = next((len(p) for p in prompts if text.startswith(p) and len(p) <= words_end), None)
        if start is None:
            raise RowError(f"the chat template does not show where message {index + 1} starts")
        if not text[start:words_end].strip():
            raise RowError(f"the chat template leaves no word of message {index + 1}")
        return Span(start=start, words_end=words_end, end=end)

    def _around(self, marker: str, marked: Messages) -> tuple[str, str]:
        parts = self._text(marked).split(marker)
        if len(parts) != 2:
            raise RowError("the chat template does not show an assistant message exactly once")
        return parts[0], parts[1]

    def _generation_prompts(self, messages: Messages) -> list[str]:
        if not messages:
            return []
        return [self._text(messages, add_generation_prompt=True, **options) for options in self._prompt_options]

    def _end_length(self, after: str, after_alone: str, *, calls: bool) -> int:
        """Characters that end a turn, told by what follows its words with later turns and without them.

        Through the first special token: generation stops there, so what the template adds after it is not learnt. With
        tool calls, which special tokens may open, through the last one.
        """
        ends = (found.end() for found in self._stops.finditer(after_alone))
        stops = [end for end in ends if after.startswith(after_alone[:end])]
        if stops:
            return stops[-1 if calls else 0]
        # Where the two part, what follows with later turns may already be the next turn: nothing is learnt of it.
        return len(after_alone) if after.startswith(after_alone) else 0

    def _text(self, messages: Messages, **options: Any) -> str:
        from jinja2.exceptions import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=_today, **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise RowError(f"the chat template refuses the conversation: {error}") from error
        return str(text)


def _today(pattern: str) -> str:
    """For templates that print the date: always the same, else a prompt would change its id and side overnight."""
    return datetime(2025, 1, 1).strftime(pattern)


def _prompt_options(source: str) -> tuple[dict[str, Any], ...]:
    """Options under which the template writes the generation prompts that an assistant turn may follow."""
    if "add_generation_prompt" not in source:
        return ()
    # A template that can be told not to reason opens an answer without reasoning by an empty block of its own: that
    # block is no word of the assistant. In answers that reason, the prompt with the empty block does not match.
    return ({"enable_thinking": False}, {}) if "enable_thinking" in source else ({},)
