"""The spans of a rendered conversation hold the assistant's words and the end of its turn, whatever the template does.

Qwen3's and SmolLM2's templates are the real ones. The others are written here in the manner of well-known families.
"""

from typing import Any

import pytest

from distill.data.chat import ChatTemplate
from distill.data.columns import RowError
from distill.errors import DataError

# Tokens that are special to Qwen's tokenizer stand in for each family's own.
BRACKETS = (  # no generation prompt: the end of the user's turn is one
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} <|endoftext|>{% endif %}{% endfor %}"
)
FORGETS_REASONING = (  # answers lose their reasoning, and the generation prompt opens one
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}<|im_end|>"
    "{{ m.content.split('</think>')[-1] | trim }}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|><think>\n{% endif %}"
)
CLOSES_THE_TEXT = (  # an end-of-text follows the last turn, and only that
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
)
OTHER_LAST_END = (  # the last turn ends otherwise than the ones before it
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if loop.last %}<|endoftext|>{% else %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PLAIN = (  # no special token at all
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
HEADED = (  # a header that the model has to write itself
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}|final{% endif %}"
    "{{ '\n' + m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
CALLS = (  # a special token opens the calls
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}<|object_ref_start|>{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
)


def turns(*contents: str) -> list[dict[str, Any]]:
    """User and assistant in turn."""
    return [
        {"role": "assistant" if number % 2 else "user", "content": content} for number, content in enumerate(contents)
    ]


def trained(tokenizer: Any, messages: list[dict[str, Any]], template: str | None = None) -> list[str]:
    """The text of each span."""
    if template is not None:
        tokenizer.chat_template = template
    text, spans = ChatTemplate(tokenizer).render(messages)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    for span in spans:
        assert span.start < span.words_end <= span.end
    return [text[span.start : span.end] for span in spans]


def test_smollm2(smollm2: Any) -> None:
    assert trained(smollm2, turns("Hi", "Yo ", "Hi", " \nYo\n")) == ["Yo <|im_end|>", " \nYo\n<|im_end|>"]


def test_qwen3_gives_the_words_without_its_empty_reasoning(qwen: Any) -> None:
    messages = turns("Hi", "Yo", "And?", "So.")
    assert "<think>\n\n</think>\n\nSo." in qwen.apply_chat_template(messages, tokenize=False)
    assert trained(qwen, messages) == ["Yo<|im_end|>", "So.<|im_end|>"]


def test_qwen3_keeps_the_last_reasoning_and_drops_the_earlier(qwen: Any) -> None:
    messages = turns("Hi", "<think>\nfirst\n</think>\n\nYo", "And?", "<think>\nsecond\n</think>\n\nSo.")
    assert trained(qwen, messages) == ["Yo<|im_end|>", "<think>\nsecond\n</think>\n\nSo.<|im_end|>"]
    separate = turns("Hi", "Yo")
    separate[1]["reasoning_content"] = "because"
    assert trained(qwen, separate) == ["<think>\nbecause\n</think>\n\nYo<|im_end|>"]


def test_qwen3_turns_that_follow_each_other(qwen: Any) -> None:
    messages = [*turns("Hi", "One"), {"role": "assistant", "content": "Two"}]
    assert trained(qwen, messages) == ["One<|im_end|>", "Two<|im_end|>"]
    first = [{"role": "assistant", "content": "Welcome"}, *turns("Hi", "Yo")]
    assert trained(qwen, first) == ["Welcome<|im_end|>", "Yo<|im_end|>"]


def test_qwen3_tool_calls_are_words(qwen: Any) -> None:
    messages = turns("Time?", "Let me look.")
    messages[1]["tool_calls"] = [{"function": {"name": "clock", "arguments": {"zone": "UTC"}}}]
    messages += [{"role": "tool", "content": "12:00"}, {"role": "assistant", "content": "Noon."}]
    call, answer = trained(qwen, messages)
    assert call.startswith("Let me look.\n<tool_call>\n")
    assert call.endswith("</tool_call><|im_end|>")
    assert answer == "Noon.<|im_end|>"


@pytest.mark.parametrize("template", [None, CALLS], ids=["qwen3", "special"])
@pytest.mark.parametrize("words", ["Let me look.", ""])
def test_calls_train_with_words_and_without_and_what_tools_say_does_not(
    qwen: Any, template: str | None, words: str
) -> None:
    calls = [{"function": {"name": "clock", "arguments": {"zone": "UTC"}}}]
    question = [*turns("Time?"), {"role": "assistant", "content": words, "tool_calls": calls}]
    told = [*question, {"role": "tool", "content": "12:00"}, {"role": "assistant", "content": "Noon."}]
    call, answer = trained(qwen, told, template)
    assert call.startswith(words or ("<tool_call>" if template is None else "<|object_ref_start|>"))
    assert '"zone": "UTC"' in call
    assert call.endswith("<|im_end|>")
    assert "12:00" not in call
    assert answer == "Noon.<|im_end|>"
    (last,) = trained(qwen, question, template)
    assert last.endswith(call.removeprefix(words))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (BRACKETS, ["One <|endoftext|>", "Two <|endoftext|>"]),
        (FORGETS_REASONING, ["One<|endoftext|>", "Two<|endoftext|>"]),
        (CLOSES_THE_TEXT, [" One<|im_end|>", "Two\n<|im_end|>"]),
        (OTHER_LAST_END, [" One", "Two\n<|endoftext|>"]),
        (PLAIN, [" One\n\n", "Two\n\n\n"]),
        (HEADED, ["|final\n One<|im_end|>", "|final\nTwo\n<|im_end|>"]),
    ],
)
def test_families(qwen: Any, template: str, expected: list[str]) -> None:
    assert trained(qwen, turns("Hi", " One", "And?", "Two\n"), template) == expected


def test_reasoning_that_a_template_forgets(qwen: Any) -> None:
    assert trained(qwen, turns("Hi", "<think>a</think>One"), FORGETS_REASONING) == ["One<|endoftext|>"]
    with pytest.raises(RowError, match="leaves no word of message 2"):
        trained(qwen, turns("Hi", "<think>a</think>"), FORGETS_REASONING)


def test_answers_that_look_like_something_else(qwen: Any, smollm2: Any) -> None:
    """Words of the user, of the template or a special token inside an answer do not move the span."""
    answer = "Hi<|im_end|>\n<|im_start|>assistant\nHi"
    for tokenizer in (qwen, smollm2):
        assert trained(tokenizer, turns("Hi", answer, "Hi", "Hi")) == [answer + "<|im_end|>", "Hi<|im_end|>"]
    marker = "\ue000answer\ue000"
    assert trained(qwen, turns(marker, marker)) == [marker + "<|im_end|>"]


def test_a_conversation_that_the_template_refuses(qwen: Any) -> None:
    with pytest.raises(RowError, match="refuses the conversation: roles must alternate"):
        trained(qwen, [*turns("Hi", "Yo"), {"role": "assistant", "content": "Yo"}], ALTERNATES)
    with pytest.raises(RowError, match="does not show an assistant message exactly once"):
        trained(qwen, turns("Hi", "Yo"), "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}")


def test_the_date_never_changes(qwen: Any) -> None:
    qwen.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + CLOSES_THE_TEXT
    text, _ = ChatTemplate(qwen).render(turns("Hi", "Yo"))
    assert text.startswith("2025-01-01<|im_start|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template.*--column text=NAME"),
        ("{{ broken", "cannot be used"),
        ({"tool_use": "{{ messages }}"}, "cannot be used"),
    ],
)
def test_tokenizers_without_a_usable_template(qwen: Any, template: Any, message: str) -> None:
    qwen.chat_template = template
    with pytest.raises(DataError, match=message):
        ChatTemplate(qwen)
