"""The right columns are found, the others become metadata, and what is wrong with a row or file is said."""

from typing import Any

import pytest

from distill.config import ColumnsConfig
from distill.data.columns import Layout, RowError, find_layout, read_example
from distill.errors import DataError

USUAL = ColumnsConfig()


@pytest.mark.parametrize(
    ("found", "layout"),
    [
        (["question", "answer", "department"], Layout(prompt="question", response="answer")),
        (["ask", "Answer"], Layout(prompt="ask", response="Answer")),
        (["INSTRUCTION", " Input ", "Output"], Layout(prompt="INSTRUCTION", input=" Input ", response="Output")),
        (["prompt", "response"], Layout(prompt="prompt", response="response")),
        (["prompt", "question", "answer"], Layout(prompt="question", response="answer")),
        (["instruction", "input", "output", "text"], Layout(prompt="instruction", input="input", response="output")),
        (["prompt", "messages"], Layout(messages="messages")),
        (["input", "text", "url"], Layout(text="text")),
    ],
)
def test_usual_names(found: list[str], layout: Layout) -> None:
    assert find_layout(found, columns=USUAL, where="f") == layout


@pytest.mark.parametrize(
    ("columns", "layout"),
    [
        ({"prompt": "title"}, Layout(prompt="title", response="answer")),
        ({"response": "text"}, Layout(prompt="question", response="text")),
        ({"text": "title"}, Layout(text="title")),
        ({"messages": "title"}, Layout(messages="title")),
        ({"prompt": "not here"}, Layout(prompt="question", response="answer")),
        ({"input": "title"}, Layout(prompt="question", input="title", response="answer")),
    ],
)
def test_given_names_win(columns: dict[str, str], layout: Layout) -> None:
    found = ["question", "answer", "title", "text"]
    assert find_layout(found, columns=ColumnsConfig(**columns), where="f") == layout


def test_no_layout_names_file_columns_and_option() -> None:
    with pytest.raises(DataError) as raised:
        find_layout(["title", "question"], columns=USUAL, where="data/f.csv")
    message = str(raised.value)
    assert message.startswith("data/f.csv: ")
    assert "found are title, question" in message
    assert "--column prompt=NAME" in message


def test_prompt_with_input_and_metadata() -> None:
    layout = Layout(prompt="instruction", input="input", response="output")
    fields = {
        "instruction": "Translate.",
        "input": "Bonjour",
        "output": 4,
        "department": "心内科",
        "tags": ["a", "é"],
        "score": 1.5,
        "nothing": None,
        "empty": "",
    }
    example = read_example(fields, layout)
    assert example.messages == [
        {"role": "user", "content": "Translate.\n\nBonjour"},
        {"role": "assistant", "content": "4"},
    ]
    assert example.metadata == {"department": "心内科", "tags": '["a", "é"]', "score": "1.5", "empty": ""}
    for empty in ("", None):
        messages = read_example({**fields, "input": empty}, layout).messages
        assert messages is not None
        assert messages[0]["content"] == "Translate."


def test_messages_as_list_or_as_json_text() -> None:
    layout = Layout(messages="messages")
    turns = [{"role": "user", "content": "Hi", "name": None}, {"role": "assistant", "content": "Yo"}]
    expected = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    text = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]'
    assert read_example({"messages": turns}, layout).messages == expected
    assert read_example({"messages": text, "id": 7}, layout).messages == expected
    assert read_example({"messages": text, "id": 7}, layout).metadata == {"id": "7"}


def test_a_tool_call_needs_no_words() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock"}}]}
    (message,) = read_example({"messages": [call]}, Layout(messages="messages")).messages or []
    assert message == {**call, "content": ""}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"question": "q"}, "column 'answer' is missing"),
        ({"question": "q", "answer": None}, "column 'answer' is empty"),
        ({"question": "q", "answer": " \n"}, "column 'answer' is empty"),
        ({"question": "", "answer": "a"}, "column 'question' is empty"),
        ({"question": "q", "answer": ["a"]}, "column 'answer' holds a list, not text"),
        ({"question": True, "answer": "a"}, "column 'question' holds a bool, not text"),
    ],
)
def test_rows_without_prompt_or_response(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read_example(fields, Layout(prompt="question", response="answer"))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("[broken", "is a text that is not JSON"),
        ("[" * 100_000, "is a text that is not JSON"),
        ('"text"', "is not a list of messages"),
        ([], "is not a list of messages"),
        (None, "is not a list of messages"),
        (["text"], "message 1 is not a mapping"),
        ([{"from": "human", "value": "Hi"}], "message 1 is not a mapping with 'role' and 'content'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1: its content is not text"),
        ([{"role": "user", "content": "Hi"}], "no message is the assistant's"),
        (
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}],
            "message 2: the assistant's answer is empty",
        ),
    ],
)
def test_rows_without_conversation(messages: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read_example({"messages": messages}, Layout(messages="messages"))
