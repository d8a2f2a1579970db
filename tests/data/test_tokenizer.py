"""A tokenizer loads, gives the facts that an identity needs, or fails with a message that says what to do."""

from pathlib import Path
from typing import Any

import pytest

from distill.data.tokenizer import chat_template_text, load_tokenizer, token_map
from distill.errors import UsageError


def test_facts_of_a_real_tokenizer(qwen_folder: Path) -> None:
    tokenizer = load_tokenizer(str(qwen_folder), revision=None, trust_remote_code=False)
    tokens = token_map(tokenizer)
    assert len(tokens) == len(set(tokens.values())) == 151_669
    assert tokens["<|im_end|>"] == 151_645
    assert "<|im_start|>" in chat_template_text(tokenizer)


def test_template_text_of_none_and_of_several(qwen: Any) -> None:
    qwen.chat_template = None
    assert chat_template_text(qwen) == ""
    qwen.chat_template = {"tool_use": "b", "default": "a"}
    assert chat_template_text(qwen) == '{"default": "a", "tool_use": "b"}'


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("/no/such/folder", "the teacher's folder /no/such/folder does not exist"),
        ("owner/none", "cannot load the tokenizer of owner/none: .*HF_HUB_OFFLINE is set"),
        ("{tmp}/empty", "cannot load the tokenizer of .*tokenizer.json"),
        ("{tmp}/broken", "cannot load the tokenizer of .*Expecting"),
        ("{tmp}/only-config", "has no words: its files"),
    ],
)
def test_tokenizers_that_cannot_be_loaded(
    teacher: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, file, content in (
        ("empty", "readme", ""),
        ("broken", "tokenizer.json", "{"),
        ("only-config", "config.json", '{"model_type": "qwen3"}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content)
    with pytest.raises(UsageError, match=message):
        load_tokenizer(teacher.format(tmp=tmp_path), revision=None, trust_remote_code=False)
