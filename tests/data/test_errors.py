"""Data and tokenizers that no sequence can be made of.

What it protects: it is told before a teacher loads, with the way out.
"""

from pathlib import Path

import pytest
from transformers import ByT5Tokenizer

from distill.config import ColumnsConfig
from distill.data.columns import find_layout
from distill.data.tokenizer import load_tokenizer
from distill.errors import DataError, UsageError


def test_columns_without_a_prompt_to_answer() -> None:
    with pytest.raises(DataError, match=r"g\.csv: no prompts that the teacher could answer.*found are text, id"):
        find_layout(["text", "id"], columns=ColumnsConfig(), where="g.csv", answers=False)


def test_a_tokenizer_that_cannot_say_where_tokens_lie(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is a slow one, which cannot say which characters a token covers"):
        load_tokenizer(str(tmp_path), revision=None, trust_remote_code=False)
